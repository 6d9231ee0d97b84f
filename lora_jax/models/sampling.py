"""Which tokens may come next: what sampling and searching leave out of the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def keep_probable(logits: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits `(batch, vocabulary)` with `-∞` for the tokens that `top_k`, then `top_p` leave out.

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
        # From the least probable on: what sums to no more than 1 - p goes.
        order = jnp.argsort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1)
        dropped = (below <= 1 - top_p).at[:, -1].set(False)
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(jnp.zeros_like(dropped).at[rows, order].set(dropped), -jnp.inf, logits)
    return logits


def forbid_repeats(
    scores: jax.Array, tokens: jax.Array, known: jax.Array, count: jax.Array | int, *, size: int
) -> jax.Array:
    """Scores with `-∞` for the tokens that would repeat a run of `size` tokens that a row has had.

    Args:
        scores: `(rows, vocabulary)`, of the next token.
        tokens: `(rows, slots)`: prompts, and what was added to them.
        known: `(rows, slots)` booleans, false at padding on the left.
        count: how many of the slots are taken.
        size: of the run; 1 lets no token come twice.

    Example:
        >>> scores, tokens = jnp.zeros((1, 5)), jnp.array([[1, 2, 3, 1, 2, 0]])
        >>> forbid_repeats(scores, tokens, tokens > -1, 5, size=3).tolist()
        [[0.0, 0.0, 0.0, -inf, 0.0]]
    """
    rows, slots = tokens.shape
    before = size - 1
    places = jnp.arange(slots - before)
    # The last `size - 1` tokens, and whether they are all there.
    start = jnp.maximum(count - before, 0)
    last = jax.lax.dynamic_slice_in_dim(tokens, start, before, axis=1)
    complete = (count >= before) & jax.lax.dynamic_slice_in_dim(known, start, before, axis=1).all(axis=1)
    same = known[:, : slots - before] & (places + before < count) & complete[:, None]
    for place in range(before):
        same &= tokens[:, place : place + slots - before] == last[:, place, None]
    following = jnp.where(same, tokens[:, before:], scores.shape[1])  # outside the vocabulary: dropped
    return scores.at[jnp.arange(rows)[:, None], following].set(-jnp.inf, mode="drop")
