"""The matmul with an adapted weight, `x W + scale · (x Aᵀ) B`: its strategies, and which is fast when."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Inexact

from .types import DTypeLike, Leaf

Strategy = Literal["low_rank_first", "merged_weight"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def choose_strategy(tokens: int, inner: int, outer: int, *, dtype: DTypeLike, backend: str) -> Strategy:
    """The strategy for one matmul of `(tokens, inner)` with an adapted weight of `(inner, outer)`, by what is static.

    - `"low_rank_first"` adds the low-rank path to the base's product: six thin products a step, forward and backward.
    - `"merged_weight"` multiplies with `W + scale · Aᵀ B`, formed for the moment in the forward pass and again in the
      backward pass, and has thin products for the factors' gradients alone: four a step, and no second pass over
      outputs to add to.

    Merging twice costs `4 · r · inner · outer` operations and saves `2 · r · tokens · (inner + outer)`. So it takes
    `tokens ≥ 2 · inner · outer / (inner + outer)`, whatever the rank. `scripts/bench/matmul.py` measures both sides
    of that line.

    Merging is right where products are exact to float32 only: below, a small update is lost when it is added to the
    weight. That leaves float32 on CPUs; other backends round float32 operands of a product by default.

    Args:
        tokens: Number of rows of activations that meet the weight, over all token axes.
        inner: Number of contracted elements, over all axes.
        outer: Number of output elements, over all axes.
        dtype: Dtype of the base where it is used, and of the activations.
        backend: `jax.default_backend()`.

    Example:
        >>> choose_strategy(2048, 384, 384, dtype="float32", backend="cpu")
        'merged_weight'
        >>> choose_strategy(1, 384, 384, dtype="float32", backend="cpu")
        'low_rank_first'
    """
    pays = tokens * (inner + outer) >= 2 * inner * outer
    return "merged_weight" if pays and jnp.dtype(dtype) == jnp.float32 and backend == "cpu" else "low_rank_first"


def low_rank_matmul(
    x: Inexact[Array, "*batch tokens k"],
    reduce: Inexact[Array, "*batch r k"],
    expand: Inexact[Array, "*batch r n"],
    *,
    scale: jax.typing.ArrayLike,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "*batch tokens n"]:
    """The low-rank path `y = scale · (x · reduceᵀ) · expand`.

    Shapes: `x (tokens, k)`, `reduce (r, k)`, `expand (r, n)` give `(tokens, n)`; or all with one leading batch axis.

    The reduced activations are formed transposed, `hᵀ = reduce · xᵀ` of shape `(r, tokens)`. The value is the same;
    what changes is what differentiation makes of it. On XLA's CPU backend a product with a thin *result* is fast as
    `(r, tokens) · (tokens, k)` and up to seventeen times slower as `(k, tokens) · (tokens, r)`; with `reduce` as the
    left operand, transposing the product gives the first form for its gradient. Tokens come flattened into one axis
    for the same reason: a gradient contracted over two token axes is slow. Both are plain `dot_general`s, so every
    JAX transformation works on them, and `jax.checkpoint` policies see them.

    Args:
        x: Activations.
        reduce: The factor that is contracted with `x`.
        expand: The factor that leads to the output.
        scale: Factor of the reduced activations, the smallest array on the way.
        precision: See `lax.dot_general`.

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


