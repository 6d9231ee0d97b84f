"""Attention of all bundled models: one function, written out or fused, by the platform that it is compiled for.

Shapes: `batch` sequences of `time` tokens, which attend to `slots` keys; `n` heads of queries and `m` of keys and
values, `n / m` query heads in a row to each of these; `h` features of a head.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .layers import dropout, wide

AttentionForm = Literal["auto", "xla", "cudnn", "splash"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)

# Tokens from which `"auto"` takes a fused kernel where there is one: with fewer, scores are small and XLA is as good.
# With float32 it takes more, as the fallback on a CPU computes the scores again in the backward pass.
FUSED_FROM = 128
FUSED_FROM_FLOAT32 = 512
# Queries from which the written-out form goes block by block, and those of a block.
BLOCKED_FROM = 2048
BLOCK = 512


class AttentionWarning(UserWarning):
    """The attention that was asked for can't compute this case, and another one does."""


class Scope(NamedTuple):
    """Which keys each token attends to, without an array of (time, slots).

    Attributes:
        mask: `(batch, slots)`, false at keys that are padding; `None` for none.
        segments: `(batch, time)` integers: a token attends within its own segment. All tokens ask at once, so `time`
            is `slots`. `None` for one segment.
        start: Slot of the first token that asks.
        causal: Whether a token attends to its own slot and earlier ones only.
        window: Slots, its own included, to which a token attends, where it is causal; `None` for all before it. Slots
            are counted, padding among them, as transformers does.
        windowed: Whether there is the window, of a layer that is scanned among others; `True` where there is no scan.
        prefix: Keys before those of the slots, which every token attends to.
    """

    mask: jax.Array | None = None
    segments: jax.Array | None = None
    start: jax.Array | int = 0
    causal: bool = True
    window: int | None = None
    windowed: jax.Array | bool = True
    prefix: int = 0

    def seen(self, time: int, slots: int, *, first: jax.Array | int = 0) -> jax.Array | None:
        """The whole array, or its rows for some of the queries.

        Args:
            time: Tokens that ask.
            slots: Keys, those of the prefix left out.
            first: Number of the first token that asks, of those that the scope is about.

        Returns:
            `(batch or 1, time or 1, prefix + slots)` booleans; `None` where every token attends to everything.

        Example:
            >>> Scope(window=2).seen(3, 3)[0].astype(int).tolist()
            [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        parts = []
        if self.causal:
            distance = (self.start + first + jnp.arange(time))[:, None] - jnp.arange(slots)[None, :]
            near = distance >= 0
            if self.window is not None:
                near &= (distance < self.window) | jnp.logical_not(self.windowed)
            parts.append(near[None])
        if self.segments is not None:
            whole = isinstance(first, int) and time == self.segments.shape[1]
            own = self.segments if whole else lax.dynamic_slice_in_dim(self.segments, first, time, axis=1)
            parts.append(own[:, :, None] == self.segments[:, None, :])
        if self.mask is not None:
            parts.append(self.mask[:, None, :])
        if not parts:
            return None
        seen = functools.reduce(jnp.logical_and, parts)
        return jnp.pad(seen, ((0, 0), (0, 0), (self.prefix, 0)), constant_values=True) if self.prefix else seen


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scope: Scope,
    *,
    scale: jax.Array | float,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    attention: AttentionForm = "auto",
) -> jax.Array:
    """`softmax(scale · q kᵀ) v` over the keys in scope, with dropout on the probabilities.

    `"xla"` is written out: scores of `(batch, n, time, slots)` in float32 at least; from `BLOCKED_FROM` queries on, a
    block of them at a time, whose scores the backward pass computes again. `"cudnn"` (NVIDIA GPUs) and `"splash"`
    (TPUs) are fused kernels without such an array. `"auto"` takes one of these where the program is *compiled for*
    such a platform, whatever the host has, and the case is one that the kernel takes; otherwise it is `"xla"`.

    All give the same: in float32 to 1e-5 of the largest value, in bfloat16 to 2e-2, gradients too. What tokens of
    padding give is finite and has no meaning: a kernel may let them attend to each other. Fused kernels have gradients
    and no forward mode (`jax.jvp`): that is what `"xla"` is for.

    **Deviations.** The encoders' attention was measured against `jax.nn.dot_product_attention` on two CPU cores: 20
    against 25 ms for value and gradient at 32 × 64 tokens, 12 heads of 32, float32; so it is written out there.

    Args:
        query: `(batch, n, time, h)`.
        key, value: `(batch, m, prefix + slots, h)`.
        scope: Which keys each token attends to. A token that sees nothing attends to all alike: finite, and without
            meaning.
        scale: Factor of the scores.
        rate: Rate of the dropout.
        dropout_key: `None` for no dropout.
        attention: The form.

    Returns:
        `(batch, n, time, h)`.

    Warns:
        AttentionWarning: A kernel was asked for that can't compute this case; `"xla"` does. Once for each reason.
    """
    time, slots = query.shape[2], key.shape[2] - scope.prefix
    case = Case(
        time=time,
        keys=key.shape[2],
        width=query.shape[3],
        dtype=jnp.dtype(query.dtype),
        dropout=rate > 0 and dropout_key is not None,
        cached=slots != time or not isinstance(scope.start, int) or scope.start != 0,
        prefix=scope.prefix > 0,
    )
    written_out = functools.partial(_written_out, scope=scope, scale=scale)
    if attention != "auto":
        why_not = None if attention == "xla" else UNABLE[attention](case)
        if attention == "xla" or why_not:
            if why_not:
                _say(f'attention="{attention}" {why_not}: "xla" computes it.')
            return written_out(query, key, value, rate=rate, dropout_key=dropout_key)
        return _FUSED[attention](query, key, value, scope, scale)
    able = [name for name in ("cudnn", "splash") if UNABLE[name](case) is None]
    least = FUSED_FROM if case.dtype.itemsize < 4 else FUSED_FROM_FLOAT32
    if not able or time < least:
        return written_out(query, key, value, rate=rate, dropout_key=dropout_key)
    # The derivative of all branches is taken, whichever is compiled, and JAX joins what they keep for the backward
    # pass. So none may keep scores; and positions have to look as if they hung on the queries, or JAX would take the
    # masks made of them for constants, to be computed beforehand and kept.
    branches: dict[str, Callable[..., jax.Array]] = {
        _PLATFORMS[name]: lambda *arrays, name=name: _FUSED[name](*arrays, scope, scale) for name in able
    }
    return lax.platform_dependent(query, key, value, **branches, default=functools.partial(_lean, scope, scale))


class Case(NamedTuple):
    """What decides whether a kernel can compute an attention: all of it is static."""

    time: int
    keys: int
    width: int
    dtype: np.dtype
    dropout: bool = False
    cached: bool = False
    prefix: bool = False


def _cudnn_unable(case: Case) -> str | None:
    """Why cuDNN's kernel can't compute a case; `None` if it can."""
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {case.dtype}"
    if case.dropout:
        return "has no dropout on the probabilities"
    if case.cached:
        return "has no cache of keys and values"
    if case.width % 8 or case.width > 128:
        return f"takes heads of a multiple of 8 features up to 128, not {case.width}"
    if case.time % 2 or case.keys % 2:
        return f"takes an even number of tokens, not {case.time} with {case.keys} keys"
    return cudnn_missing()


def _splash_unable(case: Case) -> str | None:
    """Why the TPU's kernel can't compute a case; `None` if it can."""
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {case.dtype}"
    if case.dropout:
        return "has no dropout on the probabilities"
    if case.cached:
        return "has no cache of keys and values"
    if case.prefix:
        return "has no prefix of keys and values"
    if case.width % 64:
        return f"takes heads of a multiple of 64 features, not {case.width}"
    if case.time % 128:
        return f"takes a multiple of 128 tokens, not {case.time}"
    if len(_mesh_axes()) > 1 and not any(_split_axes()):
        return f"knows the mesh axes {', '.join(BATCH_AXES + HEAD_AXES)}, not {', '.join(_mesh_axes())}"
    return None


UNABLE: dict[str, Callable[[Case], str | None]] = {"cudnn": _cudnn_unable, "splash": _splash_unable}
_PLATFORMS = {"cudnn": "cuda", "splash": "tpu"}


@functools.cache
def cudnn_missing() -> str | None:
    """Why JAX has no cuDNN here that could take any case; `None` if it has one.

    What is installed decides, not what the host would compute on: without cuDNN a program for a GPU can't be made.
    """
    probe = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(fused, probe, probe, probe)
    except (RuntimeError, NotImplementedError) as error:
        return f"needs cuDNN ({error})"
    return None


_said: set[str] = set()


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, AttentionWarning, stacklevel=3)


def _scores_to_values(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array | None,
    *,
    scale: jax.Array | float,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    lowest: jax.Array | float | None = None,
) -> jax.Array:
    batch, heads, time, width = query.shape
    shared = key.shape[1]
    query = query.reshape(batch, shared, heads // shared, time, width)
    scores = jnp.einsum("bmgth,bmsh->bmgts", query, key, preferred_element_type=wide(query.dtype))
    scores *= jnp.asarray(scale, scores.dtype)
    if seen is not None:
        # The smallest number rather than -inf: a row that sees nothing would become 0 / 0.
        least = jnp.finfo(scores.dtype).min if lowest is None else lowest
        scores = jnp.where(seen[:, None, None], scores, least)
    probs = dropout(jax.nn.softmax(scores).astype(value.dtype), rate, dropout_key)
    return jnp.einsum("bmgts,bmsh->bmgth", probs, value).reshape(batch, heads, time, width)


def _written_out(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scope: Scope,
    scale: jax.Array | float,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    time, slots = query.shape[2], key.shape[2] - scope.prefix
    if time < BLOCKED_FROM:
        seen = scope.seen(time, slots)
        return _scores_to_values(query, key, value, seen, scale=scale, rate=rate, dropout_key=dropout_key)
    return _blocked(query, key, value, scope=scope, scale=scale, rate=rate, dropout_key=dropout_key)


def _blocked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scope: Scope,
    scale: jax.Array | float,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`BLOCK` queries at a time; the backward pass computes their scores again."""
    batch, heads, time, width = query.shape
    slots = key.shape[2] - scope.prefix
    count = math.ceil(time / BLOCK)
    added = count * BLOCK - time
    if added:  # queries that are cut off again, and keys that none has
        query = jnp.pad(query, ((0, 0), (0, 0), (0, added), (0, 0)))
        sides = ((0, 0), (0, added))
        scope = scope._replace(
            mask=None if scope.mask is None else jnp.pad(scope.mask, sides),
            segments=None if scope.segments is None else jnp.pad(scope.segments, sides),
        )
    blocks = query.reshape(batch, heads, count, BLOCK, width).transpose(2, 0, 1, 3, 4)
    places, blocks = lax.optimization_barrier((jnp.arange(count, dtype=jnp.int32), blocks))

    def one(place: jax.Array, block: jax.Array) -> jax.Array:
        seen = scope.seen(BLOCK, slots + added, first=place * BLOCK)
        seen = None if seen is None else seen[..., : key.shape[2]]
        own_key = None if dropout_key is None else jax.random.fold_in(dropout_key, place)
        return _scores_to_values(block, key, value, seen, scale=scale, rate=rate, dropout_key=own_key)

    policy = jax.checkpoint_policies.nothing_saveable
    run = jax.checkpoint(one, policy=policy, prevent_cse=False)
    results = lax.scan(lambda _, part: (None, run(*part)), None, (places, blocks))[1]
    return results.transpose(1, 2, 0, 3, 4).reshape(batch, heads, count * BLOCK, width)[:, :, :time]


