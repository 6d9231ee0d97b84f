"""Schedules by their formula; rates and decay by label."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.config import TrainConfig, resolve
from lora_jax.training.errors import ConfigError
from lora_jax.training.run.schedule import adamw_by_label, make_schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.06])
def test_schedule_follows_its_formula(kind, warmup):
    steps, peak = 100, 3e-3
    schedule = make_schedule(kind, peak=peak, steps=steps, warmup=warmup)
    w = math.ceil(warmup * steps)
    for t in range(steps):
        u = (t - w) / (steps - w)
        after = {"linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2, "constant": 1.0}[kind]
        assert float(np.asarray(schedule(t))) == pytest.approx(
            peak * (t / w if t < w else after), rel=1e-5, abs=1e-6 * peak
        )


def test_schedule_of_one_step():
    assert np.asarray(make_schedule("linear", peak=1.0, steps=1, warmup=0.0)(0)) == 1.0


def adapted():
    method = lj.LoRA(rank=2, alpha=2, targets=("w",), also_train=("classifier",))
    params = lj.attach({"w": jnp.ones((4, 4)), "classifier": jnp.ones(3)}, method, key=jax.random.key(0))
    return params, method


def update(**options) -> Any:
    params, method = adapted()
    config = TrainConfig(train="a", output="b", method=method, warmup=0.0, schedule="constant", **options)
    tx = adamw_by_label(resolve(config), lj.label_params(params, method), steps=10)
    trainable, _ = lj.partition(params, lj.trainable_mask(params, method))
    grads = jax.tree.map(jnp.ones_like, trainable)
    return tx.update(grads, tx.init(trainable), trainable)[0]


def test_rates_by_label():
    # The first step of Adam is the rate itself.
    updates = update(lr={"lora_a": 1e-3, "lora_b": 4e-3, "head": 2e-3}, weight_decay=0.0)
    np.testing.assert_allclose(updates["w"].a, -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["w"].b, -4e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["classifier"], -2e-3, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus(decay: float):
    """The ratio is `rate_ratios` of the core: of the whole update, decay included, and of `b` alone."""
    params, method = adapted()
    labels = lj.label_params(params, method)
    trainable, _ = lj.partition(params, lj.trainable_mask(params, method))
    grads = jax.tree.map(jnp.ones_like, trainable)
    plain = optax.adamw(1e-3, weight_decay=decay)
    tx = lj.make_optimizer(plain, labels, rate_ratios={"lora_b": 16.0})
    wanted = tx.update(grads, tx.init(trainable), trainable)[0]
    updates = update(lr=1e-3, weight_decay=decay, lora_plus_ratio=16)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
    np.testing.assert_allclose(updates["w"].b / update(lr=1e-3, weight_decay=decay)["w"].b, 16, rtol=1e-5)


def test_decay_by_label():
    updates = update(lr=1e-3, weight_decay={"lora_a": 0.0, "lora_b": 0.0, "head": 0.5})
    np.testing.assert_allclose(updates["classifier"], -1e-3 * (1 + 0.5), rtol=1e-4)
    np.testing.assert_allclose(updates["w"].a, -1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            {"lora_a": 1e-3, "lora_b": 1e-3},
            r"`lr` must have the labels .*, head, lora_a, lora_b, got lora_a, lora_b: 'head' is missing",
        ),
        ({"lora_a": 1, "lora_b": 1, "head": 1, "bias": 1}, r"'bias' is not trained"),
    ],
)
def test_labels_must_be_those_trained(rates, message):
    with pytest.raises(ConfigError, match=message):
        update(lr=rates)
