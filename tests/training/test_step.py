"""The training step, on a model small enough to check by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.data.batching import Batch
from lora_jax.training.run.step import TrainState, make_step
from lora_jax.training.task import Classification

TASK = Classification(labels=("a", "b", "c"))
METHOD = lj.LoRA(rank=2, alpha=4, targets=("dense",), also_train=("classifier",))


def model(params, input_ids, attention_mask: Any = None, token_type_ids=None, *, dropout_key=None):
    x, mask = params["table"][input_ids], attention_mask
    mask = mask.astype(x.dtype)
    x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    x = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    if dropout_key is not None:
        x = x * jax.random.bernoulli(dropout_key, 0.5, x.shape).astype(x.dtype) * 2
    return x @ params["classifier"]["kernel"]


def parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "table": jax.random.normal(keys[0], (50, 6)),
        "dense": {"kernel": jax.random.normal(keys[1], (6, 5)), "bias": jnp.zeros(5)},
        "classifier": {"kernel": jax.random.normal(keys[2], (5, 3))},
    }
    params = lj.attach(params, METHOD, key=keys[3])
    b = params["dense"]["kernel"].b
    params["dense"]["kernel"] = type(params["dense"]["kernel"])(
        params["dense"]["kernel"].base,
        params["dense"]["kernel"].a,
        jax.random.normal(keys[3], b.shape),
        scale=params["dense"]["kernel"].scale,
        axes=params["dense"]["kernel"].axes,
    )
    return params


def batch(size=8, real=None, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, (size, 4)).astype(np.int32)
    mask = np.ones((size, 4), np.int32)
    mask[::2, 3] = 0
    weights = (np.arange(size) < (real or size)).astype(np.float32)
    return Batch(ids, mask, np.zeros_like(ids), rng.integers(0, 3, size).astype(np.int32), weights)


def start(tx):
    params = parameters()
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, METHOD))
    return TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32)), frozen


def run(tx=None, *, batch, **options):
    tx = tx or optax.sgd(1.0)
    state, frozen = start(tx)
    options = {"model_dropout": False, **options}
    return make_step(lj.adapt(model), TASK, tx, **options)(state, frozen, batch, jax.random.key(1))


def assert_close(ours, theirs, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), ours, theirs)


def test_loss_and_count_are_means_over_the_batch():
    state, frozen = start(optax.sgd(1.0))
    data = batch()
    logits = model(lj.merge_params(lj.combine(state.trainable, frozen)), data.input_ids, data.attention_mask)
    _, output = run(batch=data)
    np.testing.assert_allclose(output.loss, TASK.losses(logits, jnp.asarray(data.targets)).mean(), rtol=1e-5)
    assert float(output.correct) == float((logits.argmax(-1) == data.targets).sum())
    assert float(output.targets) == 8


def test_update_is_the_gradient_of_the_mean_loss():
    state, frozen = start(optax.sgd(1.0))
    data = batch()

    def loss(trainable):
        logits = model(lj.merge_params(lj.combine(trainable, frozen)), data.input_ids, data.attention_mask)
        return TASK.losses(logits, jnp.asarray(data.targets)).mean()

    grads = jax.grad(loss)(state.trainable)
    expected = jax.tree.map(lambda p, g: p - g, state.trainable, grads)
    after, output = run(batch=data)
    assert_close(after.trainable, expected)
    np.testing.assert_allclose(output.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    assert int(after.step) == 1


def test_rows_of_weight_0_change_nothing():
    padded = batch(size=8, real=5)
    alone = jax.tree.map(lambda x: x[:5], padded)
    (ours, our_output), (theirs, their_output) = run(batch=padded), run(batch=alone)
    assert_close(ours.trainable, theirs.trainable)
    assert_close(our_output, their_output)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_memory_not_the_result(parts):
    data = batch(size=8, real=5)  # the last part has no row of its own
    (ours, our_output), (theirs, their_output) = run(batch=data, accumulate=parts), run(batch=data)
    assert_close(ours.trainable, theirs.trainable)
    assert_close(our_output, their_output)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_leaves_are_added_up_in_float32(dtype):
    """Parts whose gradients are small beside their sum count: 1 + 32 · 2⁻⁹ in bfloat16 would stay 1."""
    small = float(jnp.finfo(dtype).eps) / 4
    gradients = jnp.concatenate([jnp.ones((1, 1)), jnp.full((32, 1), small), jnp.zeros((31, 1))])

    def linear(params, input_ids, attention_mask=None, token_type_ids=None, *, dropout_key=None):
        return (gradients[input_ids[:, 0]] * params["w"].astype(jnp.float32)[None]).sum(1)

    class Sum(Classification):
        def losses(self, outputs, targets):
            return outputs

        def correct(self, outputs, targets):
            return outputs

    trainable = {"w": jnp.full(1, 2.0, dtype)}
    tx = lj.make_optimizer(optax.sgd(64.0), {"w": "full"})
    state = TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32))
    data = batch(size=64)._replace(input_ids=np.repeat(np.arange(64, dtype=np.int32)[:, None], 4, 1))
    step = make_step(linear, Sum(labels=("a", "b")), tx, accumulate=64, model_dropout=False)
    after, output = step(state, {"w": None}, data, jax.random.key(0))
    assert float(output.grad_norm) == (1 + 32 * small) / 64
    assert float(after.optimizer.copies["w"][0]) == 2.0 - (1 + 32 * small)
    assert after.trainable["w"].dtype == dtype


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_cuts_the_norm_of_the_trainable_gradient(accumulate):
    before = start(optax.sgd(1.0))[0].trainable
    after, output = run(batch=batch(), clip_norm=0.01, accumulate=accumulate)
    assert float(output.grad_norm) > 0.01  # as it was before
    moved = jax.tree.map(jnp.subtract, before, after.trainable)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.01, rtol=1e-3)

    loose, _ = run(batch=batch(), clip_norm=1e3, accumulate=accumulate)
    assert_close(loose.trainable, run(batch=batch())[0].trainable)


def test_frozen_leaves_have_no_gradient_and_no_state():
    tx = optax.adamw(1e-2)
    state, frozen = start(tx)
    trained = {leaf.shape for leaf in jax.tree.leaves(state.trainable)}
    assert trained == {(2, 6), (2, 5), (5, 3)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer)} == trained | {()}
    copies = jax.tree.map(np.array, frozen)
    make_step(lj.adapt(model), TASK, tx)(state, frozen, batch(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, frozen, copies)


def test_dropout_follows_key_and_step():
    tx = optax.set_to_zero()
    step = make_step(lj.adapt(model), TASK, tx, model_dropout=True)

    def losses(seed):
        state, frozen = start(tx)
        found = []
        for _ in range(3):
            state, output = step(state, frozen, batch(), jax.random.key(seed))
            found.append(float(output.loss))
        return found

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 6
    assert float(run(batch=batch())[1].loss) not in losses(0)  # off without a key


def test_one_program_a_shape():
    traces = []

    def counted(params, *, input_ids, **kwargs):
        traces.append(input_ids.shape)
        return model(params, input_ids, **kwargs)

    tx = optax.adamw(1e-2)
    step = make_step(lj.adapt(counted), TASK, tx)
    state, frozen = start(tx)
    for seed in range(3):
        state, _ = step(state, frozen, batch(seed=seed), jax.random.key(0))
        state, _ = step(state, frozen, batch(size=4, seed=seed), jax.random.key(0))
    assert sorted(set(traces)) == [(4, 4), (8, 4)]
    assert len(traces) == 2


def test_the_base_is_no_constant_of_the_program():
    tx = optax.sgd(1.0)
    state, frozen = start(tx)
    text = make_step(lj.adapt(model), TASK, tx).lower(state, frozen, batch(), jax.random.key(0)).as_text()
    assert "tensor<50x6xf32>" in text  # an argument
    assert not any("constant" in line and "tensor<50x6xf32>" in line for line in text.splitlines())
