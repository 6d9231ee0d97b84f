"""The strategies of the matmul against their formulas and the derivatives written by hand, in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.matmul import choose_strategy, low_rank_matmul, merged_matmul

from .jaxprs import equations

SCALE = 1.5


class Arrays(NamedTuple):
    x: np.ndarray
    reduce: np.ndarray
    expand: np.ndarray
    dx: np.ndarray
    dreduce: np.ndarray
    dexpand: np.ndarray
    dy: np.ndarray


@pytest.fixture(params=[(), (3,), (2, 3)], ids=["plain", "batch", "two batch axes"])
def arrays(request: pytest.FixtureRequest) -> Arrays:
    rng, batch = np.random.default_rng(0), request.param
    shapes = [(7, 6), (2, 6), (2, 5), (7, 6), (2, 6), (2, 5), (7, 5)]
    return Arrays(*(rng.normal(size=(*batch, *shape)) for shape in shapes))


def t(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def low_rank(x: Any, reduce: Any, expand: Any) -> jax.Array:
    return low_rank_matmul(x, reduce, expand, scale=SCALE)


def primals(arrays: Arrays) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays[:3])


def tangents(arrays: Arrays) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays[3:6])


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def forward(arrays: Arrays) -> np.ndarray:
    """`y = s · x aᵀ b`."""
    return SCALE * (arrays.x @ t(arrays.reduce)) @ arrays.expand


def directional(arrays: Arrays) -> np.ndarray:
    """`dy = s · (dx aᵀ b + x daᵀ b + x aᵀ db)`."""
    x, a, b, dx, da, db, _ = arrays
    return SCALE * (dx @ t(a) @ b + x @ t(da) @ b + x @ t(a) @ db)


def cotangents(arrays: Arrays) -> tuple[np.ndarray, ...]:
    """`x̄ = s · ȳ bᵀ a`, `ā = s · b ȳᵀ x`, `b̄ = s · a xᵀ ȳ`."""
    x, a, b, _, _, _, dy = arrays
    return SCALE * dy @ t(b) @ a, SCALE * b @ t(dy) @ x, SCALE * a @ t(x) @ dy


def test_value(arrays: Arrays) -> None:
    assert_close([low_rank(*primals(arrays))], [forward(arrays)])


def test_forward_mode(arrays: Arrays) -> None:
    value, tangent = jax.jvp(low_rank, primals(arrays), tangents(arrays))
    assert_close([value, tangent], [forward(arrays), directional(arrays)])


def test_linearize(arrays: Arrays) -> None:
    _, linear = jax.linearize(low_rank, *primals(arrays))
    assert_close([linear(*tangents(arrays))], [directional(arrays)])


def test_reverse_mode(arrays: Arrays) -> None:
    _, backward = jax.vjp(low_rank, *primals(arrays))
    assert_close(backward(jnp.asarray(arrays.dy, jnp.float32)), cotangents(arrays))


def test_hessian_vector_product(arrays: Arrays) -> None:
    """Of `⟨ȳ, y⟩`: the derivative of the cotangents along the tangents."""
    x, a, b, dx, da, db, dy = arrays

    def inner(*primals: jax.Array) -> jax.Array:
        return jnp.vdot(low_rank(*primals), jnp.asarray(dy, jnp.float32))

    _, products = jax.jvp(jax.grad(inner, argnums=(0, 1, 2)), primals(arrays), tangents(arrays))
    expected = (
        SCALE * (dy @ t(db) @ a + dy @ t(b) @ da),
        SCALE * (db @ t(dy) @ x + b @ t(dy) @ dx),
        SCALE * (da @ t(x) @ dy + a @ t(dx) @ dy),
    )
    assert_close(products, expected)


def test_vmap(arrays: Arrays) -> None:
    many = [jnp.stack([array, -2 * array]) for array in primals(arrays)]
    assert_close(jax.vmap(low_rank)(*many), [forward(arrays), -8 * forward(arrays)])


def test_finite_differences(arrays: Arrays) -> None:
    """The gradient of every argument, against a central difference of the NumPy formula in float64."""
    gradients = jax.grad(lambda *p: jnp.vdot(low_rank(*p), jnp.asarray(arrays.dy, jnp.float32)), argnums=(0, 1, 2))
    step = 1e-4
    for place, gradient in enumerate(gradients(*primals(arrays))):
        way = arrays[3 + place]
        moved = [
            forward(arrays._replace(**{Arrays._fields[place]: arrays[place] + sign * step * way})) for sign in (1, -1)
        ]
        slope = np.vdot(moved[0] - moved[1], arrays.dy) / (2 * step)
        np.testing.assert_allclose(np.vdot(gradient, way), slope, rtol=1e-4)


def test_dtype_is_that_of_the_operands() -> None:
    x, a, b = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16), jnp.ones((2, 5), jnp.bfloat16)
    assert low_rank_matmul(x, a, b, scale=0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("precision", [lax.Precision.HIGH, lax.Precision.HIGHEST])
def test_precision_reaches_both_products(precision: Any) -> None:
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(lambda x, a, b: low_rank_matmul(x, a, b, scale=2.0, precision=precision))(
            jnp.ones((3, 4)), jnp.ones((2, 4)), jnp.ones((2, 5))
        )
    dots = [eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert dots == [precision and (precision, precision)] * 2


# The merged weight: y = x (W + s · Aᵀ B), with the base among the arguments.


class Merged(NamedTuple):
    """Operands of a merged product, or a direction for each."""

    w: Any
    a: Any
    b: Any
    x: Any


def draws(seed: int) -> Merged:
    rng = np.random.default_rng(seed)
    return Merged(*(rng.normal(size=shape) for shape in [(6, 5), (2, 6), (2, 5), (7, 6)]))


def merge(w: Any, a: Any, b: Any) -> Any:
    return w + SCALE * t(a) @ b


def as_float32(operands: Merged) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in operands)


def merged(w: Any, a: Any, b: Any, x: Any) -> jax.Array:
    return merged_matmul(
        x,
        w,
        a,
        b,
        run=lambda weight, x: x @ weight,
        merge=lambda w, a, b: w + SCALE * a.T @ b,
        low_rank=lambda x, a, b: low_rank_matmul(x, a, b, scale=SCALE),
    )


def merged_directional(at: Merged, along: Merged) -> np.ndarray:
    """`dy = dx M + x (dW + s · (daᵀ b + aᵀ db))`."""
    return along.x @ merge(at.w, at.a, at.b) + at.x @ (along.w + SCALE * (t(along.a) @ at.b + t(at.a) @ along.b))


def merged_cotangents(at: Merged, dy: np.ndarray) -> Merged:
    """`W̄ = xᵀ ȳ`, `ā = s · b ȳᵀ x`, `b̄ = s · a xᵀ ȳ`, `x̄ = ȳ Mᵀ`."""
    dw = t(at.x) @ dy
    return Merged(dw, SCALE * at.b @ t(dw), SCALE * at.a @ dw, dy @ t(merge(at.w, at.a, at.b)))


AT, ALONG = draws(1), draws(2)
DY = np.random.default_rng(3).normal(size=(7, 5))


def test_merged_value() -> None:
    assert_close([merged(*as_float32(AT))], [AT.x @ merge(AT.w, AT.a, AT.b)])


@pytest.mark.parametrize("zero", [(), ("w",), ("w", "x"), ("a", "b"), ("w", "a", "b")], ids="-".join)
def test_merged_forward_mode(zero: tuple[str, ...]) -> None:
    """Also where tangents are zero by construction."""
    varied = [name for name in Merged._fields if name not in zero]
    at, along = as_float32(AT), as_float32(ALONG)

    def fn(*chosen: jax.Array) -> jax.Array:
        return merged(*Merged(*at)._replace(**dict(zip(varied, chosen, strict=True))))

    places = [Merged._fields.index(name) for name in varied]
    value, tangent = jax.jvp(fn, [at[place] for place in places], [along[place] for place in places])
    still = ALONG._replace(**{name: np.zeros_like(getattr(ALONG, name)) for name in zero})
    assert_close([value, tangent], [AT.x @ merge(AT.w, AT.a, AT.b), merged_directional(AT, still)])


def test_merged_reverse_mode() -> None:
    _, backward = jax.vjp(merged, *as_float32(AT))
    assert_close(backward(jnp.asarray(DY, jnp.float32)), merged_cotangents(AT, DY))


def test_merged_vmap_of_gradients() -> None:
    at, dy = as_float32(AT), jnp.asarray(DY, jnp.float32)
    gradients = jax.grad(lambda *p: jnp.vdot(merged(*p), dy), argnums=(0, 1, 2, 3))
    many = jax.vmap(gradients, in_axes=(None, None, None, 0))(*at[:3], jnp.stack([at[3], -2 * at[3]]))
    expected = merged_cotangents(AT, DY)
    assert_close([g[0] for g in many], expected)
    assert_close([many[1][1], many[3][1]], [-2 * expected.a, expected.x])


def test_merged_hessian_vector_product() -> None:
    """Against a central difference of the cotangents' NumPy formula."""
    dy = jnp.asarray(DY, jnp.float32)
    gradients = jax.grad(lambda *p: jnp.vdot(merged(*p), dy), argnums=(0, 1, 2, 3))
    _, products = jax.jvp(gradients, as_float32(AT), as_float32(ALONG))
    step = 1e-6
    moved = [
        merged_cotangents(Merged(*(x + sign * step * v for x, v in zip(AT, ALONG, strict=True))), DY)
        for sign in (1, -1)
    ]
    assert_close(products, [(plus - minus) / (2 * step) for plus, minus in zip(*moved, strict=True)])