def _lean(scope: Scope, scale: jax.Array | float, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Written out, and nothing kept for the backward pass but the arguments."""
    if query.shape[2] >= BLOCKED_FROM:
        return _blocked(query, key, value, scope=scope, scale=scale)
    time, slots = query.shape[2], key.shape[2] - scope.prefix
    dtype = wide(query.dtype)
    lowest = jnp.asarray(jnp.finfo(dtype).min, dtype)
    first, lowest, query = lax.optimization_barrier((jnp.int32(0), lowest, query))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def run(first: jax.Array, lowest: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        seen = scope.seen(time, slots, first=first)
        return _scores_to_values(query, key, value, seen, scale=scale, lowest=lowest)

    return run(first, lowest, query, key, value)


def _by_window(scope: Scope, run: Callable[[Scope], Callable[..., jax.Array]], *arrays: jax.Array) -> jax.Array:
    """`run(scope)(*arrays)` where the scope's window is there for certain, or isn't: a scanned layer asks which."""
    if scope.window is None or isinstance(scope.windowed, bool | np.bool):
        return run(scope if scope.windowed else scope._replace(window=None))(*arrays)
    always, never = scope._replace(windowed=True), scope._replace(window=None)
    return lax.cond(scope.windowed, run(always), run(never), *arrays)


def _in_queries(query: jax.Array, scale: jax.Array | float) -> tuple[jax.Array, float]:
    """The queries and what is left of the scale: kernels take numbers only."""
    if isinstance(scale, int | float):
        return query, float(scale)
    return (query.astype(wide(query.dtype)) * scale).astype(query.dtype), 1.0


def _of_tokens(scope: Scope) -> jax.Array | None:
    """`(batch, time)`: the segments, padding being one of its own; `None` for one without padding."""
    if scope.mask is None:
        return scope.segments
    own = jnp.int32(0) if scope.segments is None else scope.segments.astype(jnp.int32)
    return jnp.where(scope.mask, own, jnp.int32(-1))


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, scope: Scope, scale: jax.Array | float) -> jax.Array:
    query, scale = _in_queries(query, scale)
    time, keys = query.shape[2], key.shape[2]

    def run(scope: Scope) -> Callable[..., jax.Array]:
        def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            arrays = (array.transpose(0, 2, 1, 3) for array in (query, key, value))
            settings: dict[str, Any] = {"scale": scale, "implementation": "cudnn"}
            plain = scope.prefix == 0 and scope.mask is None and scope.segments is None
            if plain and scope.causal:
                settings["is_causal"] = True
                if scope.window is not None and scope.window < time:
                    settings["local_window_size"] = (scope.window - 1, 0)
            elif not plain or scope.window is not None:
                # One for all heads. Said to be causal besides, the kernel skips what lies above the diagonal.
                seen = scope.seen(time, keys - scope.prefix)
                assert seen is not None
                settings["mask"] = jnp.broadcast_to(seen, (query.shape[0], time, keys))[:, None]
                settings["is_causal"] = scope.causal and scope.prefix == 0
            return jax.nn.dot_product_attention(*arrays, **settings).transpose(0, 2, 1, 3)

        return fused

    return _by_window(scope, run, query, key, value)


# Names of mesh axes over which examples and heads lie.
BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)


def _mesh_axes() -> dict[str, int]:
    """The axes of the mesh that the program is made for (`jax.set_mesh`), those of one device left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if size > 1} if mesh is not None else {}


