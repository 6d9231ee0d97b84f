from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.vera import projection_a, projection_b
from tests.models_table import moved

KEY = jax.random.key(0)


def vera(**settings: Any) -> lj.VeRA:
    return lj.VeRA(**{"rank": 5, "targets": ("w",), **settings})


def random(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def trained(method: lj.VeRA, *shape: int, axes: str = "io") -> Any:
    tree = lj.attach({"w": random(*shape)}, method, key=KEY, uses={"w": lj.Use("dot_general", axes)})
    return moved(tree, lj.trainable_mask(tree, method), seed=1)["w"]


def test_merging_is_the_formula() -> None:
    """`W + (Λ_b B Λ_d A)ᵀ`, in NumPy."""
    node = trained(vera(), 30, 20)
    b, a = np.asarray(node.b).T, np.asarray(node.a)
    delta = np.diag(node.lambda_b) @ b @ np.diag(node.lambda_d) @ a
    np.testing.assert_allclose(node.merge(), node.base + delta.T, rtol=1e-5, atol=1e-6)
    assert np.abs(delta).max() > 0.1
    x = random(7, 30)
    found = lj.adapt(lambda params, x: x @ params["w"], on_materialize="error")({"w": node}, x)
    np.testing.assert_allclose(found, x @ (node.base + delta.T), rtol=1e-4, atol=1e-4)


def test_it_trains_two_vectors_that_start_at_d_and_zero() -> None:
    method = vera(rank=64, d_initial=0.3)
    params = lj.attach({"w": random(30, 20)}, method, key=KEY)
    assert set(np.asarray(params["w"].lambda_d).tolist()) == {np.float32(0.3)}
    assert not np.any(params["w"].lambda_b)
    count = lj.count_params(params, lj.label_params(params, method))
    assert {name: label.params for name, label in count.per_label.items()} == {
        "frozen": 30 * 20,
        "vera_d": 64,
        "vera_b": 20,
    }


def test_projections_are_uniform_within_the_bounds_of_kaiming() -> None:
    a, b = projection_a(0, 64, 300), projection_b(0, 64, 200)
    for array, bound in ((a, (6 / 300) ** 0.5), (b, (6 / 64) ** 0.5)):
        assert np.abs(array).max() <= bound
        assert np.abs(array).max() == pytest.approx(bound, rel=0.01)
        assert float(array.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert abs(float(array.mean())) < 0.02 * bound
    assert np.abs(np.corrcoef(a[:, :64].ravel(), b[:, :64].ravel())[0, 1]) < 0.05


def test_projections_depend_on_the_seed_alone() -> None:
    """The same on every run and under every setting of JAX's; a larger weight's begin with a smaller one's."""
    first = np.asarray(projection_b(7, 3, 4))
    np.testing.assert_array_equal(projection_b(7, 3, 9)[:, :4], first)
    np.testing.assert_allclose(projection_a(7, 3, 9)[:, :4] * 3 / 2, projection_a(7, 3, 4), rtol=1e-6)
    assert np.abs(projection_b(8, 3, 4) - first).max() > 0.1
    np.testing.assert_allclose(first[0] / 2**0.5, FIRST, atol=1e-6)
    jax.clear_caches()
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(projection_b(7, 3, 4), first)


# Of another process, on another day.
FIRST = [0.425050, 0.532551, -0.636242, 0.558611]


def test_weights_of_one_size_share_them_in_memory(tmp_path: Any) -> None:
    """Attached and loaded; also the members of a stack."""
    base = {"w": {"one": random(6, 4), "two": random(6, 4, seed=1), "three": random(3, 6, 4)}}
    uses = {"w/three": lj.Use("dot_general", "sio")}
    method = vera(targets=("one", "two", "three"))
    attached = lj.attach(base, method, key=KEY, uses=uses)
    for tree in (attached, lj.load_adapter(lj.save_adapter(tmp_path, attached, method), base).params):
        nodes = tree["w"]
        assert nodes["one"].a is nodes["two"].a is nodes["three"].a
        assert nodes["one"].b is nodes["two"].b
        assert nodes["three"].a.shape == (5, 6)
        assert nodes["three"].lambda_d.shape == (3, 5)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * 5 * (5 + 4) + 1000


def test_layers_are_stacked_and_taken_apart() -> None:
    layers = {"layers": {str(i): {"w": random(6, 4, seed=i)} for i in range(3)}}
    method = vera(targets=("w",))
    params = lj.attach(layers, method, key=KEY)
    params = moved(params, lj.trainable_mask(params, method), seed=1)
    stacked = lj.models.stack_layers(params)
    node = stacked["layers"]["w"]
    assert node.a.shape == (5, 6)
    wanted = [params["layers"][str(i)]["w"].merge() for i in range(3)]
    np.testing.assert_allclose(node.merge(), np.stack(wanted), rtol=1e-5, atol=1e-6)
    again = lj.models.unstack_layers(stacked)
    for found, leaf in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_no_projection_is_saved_and_each_comes_back(tmp_path: Any) -> None:
    method = vera(projection_seed=3, dropout=0.1)
    params = {"w": trained(method, 30, 20)}
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, method), {"w": random(30, 20)})
    for found, wanted in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert loaded.method == dataclasses.replace(method, targets=("/w",))


def test_a_rank_that_asks_for_memory_is_refused() -> None:
    node = trained(vera(), 30, 20)
    assert "a rank of 1 to 16384 is expected" in str(node.misfit({"lambda_d": (10**6,), "lambda_b": (20,)}))
    assert "`lambda_b` has the shape (19,)" in str(node.misfit({"lambda_d": (5,), "lambda_b": (19,)}))


def test_dropout_acts_on_the_path_alone() -> None:
    x = random(400, 30)
    apply = lj.adapt(lambda params, x: x @ params["w"], on_materialize="error")
    node = trained(vera(dropout=0.5), 30, 20)
    dropped = [apply(lj.with_dropout({"w": node}, jax.random.key(seed)), x) for seed in range(2)]
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    np.testing.assert_allclose(np.mean(dropped), np.mean(x @ node.merge()), atol=0.05)
    still = dataclasses.replace(node, lambda_b=jnp.zeros(20))
    np.testing.assert_allclose(
        apply(lj.with_dropout({"w": still}, jax.random.key(0)), x), x @ node.base, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer from 1 to 16384, got 0"),
        ({"rank": 2.0}, "`rank` must be an integer from 1 to 16384, got 2.0"),
        ({"rank": 10**6}, "`rank` must be an integer from 1 to 16384, got 1000000"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"d_initial": 0}, "`d_initial` must be a number other than 0, got 0"),
        ({"projection_seed": -1}, r"`projection_seed` must be an integer from 0 to 2³² - 1, got -1"),
        ({"projection_seed": True}, r"`projection_seed` must be an integer from 0 to 2³² - 1, got True"),
    ],
)
def test_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vera(**settings)