def test_merged_forms_no_gradient_of_a_frozen_weight() -> None:
    """With sizes that tell every array apart: no product `(6, 5)` over the seven tokens."""
    w, *rest = as_float32(AT)

    def sums_over_tokens(fn: Any, *args: Any) -> list[set[int]]:
        """Shapes of what is contracted over seven, the tokens."""
        found = []
        for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
            if eqn.primitive.name == "dot_general":
                ((contracted, _), _) = eqn.params["dimension_numbers"]
                if [eqn.invars[0].aval.shape[axis] for axis in contracted] == [7]:
                    found.append(set(eqn.outvars[0].aval.shape))
        return found

    def loss(factors: Any, w: Any) -> jax.Array:
        return jnp.vdot(merged(w, *factors), jnp.asarray(DY, jnp.float32))

    assert sums_over_tokens(jax.grad(loss), tuple(rest), w) == [{2, 5}, {2, 6}]
    assert sums_over_tokens(jax.grad(loss, argnums=1), tuple(rest), w) == [{6, 5}]


def test_no_merged_weight_waits_for_the_backward_pass() -> None:
    """Of the size of the weight, the base alone is a residual."""
    w, *rest = as_float32(AT)
    _, backward = jax.vjp(lambda *factors: merged(w, *factors), *rest)
    residuals = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == w.shape]
    assert all(np.array_equal(leaf, w) for leaf in residuals)
    assert residuals, "the base must be there for `ȳ Mᵀ`"


