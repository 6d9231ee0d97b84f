"""`RandomSubspace`: one vector moves the whole tree, through a projection that nothing stores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
import lora_jax.methods.fastfood
from lora_jax.methods.fastfood import fastfood, hadamard
from lora_jax.methods.random_subspace import SubspaceWeight
from lora_jax.paths import leaves_by_path

from ..models_table import case

KEY = jax.random.key(0)


def base() -> Any:
    return {"a": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}, "b": jnp.ones((7,)), "head": jnp.ones(3)}


def matrix(d: int, count: int, seed: int = 5) -> np.ndarray:
    """`V (count, d)`, column by column."""
    return np.stack([np.asarray(fastfood(unit, jnp.uint32(seed), count=count)) for unit in jnp.eye(d)], axis=1)


@pytest.mark.parametrize("rows", [1, 2, 8, 64, 2048])
def test_the_hadamard_transform_is_its_matrix(rows: int) -> None:
    wanted = np.ones((1, 1))
    while len(wanted) < rows:
        wanted = np.block([[wanted, wanted], [wanted, -wanted]])
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    np.testing.assert_allclose(hadamard(jnp.asarray(x)), wanted @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("d", "count"), [(1, 9), (3, 2), (20, 1000), (33, 64)])
def test_the_projection_is_linear_and_random(d: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entries have variance `L`, columns are nearly orthogonal; the gradient is the transpose's."""
    monkeypatch.setattr(lora_jax.methods.fastfood, "_CHUNK", 256)  # several chunks, the last of them cut
    v = matrix(d, count)
    z, g = (np.random.default_rng(1).normal(size=size).astype(np.float32) for size in (d, count))
    np.testing.assert_allclose(fastfood(jnp.asarray(z), jnp.uint32(5), count=count), v @ z, rtol=1e-4, atol=1e-3)
    back = jax.grad(lambda z: jnp.vdot(g, fastfood(z, jnp.uint32(5), count=count)))(jnp.asarray(z))
    np.testing.assert_allclose(back, v.T @ g, rtol=1e-4, atol=2e-2)
    assert np.linalg.matrix_rank(v) == min(d, count)
    if count == 1000:
        gram = v.T @ v / (32 * count)
        np.testing.assert_allclose(np.diag(gram), 1, atol=0.15)
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.2
        assert (v != matrix(d, count, seed=6)).any()


def test_columns_of_the_whole_tree_have_length_one() -> None:
    method = lj.RandomSubspace(dimension=8, targets=("w", "v"))
    params = {"w": jnp.zeros((64, 50)), "v": jnp.zeros(900)}
    tree = lj.attach(params, method, key=KEY)
    holder = next(path for path, leaf in leaves_by_path(tree).items() if leaf.z is not None)
    for unit in jnp.eye(8):
        tree[holder] = SubspaceWeight(params[holder], unit, None, **_settings(tree[holder]))
        moved = lj.merge_params(tree)
        length = sum(float(jnp.sum(leaf**2)) for leaf in moved.values()) ** 0.5
        assert abs(length - 1) < 0.1
        assert all(jnp.any(leaf) for leaf in moved.values())


def _settings(node: SubspaceWeight) -> dict[str, Any]:
    return {"seed": node.seed, "scale": node.scale, "offset": node.offset, "axes": node.axes}


def test_one_vector_is_shared_by_the_whole_tree() -> None:
    method = lj.RandomSubspace(dimension=4, also_train=("head",))
    params = lj.attach(base(), method, key=KEY)
    leaves = leaves_by_path(params)
    assert [path for path, leaf in leaves.items() if getattr(leaf, "z", None) is not None] == ["a/bias"]
    count = lj.count_params(params, lj.label_params(params, method))
    assert (count.per_label["subspace"].params, count.per_label["head"].params) == (4, 3)

    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))

    def loss(part: Any) -> jax.Array:
        tree = lj.merge_params(lj.combine(part, frozen))
        return jnp.sum(tree["a"]["kernel"] ** 2) + jnp.sum(tree["b"] ** 3)

    gradient = jax.grad(loss)(trainable)["a"]["bias"].z
    node = leaves["a/bias"]
    v = matrix(4, 5 + 30 + 7, node.seed) * node.scale  # the leaves' rows, in tree order
    np.testing.assert_allclose(gradient, 2 * v[5:35].sum(0) + 3 * v[35:].sum(0), rtol=1e-4)


def test_a_part_of_the_tree_is_refused() -> None:
    params = lj.attach(base(), lj.RandomSubspace(dimension=4), key=KEY)
    with pytest.raises(ValueError, match="lacks the vector that all its adapted weights share: the tree's first one"):
        lj.merge_params(params["b"])
    with pytest.raises(ValueError, match="pass or merge the whole tree"):
        lj.adapt(lambda w: w.sum())(params["b"])


def test_what_is_left_of_a_tree_keeps_its_rows() -> None:
    method = lj.RandomSubspace(dimension=4)
    params = lj.attach(base(), method, key=KEY)
    params = jax.tree.map(lambda leaf, mask: leaf + 1 if mask else leaf, params, lj.trainable_mask(params, method))
    part = {"a": {"bias": params["a"]["bias"]}, "head": params["head"]}
    found, whole = lj.merge_params(part), lj.merge_params(params)
    np.testing.assert_array_equal(found["head"], whole["head"])
    np.testing.assert_array_equal(found["a"]["bias"], whole["a"]["bias"])
    exchanged = {"a": params["a"]["bias"], "b": params["head"], "c": params["b"]}
    with pytest.raises(ValueError, match="in another order than when they were made: keep the tree's keys"):
        lj.merge_params(exchanged)


