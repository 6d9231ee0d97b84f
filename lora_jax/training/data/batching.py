"""Batches with one shape per bucket, shuffled by seed and epoch and resumable at any step.

A batch holds sequences of similar length. Each epoch shuffles all sequences, sorts them into buckets, and takes a batch
whenever a bucket has enough. The remainders are joined across buckets, so that an epoch has `ceil(sequences / size)`
batches as it would without buckets. Finally the order of the batches is shuffled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from .buckets import bucket_of
from .encoding import Encoded


class AnyBatch(Protocol):
    """One batch of any task, on the host; a pytree.

    Attributes:
        targets: `(size, …)`; their losses are summed.
        weights: float32 of the targets' shape; 0 for targets that aren't learned.
        inputs: Arguments of the model's apply, by name.
        tokens: Number of tokens, without padding and filling.
    """

    @property
    def targets(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray: ...
    @property
    def inputs(self) -> dict[str, np.ndarray]: ...
    @property
    def tokens(self) -> int: ...


class Sequences(Protocol):
    """The token sequences of a split, ready for batching.

    Attributes:
        targets: Targets as `Task.measure` takes them.
        lengths: Number of tokens of each sequence.
        num_sequences: Number of sequences.
        max_length: Most tokens of a sequence.
        truncated, dropped: Number of texts that were truncated, and that were left out.
        largest_batch: Most sequences in an evaluation batch.
    """

    @property
    def targets(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def truncated(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def largest_batch(self) -> int: ...
    def batch(self, plan: BatchPlan, size: int) -> AnyBatch:
        """The sequences of a plan, padded, with copies of weight 0 to fill the batch."""
        ...

    def fingerprint(self) -> str:
        """A hash: a run only resumes on the data that it began with."""
        ...

    def notes(self, split: str) -> list[str]:
        """Notes on truncated and dropped texts."""
        ...

    def describe(self) -> str:
        """The number of sequences, in words."""
        ...


class Batch(NamedTuple):
    """One batch of labelled texts, on the host; a pytree.

    Attributes:
        input_ids, attention_mask, token_type_ids: int32 `(size, length)`.
        targets: int32 or float32 `(size,)`.
        weights: float32 `(size,)`; 0 for a copy that fills the batch.
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
    """The indices of the sequences in a batch, and the length that they are padded to."""

    indices: np.ndarray
    length: int


def plan_epoch(
    lengths: np.ndarray, buckets: Sequence[int], *, batch_size: int, seed: int, epoch: int
) -> list[BatchPlan]:
    """The batches of one epoch; a pure function, so that any batch can be made again at any time."""
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
    """Batches for evaluation, sorted by length so that padding is minimal."""
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [BatchPlan(group, buckets[int(bucket_of(lengths[group].max(), buckets))]) for group in groups]


def collate(encoded: Encoded, targets: np.ndarray, plan: BatchPlan, *, batch_size: int, pad_id: int) -> Batch:
    """Pads the sequences of a plan to its length, and fills the batch with copies of weight 0.

    Copies are used because attention over padding alone is 0/0.
    """
    indices = np.resize(plan.indices, batch_size)
    shape = (batch_size, plan.length)
    ids, mask, types = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, index in enumerate(indices):
        start, end = encoded.offsets[index], encoded.offsets[index + 1]
        ids[i, : end - start] = encoded.ids[start:end]
        types[i, : end - start] = encoded.types[start:end]
        mask[i, : end - start] = 1
    weights = (np.arange(batch_size) < len(plan.indices)).astype(np.float32)
    return Batch(ids, mask, types, targets[indices], weights)


class TrainingBatches:
    """The batches of a run, by step, or from an iterator whose state is one number.

    Args:
        sequences: Training sequences.
        buckets: Ascending lengths that cover every sequence.
        batch_size: Sequences per batch.
        seed: Seed of the order.
        steps: Number of batches. Each epoch is planned when it is reached.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        steps: int,
    ) -> None:
        self.steps = steps
        self.steps_per_epoch = -(-sequences.num_sequences // batch_size)
        lengths = sequences.lengths

        @functools.lru_cache(maxsize=2)  # this epoch and the next, which prefetching may have reached
        def plans(epoch: int) -> list[BatchPlan]:
            return plan_epoch(lengths, buckets, batch_size=batch_size, seed=seed, epoch=epoch)

        def batch(step: int) -> AnyBatch:
            return sequences.batch(plans(step // self.steps_per_epoch)[step % self.steps_per_epoch], batch_size)

        self._batch = batch

    def batch(self, step: int) -> AnyBatch:
        """The batch of one step, counted from 0."""
        return self._batch(step)

    def iterator(self, position: int = 0) -> grain.DatasetIterator[AnyBatch]:
        """Batches from `position` on, prefetched in a thread; `get_state` gives the position."""
        dataset = grain.MapDataset.range(self.steps).map(self._batch)
        iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        iterator.set_state({"next_index": position})
        return iterator


def padding_share(tokens: int, slots: int) -> float:
    """The share of a batch's slots that are padding or filling."""
    return 1 - tokens / slots if slots else 0.0


def _shuffled(count: int, seed: int) -> np.ndarray:
    order = grain.MapDataset.range(count).shuffle(seed=seed)
    return np.array([order[i] for i in range(count)])


def _seed(seed: int, epoch: int, use: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1)[0])
