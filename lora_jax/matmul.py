"""The low-rank matmul: `scale · (x Aᵀ) B`, in the operand order that stays fast when it is differentiated."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def low_rank_matmul(
    x: jax.Array, reduce: jax.Array, expand: jax.Array, *, scale: float, precision: Any = None
) -> jax.Array:
    """The low-rank path `y = scale · (x · reduceᵀ) · expand`.

    Shapes: `x (tokens, k)`, `reduce (r, k)`, `expand (r, n)` give `(tokens, n)`; or all with one leading batch axis.

    The reduced activations are formed transposed, `hᵀ = reduce · xᵀ` of shape `(r, tokens)`. The value is the same;
    what changes is what differentiation makes of it. On XLA's CPU backend a product with a thin *result* is fast as
    `(r, tokens) · (tokens, k)` and up to seventeen times slower as `(k, tokens) · (tokens, r)`; with `reduce` as the
    left operand, transposing the product gives the first form for its gradient. Tokens come flattened into one axis
    for the same reason: a gradient contracted over two token axes is slow. Both are plain `dot_general`s, so every
    JAX transformation works on them, and `jax.checkpoint` policies see them.

    Args:
        x: activations.
        reduce: the factor that is contracted with `x`.
        expand: the factor that leads to the output.
        scale: applied to the reduced activations, the smallest array on the way.
        precision: as for `lax.dot_general`.

    Returns:
        The low-rank path's output, in `x`'s dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> x, a, b = jnp.ones((5, 3)), jnp.ones((2, 3)), jnp.ones((2, 4))
        >>> bool(jnp.allclose(low_rank_matmul(x, a, b, scale=0.5), 0.5 * (x @ a.T) @ b))
        True
    """
    batch = tuple(range(x.ndim - 2))
    last, rank = x.ndim - 1, x.ndim - 2
    hidden = lax.dot_general(reduce, x, (((last,), (last,)), (batch, batch)), precision=precision)
    return lax.dot_general(hidden * scale, expand, (((rank,), (rank,)), (batch, batch)), precision=precision)
