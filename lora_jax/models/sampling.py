"""Filters on the logits of the next token: `top_k`, `top_p` and repeated n-grams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def keep_probable(
    logits: Float[Array, "batch vocabulary"], *, top_k: int | None, top_p: float | None
) -> Float[Array, "batch vocabulary"]:
    """Logits with `-∞` for the tokens that `top_k` and then `top_p` exclude.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.2, 0.3]]))
        >>> jnp.isfinite(keep_probable(logits, top_k=2, top_p=None)).tolist()
        [[True, False, True]]
        >>> jnp.isfinite(keep_probable(logits, top_k=None, top_p=0.4)).tolist()
        [[True, False, False]]
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        # Starting from the least probable token, drop those whose probabilities sum to at most 1 - p.
        order = jnp.argsort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1)
        dropped = (below <= 1 - top_p).at[:, -1].set(False)
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(jnp.zeros_like(dropped).at[rows, order].set(dropped), -jnp.inf, logits)
    return logits


def forbid_repeats(
    scores: Float[Array, "rows vocabulary"],
    tokens: Int[Array, "rows slots"],
    known: Bool[Array, "rows slots"],
    count: Int[Array, ""] | int,
    *,
    size: int,
) -> Float[Array, "rows vocabulary"]:
    """Scores with `-∞` for the tokens that would repeat an n-gram that the sequence already has.

    Args:
        scores: Scores of the next token.
        tokens: Prompts and the tokens generated so far.
        known: False at the padding on the left.
        count: Number of slots in use.
        size: Length of the n-grams; with 1, no token occurs twice.

    Example:
        >>> scores, tokens = jnp.zeros((1, 5)), jnp.array([[1, 2, 3, 1, 2, 0]])
        >>> forbid_repeats(scores, tokens, tokens > -1, 5, size=3).tolist()
        [[0.0, 0.0, 0.0, -inf, 0.0]]
    """
    rows, slots = tokens.shape
    before = size - 1
    starts = jnp.arange(slots - before)
    # The last `size - 1` tokens, and whether there are that many.
    start = jnp.maximum(count - before, 0)
    last = jax.lax.dynamic_slice_in_dim(tokens, start, before, axis=1)
    complete = (count >= before) & jax.lax.dynamic_slice_in_dim(known, start, before, axis=1).all(axis=1)
    same = known[:, : slots - before] & (starts + before < count)[None] & complete[:, None]
    for offset in range(before):
        same &= tokens[:, offset : offset + slots - before] == last[:, offset, None]
    following = jnp.where(same, tokens[:, before:], scores.shape[1])  # an index outside the vocabulary is dropped
    return scores.at[jnp.arange(rows)[:, None], following].set(-jnp.inf, mode="drop")
