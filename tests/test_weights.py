"""The protocol of adapted weights: whatever is done to a node is done to the array that it stands for."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.weights import FactoredWeight, Unfactorable, is_adapted, register

from .adapt.kit import node


def merged(weight: Any) -> np.ndarray:
    """What the node stands for, by its definition."""
    letters = "abcdefgh"[: len(weight.axes)]
    stack, inner, outer = ("".join(x for x, own in zip(letters, weight.axes, strict=True) if own == s) for s in "sio")
    equation = f"{stack}r{inner},{stack}r{outer}->{letters}"
    return np.asarray(weight.base) + weight.scale * np.einsum(equation, np.asarray(weight.a), np.asarray(weight.b))


def assert_stands_for(weight: Any, expected: Any) -> None:
    """`weight.merge()`, and the NumPy fold of its parts, are `expected`."""
    assert weight.shape == expected.shape
    np.testing.assert_allclose(merged(weight), expected, atol=1e-5)
    np.testing.assert_allclose(weight.merge(), expected, atol=1e-5)


@pytest.fixture(
    params=[
        ((5, 3), "io"),
        ((3, 5), "oi"),
        ((2, 5, 3), "sio"),
        ((4, 2, 3), "ioo"),
        ((2, 3, 4), "iio"),
        ((3, 2, 4), "oio"),
    ],
    ids=lambda param: param[1],
)
def weight(request: pytest.FixtureRequest) -> Any:
    shape, axes = request.param
    return node("w", *shape, axes=axes)


def test_merge(weight: Any) -> None:
    assert_stands_for(weight, merged(weight))
    assert not np.allclose(merged(weight), weight.base)


def test_every_transpose(weight: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        permutation = tuple(int(axis) for axis in rng.permutation(weight.ndim))
        assert_stands_for(weight.transpose(permutation), merged(weight).transpose(permutation))


def test_broadcasts() -> None:
    weight = node("w", 1, 3, 4, axes="iio")
    shape = (2, 5, 3, 7, 4)
    moved = weight.broadcast_in_dim(shape, (1, 2, 4))
    assert moved.axes == "siiso"
    expected = np.broadcast_to(merged(weight)[None, :, :, None, :], shape)
    assert_stands_for(moved, expected)


def test_multiplication_by_a_scalar(weight: Any) -> None:
    assert_stands_for(weight.times(jnp.float32(-0.3)), -0.3 * merged(weight))


RESHAPES = [
    ((6, 4), "io", (2, 3, 4), "iio"),
    ((6, 4), "io", (6, 2, 2), "ioo"),
    ((6, 4), "io", (3, 2, 2, 2), "iioo"),
    ((2, 3, 4), "iio", (6, 4), "io"),
    ((2, 3, 4), "ioo", (2, 12), "io"),
    ((4, 3, 2), "sio", (2, 2, 3, 2), "ssio"),
    ((2, 3, 4, 5), "ssio", (6, 4, 5), "sio"),
    ((1, 3, 4), "sio", (3, 4), "io"),
    ((3, 1, 4), "ioo", (3, 4), "io"),
    ((3, 4, 1), "ioi", (3, 4), "io"),
    ((6, 1), "io", (2, 3), "ii"),
    ((1, 6), "io", (6,), "o"),
    ((6, 4), "io", (6, 4), "io"),
    ((4, 6, 4), "oio", (2, 2, 6, 4), "ooio"),
]


@pytest.mark.parametrize(("old", "axes", "new", "labels"), RESHAPES)
def test_reshapes(old: tuple[int, ...], axes: str, new: tuple[int, ...], labels: str) -> None:
    weight = node("w", *old, axes=axes)
    reshaped = weight.reshape(new)
    assert reshaped.axes == labels
    assert_stands_for(reshaped, merged(weight).reshape(new))


@pytest.mark.parametrize(
    ("old", "axes", "new"), [((6, 4), "io", (24,)), ((6, 4), "io", (4, 6)), ((2, 3, 4), "sio", (6, 4))]
)
def test_reshapes_that_join_roles(old: tuple[int, ...], axes: str, new: tuple[int, ...]) -> None:
    with pytest.raises(Unfactorable, match="joins axes of different roles"):
        node("w", *old, axes=axes).reshape(new)


@pytest.mark.parametrize("seed", range(25))
def test_random_walk_through_layouts(seed: int) -> None:
    """Transposes, splits, joins, cuts and added axes in random order; a step that cannot be taken says so."""
    rng = np.random.default_rng(seed)
    axes = "".join(rng.permutation(list("iioos"[: rng.integers(2, 6)])))
    start = node(f"walk{seed}", *(int(size) for size in rng.choice([1, 2, 4, 6], len(axes))), axes=axes)
    steps, expected = 0, merged(start)

    def walk(weight: Any) -> Any:
        nonlocal steps, expected
        for _ in range(6):
            try:
                weight, expected = random_step(rng, weight, expected)
                steps += 1
            except Unfactorable:
                pass
        return weight

    end = jax.jit(walk)(start)
    assert steps > 0
    assert end.base.shape == expected.shape
    np.testing.assert_allclose(merged(end), expected, atol=1e-4)


def random_step(rng: np.random.Generator, weight: Any, array: np.ndarray) -> tuple[Any, np.ndarray]:
    choice = rng.integers(5)
    if choice == 0:
        order = tuple(int(axis) for axis in rng.permutation(array.ndim))
        return weight.transpose(order), array.transpose(order)
    if choice == 1:
        sizes = random_factorization(rng, array.size)
        return weight.reshape(sizes), array.reshape(sizes)
    if choice == 2 and array.ndim > 1:
        axis = int(rng.integers(array.ndim - 1))
        sizes = (*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])
        return weight.reshape(sizes), array.reshape(sizes)
    if choice == 3 and array.ndim < 6:
        place = int(rng.integers(array.ndim + 1))
        shape = (*array.shape[:place], 2, *array.shape[place:])
        dimensions = [dim for dim in range(len(shape)) if dim != place]
        return weight.broadcast_in_dim(shape, dimensions), np.broadcast_to(np.expand_dims(array, place), shape)
    axis = int(rng.integers(array.ndim))
    size = int(rng.integers(1, array.shape[axis] + 1))

    def cutter(part: jax.Array, axes: list[int | None]) -> jax.Array:
        return lax.slice_in_dim(part, 0, size, axis=axes.index(axis)) if axis in axes else part

    return weight.cut(cutter), array.take(range(size), axis)


def random_factorization(rng: np.random.Generator, size: int) -> tuple[int, ...]:
    sizes = []
    while size > 1:
        divisor = int(rng.choice([d for d in range(2, size + 1) if size % d == 0]))
        sizes.append(divisor)
        size //= divisor
    if rng.integers(2):
        sizes.insert(int(rng.integers(len(sizes) + 1)), 1)
    return tuple(sizes)


def test_members_of_a_stack() -> None:
    weight = node("w", 3, 4, 5, axes="sio")
    arrays, member = weight.stacked()
    for index in range(3):
        assert_stands_for(member([array[index] for array in arrays]), merged(weight)[index])
    with pytest.raises(Unfactorable, match="leading axis is no stack axis"):
        node("w", 3, 4).stacked()


EINSUMS = [
    ("bd,do->bo", (3, 4), (4, 5), "io"),
    ("bdk,kdo->bo", (3, 4, 2), (2, 4, 5), "iio"),
    ("bo,do->bd", (3, 5), (4, 5), "io"),
    ("bed,edo->ebo", (3, 2, 4), (2, 4, 5), "sio"),
    ("ebd,efdo->efbo", (2, 3, 4), (2, 3, 4, 5), "ssio"),
    ("fbd,efdo->febo", (3, 2, 4), (2, 3, 4, 5), "ssio"),
    ("fbed,efdo->febo", (3, 2, 2, 4), (2, 3, 4, 5), "ssio"),
    ("bd,edo->beo", (3, 4), (2, 4, 5), "sio"),
    ("bd,deo->beo", (3, 4), (4, 2, 5), "iso"),
    ("d,do->o", (4,), (4, 5), "io"),
    ("btsd,dno->btsno", (2, 3, 2, 4), (4, 2, 5), "ioo"),
    ("bno,ndo->bd", (3, 2, 5), (2, 4, 5), "oio"),
]


@pytest.mark.parametrize(("equation", "left", "right", "axes"), EINSUMS, ids=lambda value: str(value))
@pytest.mark.parametrize("first", [False, True], ids=["weight second", "weight first"])
def test_contractions(equation: str, left: tuple[int, ...], right: tuple[int, ...], axes: str, first: bool) -> None:
    """Every way to contract, batch, leave and order axes, the weight on either side."""
    weight, x = node(equation, *right, axes=axes), np.random.default_rng(1).normal(size=left).astype(np.float32)
    terms, result = equation.split("->")
    flipped = ",".join(reversed(terms.split(","))) + "->" + result

    def fn(w: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum(flipped, w, x) if first else jnp.einsum(equation, x, w)

    actual = jax.jit(lj.adapt(fn, on_materialize="error"))(weight, x)
    np.testing.assert_allclose(actual, np.einsum(equation, x, merged(weight)), atol=1e-4)


ARRAY_USES = {
    "jnp.sin": jnp.sin,
    "np.asarray": np.asarray,
    "matmul": lambda w: jnp.ones((2, 5)) @ w,
    "left matmul": lambda w: w @ jnp.ones((3, 2)),
    "addition": lambda w: w + 1,
    "right addition": lambda w: 1 + w,
    "numpy addition": lambda w: np.ones((5, 3)) + w,
    "product": lambda w: 2.0 * w,
    "division": lambda w: w / 2,
    "power": lambda w: w**2,
    "negation": lambda w: -w,
    "comparison": lambda w: w < 0,
    "index": lambda w: w[0],
    "iteration": list,
    "length": len,
    "transpose": lambda w: w.T,
    "cast": lambda w: w.astype(jnp.bfloat16),
}


@pytest.mark.parametrize("use", ARRAY_USES)
def test_use_as_an_array_says_what_to_do(use: str) -> None:
    with pytest.raises(
        TypeError, match=r"a LoRAWeight of shape \(5, 3\) was used as an array: .*`lj.adapt`.*`lj.merge_"
    ):
        ARRAY_USES[use](node("w", 5, 3))


def test_use_inside_of_jit_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"wrap the function that takes these parameters with `lj\.adapt`"):
        jax.jit(lambda p, x: x @ p["w"])({"w": node("w", 5, 3)}, jnp.ones((2, 5)))


def test_nodes_hold_what_pytrees_hold() -> None:
    weight = node("w", 5, 3)
    leaves, treedef = jax.tree.flatten(weight)
    for filling in ("label", True, None, jax.ShapeDtypeStruct((2,), jnp.float32), object()):
        rebuilt = jax.tree.unflatten(treedef, [filling] * len(leaves))
        assert rebuilt.base is filling
        assert (rebuilt.scale, rebuilt.axes) == (weight.scale, weight.axes)
    assert jax.tree.structure(jax.tree.map(lambda _: 0, weight)) == treedef


def test_nodes_copy_pickle_and_print() -> None:
    weight = node("w", 5, 3)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert_stands_for(other, merged(weight))
    assert "LoRAWeight(" in repr(weight)


def test_shape_of_the_base(weight: Any) -> None:
    base = weight.base
    assert (weight.shape, weight.dtype, weight.ndim, weight.size) == (base.shape, base.dtype, base.ndim, base.size)
    assert weight.size == math.prod(weight.shape)


def test_misfits_are_named() -> None:
    weight = node("w", 5, 3)
    fitting = {"a": (2, 5), "b": (2, 3)}
    assert weight.misfit(fitting) is None
    for name, shape in {"a": (2, 4), "b": (3, 3)}.items():
        message = weight.misfit(fitting | {name: shape})
        assert message is not None
        assert message.startswith(f"`{name}` has the shape {shape}, expected ")
        assert "beside a base of (5, 3) labelled 'io'" in message


def test_a_method_without_rules_materializes() -> None:
    """The base class alone: every operation falls back to `merge`."""

    @register
    @dataclasses.dataclass(frozen=True)
    class Shifted(FactoredWeight):
        def merge(self) -> jax.Array:
            return self.base + 1

    weight, x = Shifted(jnp.ones((3, 5, 4)), axes="sio"), jnp.ones((2, 5))
    uses = {
        "matmuls": lambda w: jnp.einsum("bi,sio->sbo", x, w),
        "lookups": lambda w: w[:, jnp.array([0, 1])],
        "multiplication by a scalar": lambda w: 3 * w,
    }
    for what, fn in uses.items():
        with pytest.warns(lj.MaterializeWarning, match=f"Shifted has no rule for {what}|no lookup|returns it"):
            np.testing.assert_allclose(lj.adapt(fn)(weight), fn(weight.base + 1))
    assert is_adapted(weight)
