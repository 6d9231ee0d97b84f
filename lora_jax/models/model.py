"""`Model`: a pure apply function, its parameters, its configuration and its names elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..paths import leaf_paths, leaves_by_path
from ..weights import is_adapted
from .config import ModelConfig
from .encoder import Remat
from .families import family_of
from .family import Task
from .heads import Pooling
from .layers import wide


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A bundled model.

    Attributes:
        apply: `apply(params, input_ids, attention_mask=None, token_type_ids=None, *, dropout_key=None)`, pure. The
            inputs are `(batch, time)`; `attention_mask` is 0 or false at padding. (RoBERTa counts positions from the
            first token that isn't `config.pad_token_id`: padding on the left has to be that.) Returns hidden states
            `(batch, time, d)` in the dtype of the computation, logits `(batch, num_labels)` or values `(batch,)` in
            float32 or wider. There is dropout if and only if there is a `dropout_key`.
        params: a nested dict of arrays with string keys.
        config: sizes and settings; a `BertConfig`, `RobertaConfig`, … by the kind of model.
        names: the Hugging Face module of every leaf: `encoder/layers/0/attention/query/kernel` is in
            `bert.encoder.layer.0.attention.self.query`.
        task: `"classification"`, `"regression"`, or `None` for hidden states.
        pooling: what the head sees, `"first"` or `"mean"`.
    """

    apply: Callable[..., jax.Array]
    params: dict[str, Any]
    config: Any  # a `ModelConfig`: which, and so which sizes it has, is known when a folder is read
    names: Mapping[str, str]
    task: Task
    pooling: Pooling


class Skeleton(NamedTuple):
    """A model without its parameters."""

    apply: Callable[..., jax.Array]
    params: dict[str, Any]  # of `jax.ShapeDtypeStruct`


@functools.cache
def skeleton(
    config: ModelConfig,
    *,
    task: Task = None,
    num_labels: int = 1,
    pooling: Pooling = "first",
    dtype: jnp.dtype = np.dtype("float32"),  # noqa: B008, immutable
    remat: Remat | None = None,
) -> Skeleton:
    """A model's apply function and the shapes of its parameters; takes no memory for them.

    Equal arguments give the same function, so that two loads of one model share what `jax.jit` has compiled.

    Example:
        >>> import math
        >>> sizes = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
        >>> base = lj.models.BertConfig(vocab_size=30522, max_position_embeddings=512, type_vocab_size=2, **sizes)
        >>> shapes = skeleton(base, task="classification", num_labels=2).params
        >>> sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        109483778
    """
    outputs = {None: None, "classification": num_labels, "regression": 1}[task]
    build = functools.partial(
        family_of(config).module, config, pooling=pooling, outputs=outputs, dtype=dtype, remat=remat
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    shapes = _with_string_keys(nnx.to_pure_dict(state))
    paths = frozenset(leaf_paths(shapes))

    def apply(
        params: Mapping[str, Any],
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        _check_params(params, paths)
        input_ids, mask, token_types = _check_inputs(config, input_ids, attention_mask, token_type_ids)
        model = nnx.merge(graph, _with_layer_numbers(params))
        result = model(input_ids, mask, token_types, dropout_key)
        if task is None:
            return result
        result = result.astype(wide(result.dtype))
        return result[:, 0] if task == "regression" else result

    return Skeleton(apply, shapes)


def _check_params(params: Mapping[str, Any], expected: frozenset[str]) -> None:
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise TypeError(
                f"`params` holds an adapted weight at {path}, and the model takes arrays: wrap its apply function with "
                "`lora_jax.adapt`, or fold the weights in with `lora_jax.merge_params`."
            )
    if leaves.keys() != expected:
        raise ValueError(f"`params` isn't this model's tree: {difference(leaves.keys(), expected)}.")


def _check_inputs(
    config: ModelConfig, input_ids: Any, attention_mask: Any, token_type_ids: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"`input_ids` must be (batch, time) integers, not {input_ids.dtype} of shape {input_ids.shape}."
        )
    if input_ids.shape[1] > config.max_length:
        raise ValueError(
            f"`input_ids` has {input_ids.shape[1]} tokens in a row, and the model has positions for "
            f"{config.max_length}: cut the texts."
        )
    for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if value is not None and jnp.shape(value) != input_ids.shape:
            raise ValueError(f"`{name}` has shape {jnp.shape(value)}, and `input_ids` has {input_ids.shape}.")
    return (
        input_ids,
        None if attention_mask is None else jnp.asarray(attention_mask).astype(bool),
        None if token_type_ids is None else jnp.asarray(token_type_ids),
    )


def difference(found: Any, expected: Any, limit: int = 5) -> str:
    """`missing a, b; unexpected c`, each list cut to `limit`."""
    parts = []
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:limit])
            parts.append(f"{what} {shown}" + (f" and {len(names) - limit:,} more" if len(names) > limit else ""))
    return "; ".join(parts)


# Flax numbers the layers with integers. The public tree has strings only, so that it can be saved by any tool.
def _with_string_keys(tree: Any) -> Any:
    return {str(key): _with_string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _with_layer_numbers(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdecimal() else key: _with_layer_numbers(value) for key, value in tree.items()}
