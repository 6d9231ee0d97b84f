"""What a model gives of every row, batch by batch, without dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.batching import AnyBatch, Rows, plan_in_order
from ..data.buckets import cover
from ..errors import TrainingError
from ..task import Task
from .step import ModelApply

_AHEAD = 4  # batches that are dispatched before one is waited for

Forward = Callable[[Any, AnyBatch], jax.Array]


def make_forward(apply: ModelApply, task: Task) -> Forward:
    """A jitted `forward(params, batch)` without dropout: what `task.summarize` gives, `(size, …)`."""

    @jax.jit
    def forward(params: Any, batch: AnyBatch) -> jax.Array:
        model = functools.partial(apply, params, **batch.inputs)
        return task.summarize_model(model, jnp.asarray(batch.targets), jnp.asarray(batch.weights))

    return forward


def predict_outputs(forward: Forward, params: Any, rows: Rows, *, buckets: Sequence[int]) -> np.ndarray:
    """What `forward` gives of every row, in the rows' order: float32 `(rows, …)`."""
    lengths = rows.lengths
    buckets = cover(buckets, int(lengths.max()), rows.max_length)
    size = min(rows.largest_batch, 1 << (rows.rows - 1).bit_length())
    plans = plan_in_order(lengths, buckets, batch_size=size)
    parts: list[jax.Array] = []
    for plan in plans:
        parts.append(forward(params, rows.batch(plan, size)))
        # Some are dispatched ahead, so that the device doesn't wait for the host; not all, as each takes memory.
        if len(parts) > _AHEAD:
            parts[-1 - _AHEAD].block_until_ready()
    outputs = np.empty((rows.rows, *parts[0].shape[1:]), np.float32)
    for plan, part in zip(plans, parts, strict=True):
        outputs[plan.rows] = np.asarray(part, np.float32)[: len(plan.rows)]
    return outputs


def check_outputs(outputs: np.ndarray) -> np.ndarray:
    """The outputs as they are: an answer is never made of NaN.

    Raises:
        TrainingError: An output that isn't finite; the text is named.
    """
    finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
    if not finite.all():
        raise TrainingError(
            f"The model gives NaN or an infinity for text {int(finite.argmin()) + 1} of {len(outputs)}: its parameters "
            "are damaged, or too large for its `dtype`. Check where the base and the adapter come from."
        )
    return outputs
