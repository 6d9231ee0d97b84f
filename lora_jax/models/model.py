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

from ..errors import ArgumentError, ArgumentTypeError
from ..interop.module_names import Names
from ..paths import leaves_by_path, require_key, with_leaves
from ..weights import is_adapted, is_traced
from .families.registry import family_of
from .family import Family, Task
from .model_config import ModelConfig
from .nn.attention import AttentionForm
from .nn.cache import Cache, empty_cache
from .nn.decoder import DecoderConfig, WithHead
from .nn.heads import Pooling
from .nn.insertion import insert, split_inserted
from .nn.layers import wide
from .nn.rematerialization import Remat


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A bundled model.

    Attributes:
        apply: `apply(params, input_ids, attention_mask=None, token_type_ids=None, *, dropout_key=None)`, pure. The
            inputs are `(batch, time)`; `attention_mask` is 0 or false at padding. (RoBERTa counts positions from the
            first token that isn't `config.pad_token_id`: padding on the left has to be that.) Returns hidden states
            `(batch, time, d)` in the dtype of the computation, logits `(batch, num_labels)` or values `(batch,)` in
            float32 or wider. There is dropout if and only if there is a `dropout_key`.

            Of a decoder: `apply(params, input_ids, attention_mask=None, *, position_ids=None, segments=None,
            cache=None, last_only=False, with_head=None, dropout_key=None)`. Returns hidden states, or logits
            `(batch, time, vocabulary)` in float32 or wider; with `last_only` those of the last token, `(batch, 1, …)`. Without
            `position_ids` the places are counted, padding too, as transformers' models do: rotary positions don't mind,
            but for a GPT-2 padding on the left needs `position_ids`. With `segments`, `(batch, time)` integers, a row
            is several texts end to end, each a run of equal numbers: a token attends within its own, places are counted
            there, and the result is that of each text in a row of its own. With a `cache` (a number of slots at first,
            see `Cache`) the tokens follow those that it holds, `attention_mask` is that of the new tokens, and the
            cache is returned beside. `with_head(hidden, head, tied)` takes the place of the logits: it gets the hidden
            states `(batch, time, d)`, the head `(d, vocabulary)`, or, with `tied`, the table `(vocabulary, d)`, and
            what it gives is the result; for a loss that forms no logits, see `lj.losses.chunked_cross_entropy`.
        params: a nested dict of arrays with string keys. With `scan_layers` each leaf below `layers` holds all layers.
        config: sizes and settings; a `BertConfig`, `LlamaConfig`, … by the kind of model.
        names: the Hugging Face module of every leaf: `encoder/layers/0/attention/query/kernel` is in
            `bert.encoder.layer.0.attention.self.query`. Embeddings that are the head as well have both modules. With
            `scan_layers` they are the names of `unstack_layers(params)`, which `lj.interop` takes for either form.
            `names.fan_in_fan_out` are the modules, by their last segments, that store `(in, out)` there: GPT-2's.
        task: `"classification"`, `"regression"`, `"causal-lm"`, or `None` for hidden states.
        pooling: what the head sees, `"first"` or `"mean"`.
        new_head: Whether the head was drawn though the checkpoint has one, see `load`.
    """

    apply: Callable[..., Any]
    params: dict[str, Any]
    config: Any  # a `ModelConfig`: which, and so which sizes it has, is known when a folder is read
    names: Names
    task: Task
    pooling: Pooling
    new_head: bool = False


class Skeleton(NamedTuple):
    """A model without its parameters."""

    apply: Callable[..., Any]
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
    scan_layers: bool = False,
    attention: AttentionForm = "auto",
) -> Skeleton:
    """A model's apply function and the shapes of its parameters; takes no memory for them.

    Equal arguments give the same function, so that two loads of one model share what `jax.jit` has compiled.

    Raises:
        ValueError: a task that this kind of model has no head for; `pooling` or `scan_layers` where they mean nothing.

    Example:
        >>> import math
        >>> sizes = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
        >>> base = lj.models.BertConfig(vocab_size=30522, max_position_embeddings=512, type_vocab_size=2, **sizes)
        >>> shapes = skeleton(base, task="classification", num_labels=2).params
        >>> sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        109483778
    """
    family = family_of(config)
    check_options(family, task=task, pooling=pooling, scan_layers=scan_layers)
    if isinstance(config, DecoderConfig):
        build = functools.partial(
            family.module,
            config,
            head=task == "causal-lm",
            dtype=dtype,
            remat=remat,
            scan=scan_layers,
            attention=attention,
        )
        return _decoder(config, task, dtype, build)
    outputs = {None: None, "classification": num_labels, "regression": 1}[task]
    build = functools.partial(
        family.module, config, pooling=pooling, outputs=outputs, dtype=dtype, remat=remat, attention=attention
    )
    return _encoder(config, task, build)


def check_options(family: Family, *, task: object, pooling: Pooling, scan_layers: bool) -> None:
    """Refuses options that a family doesn't have.

    Raises:
        ValueError: see `skeleton`.
    """
    kind = family.config.model_type
    if task not in family.architectures:
        tasks = [f'"{name}"' for name in family.architectures if name is not None]
        other = "an encoder" if family.is_decoder else "a decoder (GPT-2, Llama, …)"
        raise ArgumentError(
            f"`task` of a {kind} must be {', '.join(tasks)} or None, not {task!r}: that is for {other}."
        )
    if family.is_decoder and pooling != "first":
        raise ArgumentError(f"`pooling` is for the heads of encoders, and a {kind} has none of them: leave it out.")
    if scan_layers and not family.is_decoder:
        raise ArgumentError(f"`scan_layers` is for decoders, and a {kind} is an encoder: leave it out.")


def _split(build: Callable[..., Any]) -> tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]:
    """The module's structure, its parameters as shapes, and each one's shape by its path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    shapes = _with_string_keys(nnx.to_pure_dict(state))
    return graph, shapes, {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()}


def _encoder(config: ModelConfig, task: Task, build: Callable[..., Any]) -> Skeleton:
    graph, shapes, expected = _split(build)

    def apply(
        params: Mapping[str, Any],
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        input_ids, mask, token_types = _check_inputs(config, input_ids, attention_mask, token_type_ids)
        if dropout_key is not None:
            require_key(dropout_key, "dropout_key")
        model = _with_params(graph, params, expected)
        result = model(input_ids, mask, token_types, dropout_key)
        if task is None:
            return result
        result = result.astype(wide(result.dtype))
        return result[:, 0] if task == "regression" else result

    return Skeleton(apply, shapes)


def _decoder(config: DecoderConfig, task: Task, dtype: jnp.dtype, build: Callable[..., Any]) -> Skeleton:
    graph, shapes, expected = _split(build)

    def apply(
        params: Mapping[str, Any],
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        position_ids: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | int | None = None,
        last_only: bool = False,
        with_head: WithHead | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Any:
        input_ids, mask, positions, segments = _check_tokens(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, segments=segments
        )
        if segments is not None and not jnp.issubdtype(segments.dtype, jnp.integer):
            raise ArgumentError(f"`segments` must be integers, not {segments.dtype}.")
        if segments is not None and cache is not None:
            raise ArgumentError("`segments` are for rows that are run at once: leave out the `cache`, or the segments.")
        if with_head is not None and task is None:
            raise ArgumentError('`with_head` is for a model with a head: load it with `task="causal-lm"`.')
        cache = _check_cache(config, input_ids, cache, dtype)
        if dropout_key is not None:
            require_key(dropout_key, "dropout_key")
        model = _with_params(graph, params, expected)
        result, cache = model(
            input_ids,
            mask,
            positions,
            cache,
            dropout_key,
            segments=segments,
            last_only=last_only,
            with_head=with_head,
        )
        result = result if task is None or with_head is not None else result.astype(wide(result.dtype))
        return result if cache is None else (result, cache)

    return Skeleton(apply, shapes)


def _with_params(graph: Any, params: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> Any:
    """The module with these parameters, and with the adapters and prefixes that are among them."""
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise ArgumentTypeError(
                f"`params` holds an adapted weight at {path}, and the model takes arrays: wrap its apply function with "
                "`lora_jax.adapt`, or fold the weights in with `lora_jax.merge_params`."
            )
    own, inserted = split_inserted(leaves, expected)
    if own.keys() != expected.keys():
        raise ArgumentError(f"`params` isn't this model's tree: {difference(own.keys(), expected.keys())}.")
    model = nnx.merge(graph, _with_layer_numbers(with_leaves({}, own) if inserted else params))
    insert(model, inserted)
    return model


def _check_inputs(
    config: ModelConfig, input_ids: Any, attention_mask: Any, token_type_ids: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    input_ids, mask, token_types = _check_tokens(
        input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
    )
    _check_length(config, input_ids.shape[1])
    return input_ids, mask, token_types


def _check_tokens(input_ids: Any, *, attention_mask: Any, **others: Any) -> tuple[Any, ...]:
    """The tokens, the mask as booleans, and others of their shape; `None` where there is none."""
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ArgumentError(
            f"`input_ids` must be (batch, time) integers, not {input_ids.dtype} of shape {input_ids.shape}."
        )
    for name, value in (("attention_mask", attention_mask), *others.items()):
        if value is not None and jnp.shape(value) != input_ids.shape:
            raise ArgumentError(f"`{name}` has shape {jnp.shape(value)}, and `input_ids` has {input_ids.shape}.")
    return (
        input_ids,
        None if attention_mask is None else jnp.asarray(attention_mask).astype(bool),
        *(None if other is None else jnp.asarray(other) for other in others.values()),
    )


def _check_length(config: ModelConfig, time: int) -> None:
    if time > config.max_length:
        raise ArgumentError(
            f"`input_ids` has {time} tokens in a row, and the model has positions for {config.max_length}: cut the "
            "texts."
        )


def _check_cache(
    config: DecoderConfig, input_ids: jax.Array, cache: Cache | int | None, dtype: jnp.dtype
) -> Cache | None:
    """The cache to fill: an empty one for a number of slots."""
    batch, time = input_ids.shape
    if cache is None:
        if config.bounded_positions:
            _check_length(config, time)
        return None
    if isinstance(cache, int):
        if isinstance(cache, bool) or cache < time:
            raise ArgumentError(f"`cache` must have a slot for each of the {time} tokens at least, not {cache!r}.")
        if config.bounded_positions and cache > config.max_length:
            raise ArgumentError(
                f"`cache` of {cache} slots, for the prompt and what is to come, is more than the model's "
                f"{config.max_length} positions."
            )
        return empty_cache(config.cache_sizes, batch=batch, slots=cache, dtype=dtype)
    if not isinstance(cache, Cache):
        raise ArgumentError(f"`cache` must be a number of slots or what apply gave before, not {type(cache).__name__}.")
    layers, heads, width = config.cache_sizes
    wanted = (layers, batch, heads, cache.slots, width)
    if cache.keys.shape != wanted or cache.values.shape != wanted or cache.mask.shape[0] != batch:
        raise ArgumentError(f"`cache` has keys of shape {cache.keys.shape}, and {wanted} is expected: another model's.")
    if not is_traced(cache.used) and int(cache.used) + time > cache.slots:
        raise ArgumentError(
            f"`cache` has {cache.slots} slots, {int(cache.used)} of them taken, and {time} more tokens come: begin "
            "with more slots."
        )
    return cache


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
