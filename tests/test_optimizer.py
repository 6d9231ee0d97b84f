from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj

KEY = jax.random.key(0)
METHOD = lj.LoRA(rank=2, alpha=2, targets=("dense",), also_train=("head",))


def tree() -> Any:
    base = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, "head": {"kernel": jnp.ones((3, 2))}}
    return lj.attach(base, METHOD, key=KEY)


def ones_like(params: Any) -> Any:
    return jax.tree.map(jnp.ones_like, params)


def first_updates(tx: Any, params: Any, **extra: Any) -> Any:
    """What the optimizer makes of gradients of one."""
    return tx.update(ones_like(params), tx.init(params), params, **extra)[0]


def trained(tx: Any, params: Any, steps: int = 3) -> tuple[Any, Any]:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(ones_like(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_the_whole_tree_and_the_trainable_part_are_updated_alike() -> None:
    params = tree()
    labels = lj.label_params(params, METHOD)
    tx = lj.make_optimizer(optax.adamw(1e-2), labels)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, METHOD))

    whole, whole_state = trained(tx, params)
    part, part_state = trained(tx, trainable)
    chex.assert_trees_all_close(lj.combine(part, frozen), whole, rtol=1e-7)
    np.testing.assert_array_equal(whole["dense"]["bias"], params["dense"]["bias"])
    np.testing.assert_array_equal(whole["dense"]["kernel"].base, params["dense"]["kernel"].base)
    assert (np.asarray(whole["head"]["kernel"]) < 1).all()
    chex.assert_trees_all_equal_shapes(jax.tree.leaves(part_state), jax.tree.leaves(whole_state))


def test_each_label_may_have_its_own() -> None:
    """LoRA+ gives `lora_b` a higher rate; the transformation of a label that is not there does no harm."""
    params = tree()
    rates = {"lora_a": 0.1, "lora_b": 1.6, "head": 0.0, "bias": 9.0}
    tx = lj.make_optimizer({name: optax.sgd(rate) for name, rate in rates.items()}, lj.label_params(params, METHOD))
    updates = first_updates(tx, params)
    node = updates["dense"]["kernel"]
    np.testing.assert_allclose(node.a, -0.1, rtol=1e-6)
    np.testing.assert_allclose(node.b, -1.6, rtol=1e-6)
    assert not np.any(node.base)
    assert not np.any(updates["head"]["kernel"])
    assert not np.any(updates["dense"]["bias"])


def test_frozen_leaves_do_not_move_whatever_is_asked() -> None:
    """`optax.masked` would pass their raw gradients through; here they get zeros."""
    params = {"w": jnp.ones(2), "bias": jnp.ones(2)}
    tx = lj.make_optimizer(optax.add_decayed_weights(1.0), lj.label_params(params, lj.BitFit()))
    updates = first_updates(tx, params)
    assert updates["w"].tolist() == [0, 0]
    assert updates["bias"].tolist() == [2, 2]


def test_clipping_sees_what_is_trained_alone() -> None:
    """On the trainable part, the global norm is that of trained leaves, be the clipping inside or around."""
    params = {"w": jnp.ones((100, 100)), "bias": jnp.ones(4)}
    labels = lj.label_params(params, lj.BitFit())
    trainable, _ = lj.partition(params, lj.trainable_mask(params, lj.BitFit()))
    clip = optax.clip_by_global_norm(1.0)
    inside = lj.make_optimizer(optax.chain(clip, optax.sgd(1.0)), labels)
    around = optax.chain(clip, lj.make_optimizer(optax.sgd(1.0), labels))
    for tx in (inside, around):
        np.testing.assert_allclose(first_updates(tx, trainable)["bias"], -0.5, rtol=1e-6)


