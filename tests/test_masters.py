"""Float32 copies of what is trained in fewer bits: small updates add up, and nothing else changes.

Seen to fail: without copies; when the copies stand for frozen leaves too; when the copy has the last word over its
leaf; when the wrapped transformation sees the leaf, the gradient or the moments in the leaf's own dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.masters import Masters
from lora_jax.methods.base import FROZEN

from .models_table import METHODS
from .test_dtypes import row

KEY = jax.random.key(0)
narrow = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def base(dtype: str) -> Any:
    """Trained leaves of every size, and one that is frozen."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 4), "bias": (4,), "scale": (4,), "tiny": (3,), "other": (6, 2)}
    deviation = {"kernel": 0.3, "bias": 0.1, "scale": 1.0, "tiny": 1e-3, "other": 1.0}
    return {name: jnp.asarray(rng.normal(0, deviation[name], shape), dtype) for name, shape in shapes.items()}


METHOD = lj.FullFineTune(targets=("kernel", "bias", "scale", "tiny"))


def split(params: Any, method: lj.Method = METHOD) -> tuple[Any, Any, Any]:
    """Labels, and both sides of the partition."""
    return lj.label_params(params, method), *lj.partition(params, lj.trainable_mask(params, method))


def steps(tx: Any, trainable: Any, count: int, gradient: Any = jnp.ones_like) -> tuple[Any, Any]:
    def step(carry: Any, _: Any) -> tuple[Any, None]:
        trainable, state = carry
        updates, state = tx.update(jax.tree.map(gradient, trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=count)[0])((trainable, tx.init(trainable)))


def one_step(tx: Any, trainable: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, trainable)
    return optax.apply_updates(trainable, updates), state


def ulps(leaf: Any, wanted: Any) -> float:
    """How many units in the last place a leaf is from what it is the rounding of."""
    kind = jnp.finfo(leaf.dtype)
    here, there = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
    spacing = np.maximum(
        np.exp2(np.floor(np.log2(np.abs(there) + 1e-30))) * float(kind.eps), float(kind.smallest_subnormal)
    )
    return float((np.abs(here - there) / spacing).max())


@narrow
def test_small_updates_add_up(dtype: str) -> None:
    """A hundred steps of 1e-4, each below the rounding of most numbers, move every number by 0.01."""
    params = base(dtype)
    labels, trainable, _ = split(params)
    after, state = steps(lj.make_optimizer(optax.adam(1e-4), labels), trainable, 100)
    for leaf, copy, start in zip(*map(jax.tree.leaves, (after, state.copies, trainable)), strict=True):
        np.testing.assert_allclose(copy, np.asarray(start, np.float32) - 0.01, atol=2e-6)
        assert ulps(leaf, copy) <= 0.51
        assert (np.asarray(leaf) != np.asarray(start)).mean() >= 0.7  # whose rounding is less than twice 0.01
    # That it is the copies' doing:
    lost, _ = steps(optax.adam(1e-4), trainable, 100)
    assert (np.asarray(lost["scale"]) == np.asarray(trainable["scale"])).mean() >= 0.7


@narrow
def test_the_copies_go_the_way_of_a_float32_run(dtype: str) -> None:
    """Decay, schedules, rates in the state, LoRA+ ratios, clipping and accumulation within, to the bits.

    Numbers that don't come near zero: where one changes its sign, the leaf can't follow to the bit.
    """
    params = jax.tree.map(lambda leaf: leaf + jnp.where(leaf < 0, -1, 1).astype(dtype), base(dtype))
    labels, trainable, _ = split(params)
    labels["bias"] = "bias"
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)

    def inner(rate: Any) -> optax.GradientTransformation:
        adamw = optax.chain(
            optax.clip_by_global_norm(0.3),
            optax.scale_by_adam(),
            optax.add_decayed_weights(0.3),
            optax.scale_by_schedule(optax.linear_schedule(1.0, 0.2, 9)),
            optax.inject_hyperparams(optax.scale_by_learning_rate)(rate),
        )
        return optax.MultiSteps(adamw, 2).gradient_transformation()

    tx = lj.make_optimizer({"full": inner(3e-4), "bias": inner(7e-4)}, labels, rate_ratios={"bias": 16.0})
    gradient = functools.partial(jnp.full_like, fill_value=0.375)  # of 2 bits
    after, state = steps(tx, trainable, 12, gradient)
    wanted, wanted_state = steps(tx, wide, 12, gradient)
    assert isinstance(state, Masters)
    chex.assert_trees_all_equal(state.copies, wanted)
    chex.assert_trees_all_equal(state.inner, wanted_state)
    assert np.max(list(map(ulps, *map(jax.tree.leaves, (after, wanted))))) <= 0.51
    chex.assert_trees_all_equal_shapes_and_dtypes(after, trainable)


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_leaf_below_float32_has_one_and_no_other(name: str) -> None:
    """Norms, biases, heads; not factors, vectors, inserted arrays and masked values, which are float32; nothing frozen.

    Of the trainable part and of the whole tree alike.
    """
    case = row("all", "bfloat16")
    method = case.method(name)
    params = lj.attach(case.params, method, key=KEY)
    labels, trainable, _ = split(params, method)
    tx = lj.make_optimizer(optax.adam(1e-3), labels)
    wanted = [
        (jax.tree_util.keystr(path), leaf.shape)
        for (path, leaf), label in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(labels), strict=True
        )
        if label != FROZEN and leaf.dtype == jnp.bfloat16
    ]
    assert wanted
    for tree in (trainable, params):
        state = jax.eval_shape(tx.init, tree)
        found = jax.tree_util.tree_leaves_with_path(state.copies)
        assert [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in found] == wanted
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(jnp.float32)}
        updates, after = jax.eval_shape(tx.update, tree, state, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (tree, state))