def test_choice_is_by_operations_and_never_where_products_round() -> None:
    line = 2 * 384 * 1536 // (384 + 1536) + 1
    sizes = {"dtype": jnp.float32, "backend": "cpu"}
    assert choose_strategy(line, 384, 1536, **sizes) == "merged_weight"
    assert choose_strategy(line - 1, 384, 1536, **sizes) == "low_rank_first"
    for about in ({"dtype": jnp.bfloat16}, {"dtype": jnp.float16}, {"backend": "gpu"}, {"backend": "tpu"}):
        assert choose_strategy(10**6, 384, 1536, **(sizes | about)) == "low_rank_first"


@pytest.mark.parametrize(
    ("x", "reduce"),
    [((5, 3), (2, 4)), ((5,), (2, 3)), ((2, 5, 3), (2, 3))],
    ids=["another size", "no tokens", "no batch"],
)
def test_annotated_shapes_are_checked(x: tuple[int, ...], reduce: tuple[int, ...]) -> None:
    """In tests a wrong shape, dtype or leaf is refused by the annotations of the core."""
    with pytest.raises(jaxtyping.TypeCheckError, match="low_rank_matmul"):
        low_rank_matmul(jnp.ones(x), jnp.ones(reduce), jnp.ones((2, 4)), scale=1.0)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        low_rank_matmul(jnp.ones((5, 3), jnp.int32), jnp.ones((2, 3)), jnp.ones((2, 4)), scale=1.0)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'mask'"):
        lj.partition({"w": jnp.ones(2)}, {"w": "frozen"})
