"""`Model`: a pure apply function, its parameters, its configuration and its Hugging Face names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Concatenate, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..errors import ArgumentError, ArgumentTypeError
from ..interop.module_names import Names
from ..paths import leaves_by_path, require_key, with_leaves
from ..weights import is_adapted, is_traced
from .families.bundled import family_of
from .family import Family, Task
from .model_config import ModelConfig
from .nn.attention import AttentionForm
from .nn.cache import Cache, empty_cache
from .nn.decoder import Decoder, DecoderConfig, WithHead
from .nn.heads import Pooling
from .nn.insertion import insert, split_inserted
from .nn.layers import wide
from .nn.rematerialization import Remat

# A function that generates texts: its two positional arguments are parameters and tokens.
Apply = Callable[Concatenate[PyTree[Array], Int[ArrayLike, "batch time"], ...], Any]
Module = TypeVar("Module")


class ModelApply(Protocol):
    """A bundled model's function; `Model` lists the arguments of encoders and decoders.

    Only a decoder that is given a cache returns two values.
    """

    def __call__(
        self, params: PyTree[Array], input_ids: Int[ArrayLike, "batch time"], *args: Any, **kwargs: Any
    ) -> Any: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A bundled model.

    Attributes:
        apply: The model's pure function. An encoder's is
            `apply(params, input_ids, attention_mask=None, token_type_ids=None, *, dropout_key=None)`. The inputs are
            `(batch, time)`; `attention_mask` is 0 or false at padding. (RoBERTa counts positions from the first token
            that isn't `config.pad_token_id`, so padding on the left must be that token.) It returns hidden states
            `(batch, time, d)` in the computation's dtype, or logits `(batch, num_labels)` or values `(batch,)` in
            float32 or wider. Dropout is applied if and only if there is a `dropout_key`.

            A decoder's is `apply(params, input_ids, attention_mask=None, *, position_ids=None, segments=None,
            cache=None, last_only=False, with_head=None, dropout_key=None)`. It returns hidden states, or logits
            `(batch, time, vocabulary)` in float32 or wider; with `last_only`, only the last token's, `(batch, 1, …)`.
            Without `position_ids`, positions count every token, padding included, as transformers' models do: this
            makes no difference to rotary positions, but a GPT-2 needs `position_ids` for padding on the left. With
            `segments`, `(batch, time)` integers, each run of equal numbers in a row is a sequence of its own: a token
            attends within its run, positions restart there, and the result is the same as for one sequence a row.
            With a `cache` (initially a number of slots, see `Cache`) the tokens follow the cached ones,
            `attention_mask` covers the new tokens only, and the result is `(output, cache)`.
            `with_head(hidden, head, tied)` takes the place of the logits: it receives the hidden states
            `(batch, time, d)` and the head, `(d, vocabulary)` or, if `tied`, the table `(vocabulary, d)`, and its
            result is the output; see `lj.losses.chunked_cross_entropy`.
        params: Nested dict of arrays with string keys. With `scan_layers`, each leaf below `layers` holds all layers.
        config: Sizes and settings: a `BertConfig`, `LlamaConfig`, …, according to the kind of model.
        names: The Hugging Face module of every leaf: `encoder/layers/0/attention/query/kernel` belongs to
            `bert.encoder.layer.0.attention.self.query`. Embeddings that double as the head have both modules. With
            `scan_layers` these are the names for `unstack_layers(params)`, which `lj.interop` accepts for either form.
            `names.fan_in_fan_out` lists the modules, by their last segments, that store weights as `(in, out)`, as
            GPT-2 does.
        task: `"classification"`, `"regression"`, `"causal-lm"`, or `None` for hidden states.
        pooling: Input of the head: `"first"` or `"mean"`.
        new_head: Whether the head was drawn even though the checkpoint has one, see `load`.
    """

    apply: ModelApply
    params: dict[str, PyTree[Array]]
    config: Any  # A `ModelConfig`; which one, and so which sizes it has, is known once a folder has been read.
    names: Names
    task: Task
    pooling: Pooling
    new_head: bool = False


