"""The jitted training step: one update of the trainable leaves from one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax.masters import widened
from lora_jax.types import PyTree

from ..data.batching import AnyBatch
from ..task import Task


class TrainState(NamedTuple):
    """What a step changes; a pytree.

    Attributes:
        trainable: Trainable part of `lj.partition`.
        optimizer: State of the optimizer.
        step: Number of steps done, int32 `()`.
    """

    trainable: PyTree
    optimizer: PyTree
    step: jax.Array


class StepOutput(NamedTuple):
    """Scalars of a step, on the device: the caller decides when to wait for them.

    Attributes:
        loss: Mean loss over the batch's targets before the update; a target is a label, a number or a token.
        correct: Number of targets that were predicted right.
        targets: Number of targets.
        grad_norm: Global norm of the gradient before clipping.
    """

    loss: jax.Array
    correct: jax.Array
    targets: jax.Array
    grad_norm: jax.Array


# A model's function, see `lj.models.Model`: `apply(params, **batch.inputs, dropout_key=None)`.
ModelApply = Callable[..., Any]
# Sums over a batch: losses, right answers, gradients.
Sums = tuple[jax.Array, jax.Array, PyTree]


class Step(Protocol):
    """A jitted training step."""

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: AnyBatch, key: jax.Array
    ) -> tuple[TrainState, StepOutput]: ...
    def lower(self, state: TrainState, frozen: PyTree, batch: AnyBatch, key: jax.Array) -> jax.stages.Lowered: ...


def make_step(
    apply: ModelApply,
    task: Task,
    tx: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    accumulate: int = 1,
    model_dropout: bool = True,
    compiler_options: Mapping[str, str] | None = None,
) -> Step:
    """Makes `step(state, frozen, batch, key) -> (state, output)`.

    The gradient is that of `Σᵢ wᵢ·lossᵢ / Σᵢ wᵢ` over the batch's targets, with respect to the trainable leaves only.
    Sums over parts, its norm and its clipping are float32 whatever the leaves.

    Args:
        apply: The model's function, wrapped by `lj.adapt`.
        task: Task with the loss.
        tx: Optimizer of the trainable part.
        clip_norm: Largest global norm of the gradient; `None` for no clipping.
        accumulate: Number of parts that a batch is computed in, one after the other in a scan. Their sum is what a
            single part would give, up to rounding (and, with dropout, other draws).
        model_dropout: Whether the model gets a dropout key. LoRA's dropout follows from its own rate.
        compiler_options: Options for `jax.jit`.

    Returns:
        The jitted function. `state` is donated; `frozen` is an argument, so the base isn't built into the program;
        `key` is the run's, folded here with the step. One program is compiled per batch shape.
    """

    def summed_loss(trainable: PyTree, frozen: PyTree, batch: AnyBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        lora_key, model_key = jax.random.split(key)
        params = lj.with_dropout(lj.combine(trainable, frozen), lora_key)
        model = functools.partial(apply, params, **batch.inputs, dropout_key=model_key if model_dropout else None)
        weights = jnp.asarray(batch.weights)
        losses, correct = task.score(model, jnp.asarray(batch.targets))
        return jnp.sum(weights * losses), jnp.sum(weights * correct)

    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def sums(trainable: PyTree, frozen: PyTree, batch: AnyBatch, key: jax.Array) -> Sums:
        (loss, correct), grads = value_and_grad(trainable, frozen, batch, key)
        return loss, correct, widened(grads)

    def accumulated_sums(trainable: PyTree, frozen: PyTree, batch: AnyBatch, key: jax.Array) -> Sums:
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(total: Sums, part: tuple[AnyBatch, jax.Array]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, sums(trainable, frozen, *part)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, widened(trainable)))
        return jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))[0]

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=dict(compiler_options or {}))
    def step(state: TrainState, frozen: PyTree, batch: AnyBatch, key: jax.Array) -> tuple[TrainState, StepOutput]:
        key = jax.random.fold_in(key, state.step)
        total = accumulated_sums if accumulate > 1 else sums
        loss, correct, grads = total(state.trainable, frozen, batch, key)
        count = jnp.sum(batch.weights)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, optimizer = tx.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(trainable, optimizer, state.step + 1), StepOutput(loss / count, correct, count, norm)

    return step
