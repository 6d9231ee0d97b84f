"""The outputs of a model for every sequence, batch by batch, without dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.types import PyTree

from ..data.batching import AnyBatch, Sequences, plan_in_order
from ..data.buckets import cover
from ..errors import TrainingError
from ..task import Task
from .step import ModelApply

_AHEAD = 4  # batches that are dispatched before the host waits for one

Forward = Callable[[PyTree, AnyBatch], jax.Array]


def make_forward(apply: ModelApply, task: Task) -> Forward:
    """Makes a jitted `forward(params, batch)` without dropout, which returns `task.summarize` of its outputs."""

    @jax.jit
    def forward(params: PyTree, batch: AnyBatch) -> jax.Array:
        model = functools.partial(apply, params, **batch.inputs)
        return task.summarize_model(model, jnp.asarray(batch.targets), jnp.asarray(batch.weights))

    return forward


def predict_outputs(forward: Forward, params: PyTree, rows: Sequences, *, buckets: Sequence[int]) -> np.ndarray:
    """The results of `forward` for all rows, in their order: float32 `(rows, …)`."""
    lengths = rows.lengths
    buckets = cover(buckets, int(lengths.max()), rows.max_length)
    size = min(rows.largest_batch, 1 << (rows.num_sequences - 1).bit_length())
    plans = plan_in_order(lengths, buckets, batch_size=size)
    parts: list[jax.Array] = []
    for plan in plans:
        parts.append(forward(params, rows.batch(plan, size)))
        # A few are dispatched ahead, so that the device doesn't wait for the host; not all, as each takes memory.
        if len(parts) > _AHEAD:
            parts[-1 - _AHEAD].block_until_ready()
    outputs = np.empty((rows.num_sequences, *parts[0].shape[1:]), np.float32)
    for plan, part in zip(plans, parts, strict=True):
        outputs[plan.indices] = np.asarray(part, np.float32)[: len(plan.indices)]
    return outputs


def check_outputs(outputs: np.ndarray) -> np.ndarray:
    """The outputs unchanged, if they are finite: no prediction is made from NaN.

    Raises:
        TrainingError: An output isn't finite; the text is named.
    """
    finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
    if not finite.all():
        raise TrainingError(
            f"The model gives NaN or an infinity for text {int(finite.argmin()) + 1} of {len(outputs)}: its parameters "
            "are damaged, or too large for its dtype. Check where the base and the adapter come from."
        )
    return outputs