def _split_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    axes = _mesh_axes()
    return tuple(name for name in BATCH_AXES if name in axes), tuple(name for name in HEAD_AXES if name in axes)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, scope: Scope, scale: jax.Array | float) -> jax.Array:
    dtype = query.dtype
    query = (query.astype(wide(dtype)) * scale).astype(dtype)  # the kernel has no scale
    segments = _of_tokens(scope)
    rows = jnp.zeros(query.shape[::2], jnp.int32) if segments is None else segments.astype(jnp.int32)

    def run(scope: Scope) -> Callable[..., jax.Array]:
        def fused(query: jax.Array, key: jax.Array, value: jax.Array, rows: jax.Array) -> jax.Array:
            window = scope.window if scope.causal else None
            kernel, ids = _splash_kernel(query.shape[1], query.shape[2], scope.causal, window)
            return jax.vmap(lambda q, k, v, row: kernel(q, k, v, segment_ids=ids(row, row)))(query, key, value, rows)

        return fused

    def everywhere(query: jax.Array, key: jax.Array, value: jax.Array, rows: jax.Array) -> jax.Array:
        return _by_window(scope, run, query, key, value, rows)

    if not _mesh_axes():
        return everywhere(query, key, value, rows)
    batch, heads = _split_axes()
    arrays, of_rows = jax.P(batch or None, heads or None), jax.P(batch or None)
    # A kernel is one device's: each takes its examples and heads.
    split = jax.shard_map(everywhere, in_specs=(arrays, arrays, arrays, of_rows), out_specs=arrays, check_vma=False)
    return split(query, key, value, rows)


def _splash_kernel(heads: int, time: int, causal: bool, window: int | None) -> tuple[Any, Any]:
    """The kernel for one example, and the class of its segments. Pallas takes a while to import: on first use."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    if not causal:
        mask = splash_attention_mask.FullMask((time, time))
    elif window is None or window >= time:
        mask = splash_attention_mask.CausalMask((time, time))
    else:
        mask = splash_attention_mask.LocalMask((time, time), window_size=(window - 1, 0), offset=0)
    block = next(size for size in (512, 256, 128) if time % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, block_sizes=sizes
    )
    return kernel, splash_attention_kernel.SegmentIds


_FUSED: dict[str, Callable[..., jax.Array]] = {"cudnn": _cudnn, "splash": _splash}
