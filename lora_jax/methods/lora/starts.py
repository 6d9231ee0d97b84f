"""Initial values of low-rank factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, Float

from lora_jax.weights import IN, OUT, STACK

from ..weight_method import TargetWeight

STARTS = ("gaussian", "kaiming", "pissa", "orthogonal")
# Starts whose product isn't zero: the node keeps them beside the factors and subtracts their product.
FROM_WEIGHT = ("pissa", "orthogonal")

# Settings of the subspace iteration. Its error falls with the ratio of the singular values on the two sides of the cut,
# to the power 2 · steps + 1; vectors beyond the rank make that ratio smaller.
_STEPS, _OVERSAMPLING = 16, 8


def start(init: str, key: jax.Array, target: TargetWeight, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """`a (stack…, r, in…)` and `b (stack…, r, out…)` of a weight's low-rank path, float32."""
    stack, inner, outer = (target.sizes(label) for label in (STACK, IN, OUT))
    shapes = (*stack, rank, *inner), (*stack, rank, *outer)
    if init in FROM_WEIGHT:
        order = [axis for label in (STACK, IN, OUT) for axis, own in enumerate(target.axes) if own == label]
        matrix = lax.transpose(target.base, order).reshape(*stack, target.size(IN), target.size(OUT))
        matrix = matrix.astype(jnp.float32)
        a, b = pissa(matrix, rank, scale, key) if init == "pissa" else orthogonal(matrix, rank)
        return a.reshape(shapes[0]), b.reshape(shapes[1])
    if init == "gaussian":
        a = jax.random.normal(key, shapes[0], jnp.float32) / float(rank)
    else:
        a = jax.random.uniform(key, shapes[0], jnp.float32, -1.0, 1.0) / math.sqrt(target.size(IN))
    return a, jnp.zeros(shapes[1], jnp.float32)


def placed_start(
    init: str, key: jax.Array, target: TargetWeight, rank: int, scale: float, shardings: tuple[Sharding, Sharding]
) -> tuple[jax.Array, jax.Array]:
    """As `start`, with a sharding for each factor."""
    weight, scale = (
        (target.base, scale) if init in FROM_WEIGHT else (None, 1.0)
    )  # values that aren't used must not cause another compilation
    shape = tuple(target.base.shape)
    return _compiled_start(shardings)(key, weight, init=init, shape=shape, axes=target.axes, rank=rank, scale=scale)


@functools.lru_cache
def _compiled_start(shardings: tuple[Sharding, Sharding]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One function per pair of shardings: targets of equal shapes share its compiled program."""

    @functools.partial(jax.jit, static_argnames=("init", "shape", "axes", "rank", "scale"), out_shardings=shardings)
    def draw(
        key: jax.Array, weight: jax.Array | None, init: str, shape: tuple[int, ...], axes: str, rank: int, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        base = jnp.zeros(shape, jnp.float32) if weight is None else weight  # of the zeros, only the shape is used
        return start(init, key, TargetWeight("", base, axes), rank, scale)

    return draw


@functools.partial(jax.jit, static_argnames=("rank", "scale"))
def pissa(
    matrix: Float[Array, "*stack inner outer"], rank: int, scale: float, key: jax.Array
) -> tuple[Float[Array, "*stack r inner"], Float[Array, "*stack r outer"]]:
    """The principal part of a weight: with `W = U S Vᵀ`, `a = √(S/scale) Uᵀ` and `b = √(S/scale) Vᵀ`, the first `r`.

    So `scale · aᵀ b` is the best approximation of rank `r` to `W`. The singular vectors come from a randomized subspace
    iteration of 16 steps with 8 extra vectors.

    Args:
        matrix: `W (…, in, out)`, float32.
        rank: `r`.
        scale: Scale of the low-rank path.
        key: Random key of the iteration's first subspace.

    Returns:
        `a (…, r, in)` and `b (…, r, out)`.

    Example:
        >>> weight = jnp.outer(jnp.arange(4.0), jnp.array([1.0, 2.0, 2.0]))
        >>> a, b = pissa(weight, 1, 2.0, jax.random.key(0))
        >>> bool(jnp.allclose(2.0 * a.T @ b, weight, atol=1e-5))
        True

    Reference:
        Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        NeurIPS 2024, arXiv:2404.02948, equations 2 and 3; section 3 has the fast decomposition, which is that of Halko,
        Martinsson, Tropp, "Finding Structure with Randomness", 2011, algorithm 4.4.

    Deviations:
        The division by `scale` is PEFT's: the paper's own scale is 1.
    """
    *stack, inner, outer = matrix.shape
    width = min(rank + _OVERSAMPLING, inner, outer)
    transposed = jnp.swapaxes(matrix, -1, -2)

    def step(_: int, right: jax.Array) -> jax.Array:
        return _orthonormal(_product(transposed, _orthonormal(_product(matrix, right))))

    right = lax.fori_loop(0, _STEPS, step, jax.random.normal(key, (*stack, outer, width), jnp.float32))
    left = _orthonormal(_product(matrix, right))
    small, sizes, b = jnp.linalg.svd(_product(jnp.swapaxes(left, -1, -2), matrix), full_matrices=False)
    a = jnp.swapaxes(_product(left, small), -1, -2)
    root = jnp.sqrt(sizes / scale)[..., :rank, None]
    return root * a[..., :rank, :], root * b[..., :rank, :]


@functools.partial(jax.jit, static_argnames="rank")
def orthogonal(
    matrix: Float[Array, "*stack inner outer"], rank: int
) -> tuple[Float[Array, "*stack r inner"], Float[Array, "*stack r outer"]]:
    """The first `r` columns of `Q` and rows of `R` of `Wᵀ = Q R`: `b = Qᵀ` has orthonormal rows, `a = R`.

    Args:
        matrix: `W (…, in, out)`, float32.
        rank: `r`.

    Returns:
        `a (…, r, in)` and `b (…, r, out)`.

    Example:
        >>> a, b = orthogonal(jnp.array([[3.0, 4.0], [1.0, 1.0]]), 1)
        >>> bool(jnp.allclose(b @ b.T, 1.0)), bool(jnp.allclose(jnp.abs(b), jnp.array([[0.6, 0.8]])))
        (True, True)

    Reference:
        Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, arXiv:2406.01775,
        section 3.2 and algorithm 1. PEFT calls this start `olora`; its `orthogonal` is another.
    """
    # The first columns of `Q` depend on the first columns of `Wᵀ` alone.
    q = _orthonormal(jnp.swapaxes(matrix[..., :rank, :], -1, -2))
    return _product(jnp.swapaxes(q, -1, -2), jnp.swapaxes(matrix, -1, -2)), jnp.swapaxes(q, -1, -2)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _orthonormal(columns: jax.Array) -> jax.Array:
    return jnp.linalg.qr(columns)[0]