def test_two_trees_keep_their_own_vectors() -> None:
    method = lj.RandomSubspace(dimension=4)
    params = lj.attach(base(), method, key=KEY)
    other = jax.tree.map(lambda leaf, mask: leaf + 1 if mask else leaf, params, lj.trainable_mask(params, method))
    difference = lj.adapt(lambda one, two: jax.tree.map(jnp.subtract, two, one))(params, other)
    wanted = jax.tree.map(jnp.subtract, lj.merge_params(other), lj.merge_params(params))
    assert all(map(np.array_equal, jax.tree.leaves(difference), jax.tree.leaves(wanted)))
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(difference))


@pytest.mark.parametrize(("method", "dtype"), [("subspace", "float32"), ("structured_subspace", "bfloat16")])
def test_laws_1_and_2(method: str, dtype: str) -> None:
    row = case("linen_scanned", dtype)
    chosen = row.method(method)
    run, plain = jax.jit(lj.adapt(row.apply, on_materialize="error")), jax.jit(row.apply)
    np.testing.assert_array_equal(run(row.attach(chosen), row.x), plain(row.params, row.x))
    params = row.trained(chosen)
    found, wanted = (np.asarray(out, np.float32) for out in (run(params, row.x), plain(lj.merge_params(params), row.x)))
    assert np.abs(found - wanted).max() <= row.error() * np.abs(wanted).max()
    assert np.abs(found - np.asarray(plain(row.params, row.x), np.float32)).max() > 1e-2


def test_gains_scale_each_leaf_and_count() -> None:
    method = lj.RandomSubspace(dimension=9, structure_aware=True, also_train=("head",))
    params = lj.attach(base(), method, key=KEY)
    assert params["a"]["bias"].z.shape == (6,)
    assert lj.count_params(params, lj.label_params(params, method)).per_label["subspace"].params == 9
    plain = lj.attach(base(), lj.RandomSubspace(dimension=6, also_train=("head",)), key=KEY)

    def at(tree: Any, **gains: float) -> Any:
        def node(path: str, leaf: Any) -> Any:
            fields = {"z": None if leaf.z is None else jnp.arange(1.0, 7.0)}
            fields |= {} if leaf.gain is None else {"gain": jnp.float32(gains.get(path.replace("/", "_"), 1.0))}
            return SubspaceWeight(leaf.base, **{"z": None, "gain": None, **fields}, **_settings(leaf))

        leaves = leaves_by_path({**tree, "head": None})
        return lj.merge_params({path: node(path, leaf) for path, leaf in leaves.items()})

    without, once, twice = at(plain), at(params), at(params, b=2.0)
    np.testing.assert_allclose(once["a/kernel"], without["a/kernel"])
    np.testing.assert_allclose(twice["a/kernel"], once["a/kernel"])
    np.testing.assert_allclose(twice["b"] - 1, 2 * (once["b"] - 1), rtol=1e-5)


def test_it_learns_what_its_dimensions_allow() -> None:
    """Within `d` directions of a quadratic bowl the optimum is a least-squares problem; so is the loss that is left."""
    method = lj.RandomSubspace(dimension=6)
    params = lj.attach({"w": jnp.zeros((4, 5))}, method, key=KEY)
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    p = matrix(6, 20, params["w"].seed) * params["w"].scale
    _, (residual,), *_ = np.linalg.lstsq(p.astype(np.float64), np.asarray(target, np.float64).ravel(), rcond=None)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    tx = optax.adam(0.1)

    @jax.jit
    def step(part: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(
            lambda part: jnp.sum((lj.merge_params(lj.combine(part, frozen))["w"] - target) ** 2)
        )(part)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(part, updates), state, value

    state, value = tx.init(trainable), jnp.zeros(())
    for _ in range(400):
        trainable, state, value = step(trainable, state)
    np.testing.assert_allclose(value, residual, rtol=1e-3)


def test_nothing_as_large_as_the_projection_is_in_the_program_or_kept() -> None:
    """No constant beyond the Hadamard matrix of 32 rows: the compiler doesn't draw at its own time and store."""
    method = lj.RandomSubspace(dimension=100)
    params = lj.attach({"w": jnp.ones((300, 200))}, method, key=KEY)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    apply = lj.adapt(lambda tree, x: jnp.sum(jnp.tanh(x @ tree["w"])))
    step = jax.jit(jax.grad(lambda part, frozen, x: apply(lj.combine(part, frozen), x)))
    program = step.lower(trainable, frozen, jnp.ones((4, 300))).compile().as_text() or ""
    sizes = [
        int(np.prod([int(number) for number in line.split("[")[1].split("]")[0].split(",") if number]))
        for line in program.splitlines()
        if " constant(" in line
    ]
    assert max(sizes) == 32 * 32
    _, saved = jax.vjp(lambda z: fastfood(z, jnp.uint32(0), count=2_000_000), jnp.ones(100))
    assert max(leaf.size for leaf in jax.tree.leaves(saved)) <= 32 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension": 0}, "`dimension` must be a positive integer, got 0"),
        ({"dimension": 2.0}, "`dimension` must be a positive integer, got 2.0"),
        ({"dimension": 45}, "`dimension` must be less than 45, the targets' number of parameters, got 45"),
        (
            {"dimension": 4, "structure_aware": True},
            "`dimension` 4 leaves no parameter beside a gain for each of 4 leaves",
        ),
        ({"dimension": 4, "also_train": ("a", "b", "head")}, '`targets="all"` found no leaf of a floating type beside'),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.attach(base(), lj.RandomSubspace(**settings), key=KEY)
