from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import lora_jax as lj
from tests.models_table import moved

KEY = jax.random.key(0)
P = jax.P


def dora(**settings: Any) -> lj.DoRA:
    return lj.DoRA(**{"rank": 2, "alpha": 3, "targets": ("w",), **settings})


def random(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def trained(method: lj.DoRA, *shape: int, axes: str = "io", dtype: Any = jnp.float32) -> Any:
    tree = lj.attach({"w": random(*shape).astype(dtype)}, method, key=KEY, uses={"w": lj.Use("dot_general", axes)})
    return moved(tree, lj.trainable_mask(tree, method), seed=1)["w"]


def formula(node: Any) -> np.ndarray:
    """`m ⊙ V / ‖V‖` in NumPy, for two axes `(in, out)`."""
    direction = np.asarray(node.base, np.float64) + node.scale * np.asarray(node.a, np.float64).T @ np.asarray(node.b)
    return np.asarray(node.magnitude) * direction / np.linalg.norm(direction, axis=0)


def test_the_magnitude_starts_as_the_norm_of_each_output() -> None:
    for shape, axes, over in (
        ((6, 4), "io", 0),
        ((4, 6), "oi", 1),
        ((6, 2, 3), "ioo", 0),
        ((2, 3, 6), "iio", (0, 1)),
        ((5, 6, 4), "sio", 1),
    ):
        weight = random(*shape)
        tree = lj.attach({"w": weight}, dora(), key=KEY, uses={"w": lj.Use("dot_general", axes)})
        np.testing.assert_allclose(tree["w"].magnitude, np.linalg.norm(weight, axis=over), rtol=1e-6)
    members_first = lj.attach({"w": weight}, dora(), key=KEY, uses={"w": lj.Use("dot_general", "iso")})["w"]
    np.testing.assert_allclose(members_first.magnitude, np.linalg.norm(weight, axis=0), rtol=1e-6)


def test_the_count_is_its_formula() -> None:
    params = lj.attach({"w": random(30, 20)}, dora(rank=4), key=KEY)
    count = lj.count_params(params, lj.label_params(params, dora()))
    assert {name: label.params for name, label in count.per_label.items() if name != "frozen"} == {
        "lora_a": 4 * 30,
        "lora_b": 4 * 20,
        "magnitude": 20,
    }


def test_merging_is_the_formula() -> None:
    node = trained(dora(), 30, 20)
    np.testing.assert_allclose(node.merge(), formula(node), rtol=1e-5, atol=1e-6)
    assert np.abs(node.merge() - node.base).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "axes", "init", "dtype"),
    [
        ((30, 20), "io", "gaussian", jnp.bfloat16),
        ((20, 30), "oi", "pissa", jnp.float32),
        ((3, 2, 5, 4), "iosi", "gaussian", jnp.float32),
    ],
)
def test_the_norm_needs_no_merged_weight(shape: tuple[int, ...], axes: str, init: Any, dtype: Any) -> None:
    """Its three terms are the norm of the sum, also beside a 16-bit weight, which isn't widened for it."""
    node = trained(dora(init=init), *shape, axes=axes, dtype=dtype)
    whole = np.asarray(node.sum(), np.float64)
    norms = np.sqrt((whole**2).sum(axis=tuple(node.places("i")), keepdims=True))
    order = node.places("s") + node.places("o") + node.places("i")
    np.testing.assert_allclose(node.column_norms(), norms.transpose(order).reshape(node.magnitude.shape), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_temporary_has_the_size_of_a_weight(dtype: str) -> None:
    """By the compiler's count, for the norm, and for the layer beyond what the base's needs (on CPUs, a wide copy of a
    16-bit weight): a merged copy would be the weight's size at least."""
    node = trained(dora(rank=12), 2048, 1024, dtype=dtype)

    def temporary(fn: Any, *args: Any) -> int:
        memory = jax.jit(fn).lower(*args).compile().memory_analysis()
        assert memory
        return memory.temp_size_in_bytes

    def layer(params: Any, x: Any) -> Any:
        return x @ params["w"]

    adapted, x = lj.adapt(layer, on_materialize="error", matmul="low_rank_first"), jnp.ones((4, 2048), dtype)
    least = 0.1 * node.base.nbytes
    assert temporary(lambda node: node.column_norms(), node) < least
    assert temporary(adapted, {"w": node}, x) < temporary(layer, {"w": node.base}, x) + least
    assert temporary(lambda node: jnp.sum(node.sum() ** 2, axis=0), node) > node.base.nbytes


def test_the_norm_is_a_constant_to_the_gradient() -> None:
    """Section 4.3: the gradients are those of the formula with the norm's value in the norm's place."""
    node, x, ct = trained(dora(), 7, 5), random(9, 7, seed=2), random(9, 5, seed=3)
    norm = jnp.linalg.norm(node.base + node.scale * node.a.T @ node.b, axis=0)

    def written_out(a: Any, b: Any, magnitude: Any, x: Any) -> Any:
        return jnp.sum(ct * (magnitude / norm)[None] * (x @ node.base + node.scale * (x @ a.T) @ b))

    def layer(a: Any, b: Any, magnitude: Any, x: Any) -> Any:
        changed = dataclasses.replace(node, a=a, b=b, magnitude=magnitude)
        return jnp.sum(ct * lj.adapt(lambda params: x @ params["w"], on_materialize="error")({"w": changed}))

    arguments = (node.a, node.b, node.magnitude, x)
    for found, wanted in zip(
        jax.grad(layer, (0, 1, 2, 3))(*arguments), jax.grad(written_out, (0, 1, 2, 3))(*arguments), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

    def through_the_norm(b: Any) -> Any:
        direction = node.base + node.scale * node.a.T @ b
        return jnp.sum(ct * (x @ (node.magnitude[None] * direction / jnp.linalg.norm(direction, axis=0)[None])))

    assert np.abs(jax.grad(through_the_norm)(node.b) - jax.grad(layer, 1)(*arguments)).max() > 1e-2


def test_a_bias_is_not_scaled() -> None:
    node, x, bias = trained(dora(), 7, 5), random(9, 7), random(5)
    found = lj.adapt(lambda p, x: x @ p["w"] + p["bias"][None], on_materialize="error")({"w": node, "bias": bias}, x)
    np.testing.assert_allclose(found, x @ formula(node) + bias[None], rtol=1e-4, atol=1e-4)


def test_slices_keep_the_norm_of_the_whole_weight() -> None:
    """Half of the inputs have half of the weight, scaled by the norm of all: it isn't taken anew."""
    node, x = trained(dora(), 8, 6), random(4, 8)

    def halves(params: Any, x: Any) -> Any:
        first, second = jnp.split(params["w"], 2, axis=0)
        return x[:, :4] @ first + x[:, 4:] @ second[:, ::1]

    found = lj.adapt(halves, on_materialize="error")({"w": node}, x)
    np.testing.assert_allclose(found, x @ formula(node), rtol=1e-4, atol=1e-4)


def test_a_weight_split_over_devices_by_its_inputs() -> None:
    """Each device has a part of the sum, and the norm is that of the whole."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    node, x = trained(dora(), 8, 6), random(4, 8)
    specs: Any = {"mesh": mesh, "in_specs": (P("d", None), P(None, "d")), "out_specs": P()}

    def parallel(params: Any, x: Any) -> Any:
        return jax.shard_map(lambda w, x: jax.lax.psum(x @ w, "d"), **specs)(params["w"], x)

    found = jax.jit(lj.adapt(parallel, on_materialize="error"))({"w": node}, x)
    np.testing.assert_allclose(found, x @ formula(node), rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_low_rank_path_alone() -> None:
    x = random(400, 8)
    apply = lj.adapt(lambda params, x: x @ params["w"], on_materialize="error")
    start = lj.attach({"w": random(8, 6)}, dora(dropout=0.5), key=KEY)
    np.testing.assert_allclose(
        apply(lj.with_dropout(start, jax.random.key(1)), x), x @ start["w"].base, rtol=1e-4, atol=1e-5
    )
    node = trained(dora(dropout=0.5), 8, 6)
    dropped = [apply(lj.with_dropout({"w": node}, jax.random.key(seed)), x) - x @ formula(node) for seed in range(2)]
    assert all(np.abs(difference).max() > 0.1 for difference in dropped)
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    assert np.abs(np.mean(dropped)) < 0.05


def test_a_column_of_zeros_stays_finite() -> None:
    weight = random(8, 6).at[:, 2].set(0)
    params = lj.attach({"w": weight}, dora(), key=KEY)
    apply = lj.adapt(lambda params, x: x @ params["w"])
    found, gradients = jax.value_and_grad(lambda params: jnp.sum(apply(params, random(4, 8)) ** 2))(params)
    assert np.isfinite(found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(lj.merge_params(params)["w"], weight, atol=1e-6)


def test_a_negative_multiple_keeps_the_magnitude_positive() -> None:
    node = trained(dora(), 8, 6)
    np.testing.assert_allclose(node.times(jnp.float32(-0.5)).merge(), -0.5 * node.merge(), atol=1e-6)


def test_a_lora_is_no_dora() -> None:
    params = lj.attach({"w": random(8, 6)}, lj.LoRA(rank=2, alpha=3, targets=("w",)), key=KEY)
    with pytest.raises(ValueError, match=r"the tree has nothing that DoRA trains: make it with `lj.attach"):
        lj.label_params(params, dora())