def test_accumulation_keeps_no_frozen_accumulator() -> None:
    params = tree()
    tx = optax.MultiSteps(lj.make_optimizer(optax.adam(1e-3), lj.label_params(params, METHOD)), every_k_schedule=4)
    trainable, _ = lj.partition(params, lj.trainable_mask(params, METHOD))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    state = jax.eval_shape(tx.init, trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 3 * numbers


def test_extra_arguments_reach_the_transformation() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, scale: float) -> Any:
        del params
        return jax.tree.map(lambda update: scale * update, updates), state

    updater: Any = update
    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), updater)
    tx = lj.make_optimizer(scaled, {"bias": "bias"})
    params = {"bias": jnp.ones(2)}
    assert first_updates(tx, params, scale=3.0)["bias"].tolist() == [3, 3]


def test_a_label_without_transformation_is_refused() -> None:
    labels = lj.label_params(tree(), METHOD)
    with pytest.raises(ValueError, match="`tx` has no transformation for the labels head, lora_b; it has lora_a"):
        lj.make_optimizer({"lora_a": optax.sgd(1.0)}, labels)


def test_a_given_transformation_for_frozen_is_kept() -> None:
    labels = {"w": "frozen", "bias": "bias"}
    tx = lj.make_optimizer({"frozen": optax.sgd(1.0), "bias": optax.sgd(2.0)}, labels)
    params = {"w": jnp.ones(1), "bias": jnp.ones(1)}
    assert first_updates(tx, params)["w"].tolist() == [-1]


@pytest.mark.parametrize(
    "optimizer",
    [lambda rate: optax.sgd(rate), lambda rate: optax.adam(rate), lambda rate: optax.adamw(rate, weight_decay=0.3)],
    ids=["sgd", "adam", "adamw"],
)
def test_lora_plus_multiplies_the_rate_of_b(optimizer: Any) -> None:
    """In the first step B's update is λ times what it would be with A's rate, to the bits; no other label's changes."""
    params = tree()
    labels = lj.label_params(params, METHOD)
    plus = first_updates(lj.make_optimizer(optimizer(1e-2), labels, rate_ratios={"lora_b": 16.0}), params)
    plain = first_updates(lj.make_optimizer(optimizer(1e-2), labels), params)
    both = {name: optimizer(rate) for name, rate in {"lora_a": 1e-2, "lora_b": 16e-2, "head": 1e-2}.items()}
    rates = first_updates(lj.make_optimizer(both, labels), params)
    np.testing.assert_array_equal(plus["dense"]["kernel"].b, 16 * plain["dense"]["kernel"].b)
    np.testing.assert_array_equal(plus["dense"]["kernel"].a, plain["dense"]["kernel"].a)
    np.testing.assert_array_equal(plus["head"]["kernel"], plain["head"]["kernel"])
    chex.assert_trees_all_close(plus, rates, rtol=1e-6)


def test_a_ratio_follows_a_schedule() -> None:
    """After some steps of a falling rate the ratio is what it was."""
    params = tree()
    labels = lj.label_params(params, METHOD)
    schedule = optax.linear_schedule(1e-2, 1e-3, 4)
    after, _ = trained(lj.make_optimizer(optax.sgd(schedule), labels, rate_ratios={"lora_b": 4.0}), params)
    moves = jax.tree.map(lambda new, old: new - old, after, params)["dense"]["kernel"]
    np.testing.assert_allclose(moves.b, 4 * moves.a.mean(), rtol=1e-5)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"lora_c": 2.0}, "`rate_ratios` has the label 'lora_c', and what is trained is labelled head, lora_a, lora_b"),
        ({"frozen": 2.0}, "`rate_ratios` has the label 'frozen'"),
        ({"lora_b": -1.0}, "`rate_ratios` must have finite numbers from 0, got -1.0 for 'lora_b'"),
        ({"lora_b": "16"}, "`rate_ratios` must have finite numbers from 0, got '16' for 'lora_b'"),
        ({"lora_b": float("nan")}, "`rate_ratios` must have finite numbers from 0, got nan for 'lora_b'"),
    ],
)
def test_a_ratio_that_means_nothing_is_refused(ratios: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.make_optimizer(optax.sgd(1.0), lj.label_params(tree(), METHOD), rate_ratios=ratios)