def test_float32_runs_keep_their_state() -> None:
    params = base("float32")
    labels, _, _ = split(params)
    tx = lj.make_optimizer(optax.adam(1e-3), labels)
    plain = optax.multi_transform({FROZEN: optax.set_to_zero(), "full": optax.adam(1e-3)}, labels)
    chex.assert_trees_all_equal(tx.init(params), plain.init(params))
    assert str(jax.make_jaxpr(tx.update)(params, tx.init(params))) == str(
        jax.make_jaxpr(plain.update)(params, plain.init(params))
    )


@narrow
def test_the_leaf_has_the_last_word(dtype: str) -> None:
    """What is changed elsewhere, a head drawn anew, a projection onto a sphere, isn't undone by the next update."""
    labels, trainable, _ = split(base(dtype))
    tx = lj.make_optimizer(optax.sgd(1e-4), labels)
    trainable, state = steps(tx, trainable, 3)
    changed = {**trainable, "scale": trainable["scale"] / 2, "bias": jnp.zeros_like(trainable["bias"])}
    after, state = one_step(tx, changed, state, jax.tree.map(jnp.zeros_like, changed))
    np.testing.assert_array_equal(after["scale"], changed["scale"])
    np.testing.assert_array_equal(state.copies["bias"], 0)
    np.testing.assert_array_equal(after["kernel"], trainable["kernel"])
    assert (np.asarray(state.copies["kernel"]) != np.asarray(trainable["kernel"], np.float32)).any()


@narrow
def test_large_steps_arrive(dtype: str) -> None:
    """Signs change and numbers grow a thousandfold: to half a unit in the last place of the step."""
    labels, trainable, _ = split(base(dtype))
    tx = lj.make_optimizer(optax.sgd(1.0), labels)
    rng = np.random.default_rng(2)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 3, leaf.shape), dtype), trainable)
    after, state = one_step(tx, trainable, tx.init(trainable), gradients)
    updates = jax.tree.map(jnp.negative, gradients)
    for leaf, copy, update in zip(*map(jax.tree.leaves, (after, state.copies, updates)), strict=True):
        unit = float(jnp.finfo(dtype).eps) * np.maximum(
            np.abs(np.asarray(update, np.float64)), np.abs(np.asarray(copy))
        )
        assert (np.abs(np.asarray(leaf, np.float64) - np.asarray(copy)) <= unit).all()


def test_a_step_that_donates_leaves_the_base_whole_and_no_buffer_twice() -> None:
    params = base("bfloat16")
    kept = jax.tree.map(np.array, params)
    labels, trainable, _ = split(params)

    def keeps_its_start(params: Any) -> Any:
        return params

    reference = optax.GradientTransformation(keeps_its_start, lambda updates, state, params=None: (updates, state))
    tx = lj.make_optimizer(optax.chain(reference, optax.adam(1e-3)), labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable: Any, state: Any) -> Any:
        updates, state = tx.update(jax.tree.map(jnp.ones_like, trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for _ in range(2):
        trainable, state = step(trainable, state)
    chex.assert_trees_all_equal(params, kept)


def test_copies_lie_where_their_leaves_do() -> None:
    mesh = jax.make_mesh((2,), ("d",))
    place = NamedSharding(mesh, P("d"))
    params = {"kernel": jax.device_put(jnp.ones((4, 2), jnp.bfloat16), place)}
    labels, trainable, _ = split(params, lj.FullFineTune())
    state: Any = lj.make_optimizer(optax.adam(1e-3), labels).init(trainable)
    assert state.copies["kernel"].sharding.is_equivalent_to(place, 2)


def test_without_parameters_it_is_refused() -> None:
    labels, trainable, _ = split(base("bfloat16"))
    tx = lj.make_optimizer(optax.sgd(1e-3), labels)
    with pytest.raises(ValueError, match="`params` is missing: some trained leaves have fewer bits than float32"):
        tx.update(trainable, tx.init(trainable))


def test_under_strict_promotion() -> None:
    labels, trainable, _ = split(base("bfloat16"))
    with jax.numpy_dtype_promotion("strict"):
        steps(lj.make_optimizer(optax.sgd(1e-3), labels), trainable, 1)


def test_a_transformation_for_frozen_leaves_makes_no_copies_of_them() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    tx = lj.make_optimizer({"frozen": optax.set_to_zero(), "bias": optax.sgd(1.0)}, {"w": FROZEN, "b": "bias"})
    state = tx.init(params)
    assert not isinstance(state, Masters)
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, params), state)[0]
    assert updates["b"].tolist() == [-1, -1]