class Skeleton(NamedTuple):
    """A model without its parameters."""

    apply: ModelApply
    params: dict[str, PyTree[jax.ShapeDtypeStruct]]


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
    """A model's apply function and the shapes of its parameters, without allocating any.

    Equal arguments return the same function, so two loads of one model share what `jax.jit` has compiled.

    Raises:
        ValueError: The task has no head in this kind of model, or `pooling` or `scan_layers` doesn't apply to it.

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
        ValueError: See `skeleton`.
    """
    model_type = family.config.model_type
    if task not in family.architectures:
        tasks = [f'"{name}"' for name in family.architectures if name is not None]
        other = "an encoder" if family.is_decoder else "a decoder (GPT-2, Llama, …)"
        raise ArgumentError(
            f"`task` of a {model_type} must be {', '.join(tasks)} or None, got {task!r}, which needs {other}."
        )
    if family.is_decoder and pooling != "first":
        raise ArgumentError(f"`pooling` applies to encoders with a head, and a {model_type} is a decoder: omit it.")
    if scan_layers and not family.is_decoder:
        raise ArgumentError(f"`scan_layers` applies to decoders, and a {model_type} is an encoder: omit it.")


def _split(
    build: Callable[..., Module],
) -> tuple[nnx.GraphDef[Module], dict[str, PyTree[jax.ShapeDtypeStruct]], dict[str, tuple[int, ...]]]:
    """The module's structure, the shapes of its parameters as a tree, and the same shapes by leaf path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    shapes = _with_string_keys(nnx.to_pure_dict(state))
    return graph, shapes, {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()}


def _encoder(config: ModelConfig, task: Task, build: Callable[..., Callable[..., Array]]) -> Skeleton:
    graph, shapes, expected = _split(build)

    def apply(
        params: PyTree,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch ..."]:
        tokens, mask, token_types = _check_tokens(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        _check_length(config, tokens.shape[1])
        if dropout_key is not None:
            require_key(dropout_key, "dropout_key")
        model = _with_params(graph, params, expected)
        result = model(tokens, mask, token_types, dropout_key)
        if task is None:
            return result
        result = result.astype(wide(result.dtype))
        return result[:, 0] if task == "regression" else result

    return Skeleton(apply, shapes)


def _decoder(config: DecoderConfig, task: Task, dtype: jnp.dtype, build: Callable[..., Decoder]) -> Skeleton:
    graph, shapes, expected = _split(build)

    def apply(
        params: PyTree,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        position_ids: ArrayLike | None = None,
        segments: ArrayLike | None = None,
        cache: Cache | int | None = None,
        last_only: bool = False,
        with_head: WithHead | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Any:
        tokens, mask, positions, runs = _check_tokens(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, segments=segments
        )
        if runs is not None and not jnp.issubdtype(runs.dtype, jnp.integer):
            raise ArgumentError(f"`segments` must be integers, got {runs.dtype}.")
        if runs is not None and cache is not None:
            raise ArgumentError("`segments` and `cache` can't be combined: omit one of them.")
        if with_head is not None and task is None:
            raise ArgumentError('`with_head` needs a model with a head: load it with `task="causal-lm"`.')
        cache = _check_cache(config, tokens, cache, dtype)
        if dropout_key is not None:
            require_key(dropout_key, "dropout_key")
        model = _with_params(graph, params, expected)
        result, cache = model(
            tokens, mask, positions, cache, dropout_key, segments=runs, last_only=last_only, with_head=with_head
        )
        result = result if task is None or with_head is not None else result.astype(wide(result.dtype))
        return result if cache is None else (result, cache)

    return Skeleton(apply, shapes)


def _with_params(graph: nnx.GraphDef[Module], params: PyTree, expected: Mapping[str, tuple[int, ...]]) -> Module:
    """The module with these parameters, including the adapters and prefixes among them."""
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise ArgumentTypeError(
                f"`params` holds an adapted weight at {path}, and the model takes arrays: wrap its apply function with "
                "`lora_jax.adapt`, or merge the weights with `lora_jax.merge_params`."
            )
    own, inserted = split_inserted(leaves, expected)
    if own.keys() != expected.keys():
        raise ArgumentError(f"`params` isn't this model's tree: {difference(own.keys(), expected.keys())}.")
    model = nnx.merge(graph, _with_layer_numbers(with_leaves({}, own) if inserted else params))
    insert(model, inserted)
    return model


def _check_tokens(
    input_ids: ArrayLike, *, attention_mask: ArrayLike | None, **others: ArrayLike | None
) -> tuple[Array, *tuple[Array | None, ...]]:
    """The tokens, the mask as booleans, and the other arrays of that shape; `None` for each that is missing."""
    tokens = jnp.asarray(input_ids)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ArgumentError(f"`input_ids` must be (batch, time) integers, got {tokens.dtype} of shape {tokens.shape}.")
    for name, value in (("attention_mask", attention_mask), *others.items()):
        if value is not None and jnp.shape(value) != tokens.shape:
            raise ArgumentError(f"`{name}` must have the shape of `input_ids`, {tokens.shape}, got {jnp.shape(value)}.")
    return (
        tokens,
        None if attention_mask is None else jnp.asarray(attention_mask).astype(bool),
        *(None if other is None else jnp.asarray(other) for other in others.values()),
    )


def _check_length(config: ModelConfig, time: int) -> None:
    if time > config.max_length:
        raise ArgumentError(
            f"`input_ids` must have at most {config.max_length} tokens a row, the model's positions, got {time}: "
            "truncate the texts."
        )


def _check_cache(config: DecoderConfig, tokens: Array, cache: Cache | int | None, dtype: jnp.dtype) -> Cache | None:
    """The cache to fill: the given one, or an empty one with the given number of slots."""
    batch, time = tokens.shape
    if cache is None:
        if config.bounded_positions:
            _check_length(config, time)
        return None
    if isinstance(cache, int):
        if isinstance(cache, bool) or cache < time:
            raise ArgumentError(f"`cache` must have at least one slot for each of the {time} tokens, got {cache!r}.")
        if config.bounded_positions and cache > config.max_length:
            raise ArgumentError(
                f"`cache` must have at most {config.max_length} slots, the model's positions, for the prompt and new "
                f"tokens, got {cache}."
            )
        return empty_cache(config.cache_sizes, batch=batch, slots=cache, dtype=dtype)
    if not isinstance(cache, Cache):
        raise ArgumentError(f"`cache` must be a number of slots or a `Cache`, got {type(cache).__name__}.")
    layers, heads, width = config.cache_sizes
    wanted = (layers, batch, heads, cache.slots, width)
    if cache.keys.shape != wanted or cache.values.shape != wanted or cache.mask.shape[0] != batch:
        raise ArgumentError(
            f"`cache` must have keys of shape {wanted} for this model and batch, got {cache.keys.shape}."
        )
    if not is_traced(cache.used) and int(cache.used) + time > cache.slots:
        raise ArgumentError(
            f"`cache` has {cache.slots} slots, {int(cache.used)} of them used, too few for {time} more tokens: start "
            "with more slots."
        )
    return cache


def difference(found: Set[str], expected: Set[str], limit: int = 5) -> str:
    """`missing a, b; unexpected c`, with at most `limit` names in each list."""
    parts = []
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:limit])
            parts.append(f"{what} {shown}" + (f" and {len(names) - limit:,} more" if len(names) > limit else ""))
    return "; ".join(parts)


# Flax numbers the layers with integers. The public tree has string keys only, so that any tool can save it.
def _with_string_keys(tree: PyTree) -> PyTree:
    return {str(key): _with_string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _with_layer_numbers(tree: PyTree) -> PyTree:
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdecimal() else key: _with_layer_numbers(value) for key, value in tree.items()}