# Up to this rank a sum of outer products beats a matmul (`scripts/bench/merge.py`).
_OUTER_PRODUCTS = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def low_rank_product(
    a: Inexact[Array, "*stack_r_inner"], b: Inexact[Array, "*stack_r_outer"], stack: int
) -> Inexact[Array, "*stack_inner_outer"]:
    """`aᵀ b` of two thin factors, one for each member of the leading `stack` axes: what is added to a weight.

    Up to rank 8 it is written as `Σₖ aₖ ⊗ bₖ`, elementwise, which XLA fuses into the sum with the weight: one pass over
    the weight, as a copy makes, and no second `inner × outer` array. A matmul writes such an array first, and with so
    thin operands it waits for memory all the same. Derivatives are those of the matmul.

    Args:
        a: `(stack…, r, inner…)`.
        b: `(stack…, r, outer…)`.
        stack: Number of stack axes.

    Returns:
        `(stack…, inner…, outer…)`.

    Example:
        >>> low_rank_product(jnp.ones((2, 3)), jnp.ones((2, 4)), 0).tolist() == jnp.full((3, 4), 2.0).tolist()
        True
    """
    if a.shape[stack] > _OUTER_PRODUCTS:
        return _product(a, b, stack)
    lead, inner, outer = a.shape[:stack], a.shape[stack + 1 :], b.shape[stack + 1 :]

    def outer_product(k: int) -> jax.Array:
        left = lax.index_in_dim(a, k, stack, keepdims=False).reshape(*lead, *inner, *(1 for _ in outer))
        right = lax.index_in_dim(b, k, stack, keepdims=False).reshape(*lead, *(1 for _ in inner), *outer)
        return left * right

    return functools.reduce(jnp.add, map(outer_product, range(a.shape[stack])))


@low_rank_product.defjvp
def _(stack: int, primals: Sequence[Leaf], tangents: Sequence[Leaf]) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    return low_rank_product(a, b, stack), _product(da, b, stack) + _product(a, db, stack)


def _product(a: jax.Array, b: jax.Array, stack: int) -> jax.Array:
    batch = tuple(range(stack))
    return lax.dot_general(a, b, (((stack,), (stack,)), (batch, batch)), precision=lax.Precision.HIGHEST)


def _apart(array: jax.Array) -> jax.Array:
    """The same bits, which the compiler takes for others: it finds no equal sum, and fuses no sum into a matmul.

    XLA's CPU backend drops optimization barriers early. Rounding to the precision that the array has changes nothing,
    and stays.
    """
    kind = jnp.finfo(array.dtype)
    return lax.reduce_precision(array, kind.nexp, kind.nmant)


def merged_matmul(
    x: jax.Array,
    base: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    run: Callable[[jax.Array, jax.Array], jax.Array],
    merge: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    low_rank: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`run(merge(base, a, b), x)` whose derivatives by `a` and `b` are those of the low-rank path.

    Plain differentiation would form the gradient of the merged weight, `inner × outer` over all tokens, as full
    fine-tuning does, and take those of the factors from it. Here

        dy = run(M, dx) + run(dW, x) + low_rank(x, da, b) + low_rank(x, a, db),    M = merge(W, a, b)

    term by term where the tangent is not zero by construction: a frozen `W` has no `dW`, and none is computed. `M` is
    formed again where `dx` is transposed, so that no merged weight waits from the forward to the backward pass: that
    would be a merged copy of every adapted weight.

    It is a `custom_jvp` of ordinary operations: forward and reverse mode, `vmap`, higher derivatives, `checkpoint`
    policies and `shard_map` work as without it.

    Args:
        x, base, a, b: The activations, the weight and its factors, in any layout.
        run: The product with a weight in the base's place; linear in both.
        merge: Computes the merged weight.
        low_rank: The low-rank path of the product; linear in each argument.
    """

    def merged_product(base: jax.Array, a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
        return run(_apart(merge(base, a, b)), x)

    def merged_again(base: jax.Array, a: jax.Array, b: jax.Array, dx: jax.Array) -> jax.Array:
        # The compiler would find two equal sums, and keep the first.
        return merged_product(base, a, _apart(b), dx)

    product = jax.custom_jvp(merged_product)

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Sequence[Leaf], tangents: Sequence[Leaf]) -> tuple[jax.Array, jax.Array]:
        base, a, b, x = primals
        terms: list[Callable[..., jax.Array]] = [
            lambda dbase, da, db, dx: run(dbase, x),
            lambda dbase, da, db, dx: low_rank(x, da, b),
            lambda dbase, da, db, dx: low_rank(x, a, db),
            lambda dbase, da, db, dx: jax.checkpoint(merged_again)(base, a, b, dx),
        ]
        y = merged_product(base, a, b, x)
        present = [
            term(*tangents)
            for term, tangent in zip(terms, tangents, strict=True)
            if not isinstance(tangent, SymbolicZero)
        ]
        return y, functools.reduce(jnp.add, present) if present else jnp.zeros_like(y)

    return product(base, a, b, x)
