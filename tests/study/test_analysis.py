"""The analyses against plain NumPy on matrices whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.study.analysis.measures import (
    LeafChange,
    adapter_similarities,
    amplification,
    bias_changes,
    change_svd,
    layer_changes,
    leaf_changes,
    subspace_similarity,
)
from tests.models_table import moved

RNG = np.random.default_rng(0)


def node(base: np.ndarray, rank: int, axes: str, *, scale: float = 1.5) -> lj.LoRAWeight:
    def size(label: str) -> tuple[int, ...]:
        return tuple(n for n, own in zip(base.shape, axes, strict=True) if own == label)

    a = RNG.normal(size=(*size("s"), rank, *size("i")))
    b = RNG.normal(size=(*size("s"), rank, *size("o")))
    arrays = [jnp.asarray(array, jnp.float32) for array in (base, a, b)]
    return lj.LoRAWeight(*arrays, scale=scale, axes=axes)


def dense_change(leaf: lj.LoRAWeight) -> np.ndarray:
    return np.asarray(leaf.merge(), np.float64) - np.asarray(leaf.base, np.float64)


CASES = [((12, 9), "io"), ((9, 12), "oi"), ((6, 2, 5), "ioo"), ((3, 8, 6), "sio"), ((2, 3, 4, 5), "sioi")]


@pytest.mark.parametrize(("shape", "axes"), CASES)
@pytest.mark.parametrize("scale", [1.5, -0.5])
def test_the_svd_of_a_change_comes_from_the_factors(shape: tuple[int, ...], axes: str, scale: float) -> None:
    leaf = node(RNG.normal(size=shape), 2, axes, scale=scale)
    left, values, right = change_svd(leaf.base, leaf)
    order = [axis for label in "sio" for axis, own in enumerate(axes) if own == label]
    members = shape[0] if axes[0] == "s" else 1
    fan_in = math.prod(n for n, own in zip(shape, axes, strict=True) if own == "i")
    matrices = dense_change(leaf).transpose(order).reshape(members, fan_in, -1)
    np.testing.assert_allclose(np.einsum("mik,mk,mko->mio", left, values, right), matrices, atol=1e-5)
    np.testing.assert_allclose(values, np.linalg.svd(matrices, compute_uv=False)[:, :2], atol=1e-5)
    np.testing.assert_allclose(np.einsum("mik,mij->mkj", left, left), np.tile(np.eye(2), (members, 1, 1)), atol=1e-9)


def test_the_svd_for_another_method_is_that_of_the_difference() -> None:
    base = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
    after = base + jnp.outer(jnp.arange(6.0), jnp.ones(5))
    values = change_svd(base, after).values[0]
    np.testing.assert_allclose(values[0], math.sqrt(55 * 5), rtol=1e-5)
    np.testing.assert_allclose(values[1:], 0, atol=1e-4)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\) labelled 'io' is not a matrix with in and out axes"):
        change_svd(jnp.ones((2, 2, 2)), jnp.ones((2, 2, 2)))


def test_one_subspace_is_similar_to_itself_and_not_to_an_orthogonal_one() -> None:
    q = np.linalg.qr(RNG.normal(size=(10, 8)))[0].T
    mixed = RNG.normal(size=(4, 4)) @ q[:4]  # other vectors of the same span
    assert subspace_similarity(q[:4], mixed)[-1, -1] == pytest.approx(1)
    np.testing.assert_allclose(subspace_similarity(q[:4], q[4:]), 0, atol=1e-12)
    # Three of four directions shared.
    np.testing.assert_allclose(subspace_similarity(q[:4], q[1:5])[-1, -1], 3 / 4)
    # Singular values order the directions: the strongest of one is the weakest of the other.
    sizes = np.array([4.0, 3.0, 2.0, 1.0])[:, None]
    grid = subspace_similarity(sizes * q[:4], sizes[::-1] * q[:4])
    np.testing.assert_allclose(grid[0], [0, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(grid[:, 3], 1)


def test_similarity_follows_the_formula_of_the_paper() -> None:
    """Equation 4, term by term, for ranks 3 and 5."""
    first, second = RNG.normal(size=(3, 20)), RNG.normal(size=(5, 20))
    u, v = (np.linalg.svd(matrix)[2] for matrix in (first, second))
    grid = subspace_similarity(jnp.asarray(first), jnp.asarray(second))
    for i in range(1, 4):
        for j in range(1, 6):
            wanted = np.linalg.norm(u[:i] @ v[:j].T) ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match=r"\(3, 20\) and \(3, 4\) must be matrices with rows of equal length"):
        subspace_similarity(first, np.ones((3, 4)))


def test_random_subspaces_share_what_is_expected() -> None:
    grids = [subspace_similarity(RNG.normal(size=(4, 40)), RNG.normal(size=(8, 40))) for _ in range(200)]
    i, j = np.indices((4, 8)) + 1
    np.testing.assert_allclose(np.mean(grids, axis=0), np.maximum(i, j) / 40, atol=0.02)


def test_two_adapters_are_compared_weight_by_weight() -> None:
    one = {"w": node(np.ones((8, 4)), 2, "io"), "stack": node(np.ones((3, 8, 4)), 2, "sio"), "b": jnp.ones(2)}
    other = {**one, "w": node(np.ones((8, 4)), 3, "io")}
    grids = adapter_similarities(one, other)
    assert {path: grid.shape for path, grid in grids.items()} == {
        "stack/0": (2, 2),
        "stack/1": (2, 2),
        "stack/2": (2, 2),
        "w": (2, 3),
    }
    assert grids["stack/1"][-1, -1] == pytest.approx(1)
    np.testing.assert_allclose(grids["w"], subspace_similarity(one["w"].a, other["w"].a))
    with pytest.raises(ValueError, match="no weight in common that LoRA has trained: the first has none, the other w"):
        adapter_similarities({"w": jnp.ones(2)}, {"w": one["w"]})


def test_amplification_on_a_diagonal() -> None:
    """`W` has little in the two directions that `ΔW` adds to, so the factor is large: all by hand."""
    weight = np.diag([10.0, 8.0, 0.5, 0.25])
    change = np.diag([0.0, 0.0, 3.0, 4.0])
    (row,) = amplification(jnp.asarray(weight), jnp.asarray(weight + change))
    assert row.rank == 2
    assert row.weight == pytest.approx(np.linalg.norm(weight))
    assert row.change == pytest.approx(5)
    assert row.in_change == pytest.approx(math.hypot(0.5, 0.25))
    assert row.in_weight == pytest.approx(math.hypot(10, 8))
    assert row.factor == pytest.approx(5 / math.hypot(0.5, 0.25))
    assert 0 < row.in_random < row.in_weight
    (first,) = amplification(jnp.asarray(weight), jnp.asarray(weight + change), rank=1)
    assert (first.in_change, first.in_weight) == (pytest.approx(0.25), pytest.approx(10))


def test_amplification_of_factors_is_that_of_the_merged_weight() -> None:
    leaf = node(RNG.normal(size=(3, 8, 6)), 2, "sio")
    rows = amplification(leaf.base, leaf)
    assert len(rows) == 3
    for member, row in enumerate(rows):
        base, merged = leaf.base[member], leaf.merge()[member]
        (wanted,) = amplification(base, merged, rank=2)
        np.testing.assert_allclose(row, wanted, rtol=1e-4)


def test_a_weight_that_has_not_moved() -> None:
    (row,) = amplification(jnp.eye(3), jnp.eye(3))
    assert (row.rank, row.change, row.in_change, row.factor) == (0, 0.0, 0.0, 0.0)


def test_bias_changes_by_layer_and_term() -> None:
    def layer(**biases: Any) -> Any:
        return {name: {"bias": jnp.asarray(value)} for name, value in biases.items()}

    base = {
        "layers": [layer(q=[0.0, 0.0], up=[1.0]), layer(q=[0.0, 0.0])],
        "head": {"bias": jnp.zeros(3)},
        "w": jnp.eye(2),
    }
    after = {
        "layers": [layer(q=[1.0, -3.0], up=[1.5]), layer(q=[0.0, 0.5])],
        "head": {"bias": jnp.array([0.0, 0.0, 6.0])},
        "w": jnp.eye(2),
    }
    found = bias_changes(base, after)
    assert (found.stack, found.layers, found.terms) == ("layers", (0, 1), ("q", "up"))
    np.testing.assert_array_equal(found.values, [[2.0, 0.5], [0.25, np.nan]])
    assert found.elsewhere == {"head/bias": 2.0}
    with pytest.raises(ValueError, match="the tree has no leaf named like a bias"):
        bias_changes({"w": jnp.eye(2)}, {"w": jnp.eye(2)})


@pytest.mark.parametrize(
    "method",
    [
        lj.LoRA(rank=2, alpha=3, targets=("up",), also_train=("head",)),
        lj.LoRA(rank=2, alpha=3, targets=("up",), init="pissa"),
        lj.DoRA(rank=2, alpha=3, targets=("up",)),
        lj.VeRA(rank=3, targets=("up",)),
        lj.BitFit(),
        lj.RandomMask(size=0.3),
        lj.RandomSubspace(dimension=5),
    ],
    ids=["lora", "pissa", "dora", "vera", "bitfit", "mask", "subspace"],
)
def test_changes_are_those_of_the_merged_tree(method: lj.Method) -> None:
    """Whatever the method: NumPy's norms of the differences. LoRA's product isn't formed."""
    shapes = {
        "layers": [{"up": {"kernel": (6, 8), "bias": (8,)}}, {"up": {"kernel": (8, 6), "bias": (6,)}}],
        "head": (6, 2),
    }
    base = jax.tree.map(
        lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    params = lj.attach(base, method, key=jax.random.key(0))
    params = moved(params, lj.trainable_mask(params, method), seed=1)
    merged = dict(zip(lj.leaf_paths(base), jax.tree.leaves(lj.merge_params(params)), strict=True))
    before = dict(zip(lj.leaf_paths(base), jax.tree.leaves(base), strict=True))
    found = leaf_changes(base, params)
    for row in found:
        wanted = np.linalg.norm(np.asarray(merged[row.path], np.float64) - np.asarray(before[row.path]))
        assert row.change == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert row.base == pytest.approx(np.linalg.norm(before[row.path]), rel=1e-6)
    assert any(row.change for row in found)

    first, second = layer_changes(found)
    in_first = [row for row in found if row.path.startswith("layers/0/")]
    assert (first.stack, first.layer, second.layer) == ("layers", 0, 1)
    assert first.change == pytest.approx(math.hypot(*(row.change for row in in_first)))
    assert first.relative == pytest.approx(first.change / math.hypot(*(row.base for row in in_first)))


def test_a_leaf_that_was_zero_has_moved_without_bounds() -> None:
    assert LeafChange("b", 1.0, 0.0).relative == math.inf
    assert LeafChange("b", 0.0, 0.0).relative == 0.0


def test_trees_of_two_models_are_refused() -> None:
    with pytest.raises(ValueError, match="must be trees of one model, but they differ at v, w"):
        leaf_changes({"w": jnp.ones(2)}, {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"a leaf has the shape \(3,\), but its base has \(2,\)"):
        leaf_changes({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
