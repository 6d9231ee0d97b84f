"""The low-rank matmul against its formula and the derivatives written by hand, in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.matmul import low_rank_matmul

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
