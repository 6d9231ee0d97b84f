"""Several texts in one row: where each begins, and the place of a token in its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, slots, jnp.int32(0)), axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32), slots - first
