"""Attention to what came before: the mask, and the product in which several query heads share one of the keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .layers import dropout, wide


def visible(
    mask: jax.Array | None,
    time: int,
    *,
    start: jax.Array | int = 0,
    slots: int,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Which slots each of `time` tokens attends to: its own and earlier ones, without padding.

    Args:
        mask: `(batch, slots)`, false at padding; `None` for none.
        time: how many tokens ask.
        start: the slot of the first of them.
        slots: how many there are.
        window: to how many slots, its own included, a token attends; `None` for all before it. Slots are counted,
            padding among them, as transformers does.
        segments: `(batch, slots)` integers: a token attends within its own segment only. All tokens ask at once, so
            `time` is `slots`. `None` for one segment.

    Returns:
        `(batch, time, slots)` booleans, or `(1, time, slots)` without a mask and segments.

    Example:
        >>> visible(None, 3, slots=3, window=2)[0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = (start + jnp.arange(time))[:, None] - jnp.arange(slots)[None, :]
    seen = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return seen if mask is None else seen & mask[:, None, :]


def runs(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The segments of packed rows: each run of equal numbers is one, wherever the number occurs again.

    Args:
        segments: `(batch, time)` integers.

    Returns:
        The number of the run that each token is in, and its place there, both counted from 0; `(batch, time)` int32.

    Example:
        >>> number, place = runs(jnp.array([[7, 7, 7, 2, 2, 7]]))
        >>> number.tolist(), place.tolist()
        ([[0, 0, 0, 1, 1, 2]], [[0, 1, 2, 0, 1, 0]])
    """
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, slots, jnp.int32(0)), axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32), slots - first


def attend_visible(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    *,
    scale: jax.Array | float,
    rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """`softmax(scale · q kᵀ) v` over the slots that are seen, with dropout on the probabilities.

    Args:
        query: `(batch, n, time, h)`.
        key, value: `(batch, m, slots, h)`; `n / m` query heads in a row share a key head.
        seen: `(batch or 1, time, slots)`. A token that sees nothing attends to all alike: finite, and without meaning.
        scale: of the scores.
        rate: of the dropout.
        dropout_key: `None` for none.

    Returns:
        `(batch, n, time, h)`.
    """
    batch, heads, time, width = query.shape
    shared = key.shape[1]
    query = query.reshape(batch, shared, heads // shared, time, width)
    scores = jnp.einsum("bmgth,bmsh->bmgts", query, key, preferred_element_type=wide(query.dtype))
    scores *= jnp.asarray(scale, scores.dtype)
    # The smallest number rather than -inf: a row that sees nothing would become 0 / 0.
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
    probs = dropout(jax.nn.softmax(scores).astype(value.dtype), rate, dropout_key)
    return jnp.einsum("bmgts,bmsh->bmgth", probs, value).reshape(batch, heads, time, width)
