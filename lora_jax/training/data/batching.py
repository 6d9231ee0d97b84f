"""Batches of one shape a bucket: shuffled by seed and epoch, resumable at any step, the last one filled up.

A batch holds rows of similar length. Each epoch shuffles all rows, deals them to their buckets, and cuts a batch
whenever a bucket has enough; what remains at the end is joined across buckets, so an epoch has `ceil(rows / size)`
batches as it would without buckets. The order of the batches is then shuffled too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from .buckets import bucket_of
from .encoding import Encoded


class AnyBatch(Protocol):
    """One batch of any task, on the host; a pytree.

    Attributes:
        targets: `(size, …)`, whose losses are summed.
        weights: float32, of the targets' shape: 0 where nothing is to be learnt.
        inputs: the arguments of the model's apply, by name.
        tokens: how many there are in the batch's own rows.
    """

    @property
    def targets(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def inputs(self) -> dict[str, Any]: ...
    @property
    def tokens(self) -> int: ...


class Rows(Protocol):
    """The rows of a split, ready for batching.

    Attributes:
        targets: what `Task.measure` takes.
        lengths: tokens of each row.
        rows, max_length: how many, and the most tokens of one.
        truncated, dropped: how many texts lost their end, and how many were left out.
        largest_batch: rows that are evaluated at once.
    """

    @property
    def targets(self) -> Any: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def rows(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def truncated(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def largest_batch(self) -> int: ...
    def batch(self, plan: BatchPlan, size: int) -> AnyBatch:
        """The rows of a plan, padded, and others of weight 0 that fill the batch up."""
        ...

    def fingerprint(self) -> str:
        """A hash: a run resumes on the data that it began with, or not at all."""
        ...

    def notes(self, split: str) -> list[str]:
        """What was lost, in words."""
        ...

    def describe(self) -> str:
        """How many there are, in words."""
        ...


class Batch(NamedTuple):
    """One batch of labelled texts, on the host; a pytree.

    Attributes:
        input_ids, attention_mask, token_type_ids: int32 `(size, length)`.
        targets: int32 or float32 `(size,)`.
        weights: float32 `(size,)`, 0 for a row that only fills the batch up.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "token_type_ids")}

    @property
    def tokens(self) -> int:
        return int(self.attention_mask[self.weights > 0].sum())


class BatchPlan(NamedTuple):
    """Which rows make up a batch, and the length that they are padded to."""

    rows: np.ndarray
    length: int


def plan_epoch(
    lengths: np.ndarray, buckets: Sequence[int], *, batch_size: int, seed: int, epoch: int
) -> list[BatchPlan]:
    """The batches of one epoch: a pure function of its arguments, so any batch can be made again at any time."""
    shuffled = _shuffled(len(lengths), _seed(seed, epoch, 0))
    places = bucket_of(lengths, buckets)

    groups: list[np.ndarray] = []
    remainders: list[np.ndarray] = []
    for place in range(len(buckets)):
        members = shuffled[places[shuffled] == place]
        whole = len(members) - len(members) % batch_size
        groups += np.split(members[:whole], whole // batch_size) if whole else []
        remainders.append(members[whole:])
    rest = np.concatenate(remainders)
    groups += [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]

    plans = [BatchPlan(group, buckets[places[group].max()]) for group in groups]
    return [plans[i] for i in _shuffled(len(plans), _seed(seed, epoch, 1))]


def plan_in_order(lengths: np.ndarray, buckets: Sequence[int], *, batch_size: int) -> list[BatchPlan]:
    """Batches for evaluation: rows sorted by length, so that each is padded as little as can be."""
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [BatchPlan(group, buckets[int(bucket_of(lengths[group].max(), buckets))]) for group in groups]


def collate(encoded: Encoded, targets: np.ndarray, plan: BatchPlan, *, batch_size: int, pad_id: int) -> Batch:
    """Pads the rows of a plan to its length, and the batch to its size with copies of weight 0.

    A copy and not an empty row: attention over nothing but padding is 0/0.
    """
    rows = np.resize(plan.rows, batch_size)
    shape = (batch_size, plan.length)
    ids, mask, types = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        start, end = encoded.offsets[row], encoded.offsets[row + 1]
        ids[i, : end - start] = encoded.ids[start:end]
        types[i, : end - start] = encoded.types[start:end]
        mask[i, : end - start] = 1
    weights = (np.arange(batch_size) < len(plan.rows)).astype(np.float32)
    return Batch(ids, mask, types, targets[rows], weights)


class TrainingBatches:
    """The batches of a whole run, by step, or from an iterator whose state is one number.

    Args:
        rows: the training rows.
        buckets: ascending lengths that cover every row.
        batch_size: rows of a batch.
        seed: of the order.
        steps: how many batches there are; a run of several epochs plans each when it gets there.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        steps: int,
    ) -> None:
        self.steps = steps
        self.steps_per_epoch = -(-rows.rows // batch_size)
        lengths = rows.lengths

        @functools.lru_cache(maxsize=2)  # the epoch at hand, and the next, which prefetching may have begun
        def plans(epoch: int) -> list[BatchPlan]:
            return plan_epoch(lengths, buckets, batch_size=batch_size, seed=seed, epoch=epoch)

        def batch(step: int) -> AnyBatch:
            return rows.batch(plans(step // self.steps_per_epoch)[step % self.steps_per_epoch], batch_size)

        self._batch = batch

    def batch(self, step: int) -> AnyBatch:
        """The batch of one step, counted from 0."""
        return self._batch(step)

    def iterator(self, position: int = 0) -> grain.DatasetIterator[AnyBatch]:
        """Batches from `position` on, made ahead of time in a thread; `get_state` tells the position."""
        dataset = grain.MapDataset.range(self.steps).map(self._batch)
        iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        iterator.set_state({"next_index": position})
        return iterator


def padding_share(tokens: int, slots: int) -> float:
    """The share of a batch's places that hold no token of its own rows."""
    return 1 - tokens / slots if slots else 0.0


def _shuffled(count: int, seed: int) -> np.ndarray:
    order = grain.MapDataset.range(count).shuffle(seed=seed)
    return np.array([order[i] for i in range(count)])


def _seed(seed: int, epoch: int, use: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1)[0])
