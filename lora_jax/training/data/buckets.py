"""Chooses the few lengths that batches are padded to: one compiled program each, and little padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

MULTIPLE = 8  # suits vector units and tensor cores
PROGRAM = 20  # time to compile one more program, in steps


def choose_buckets(lengths: np.ndarray, *, count: int | None, max_length: int, steps: int = 0) -> tuple[int, ...]:
    """The lengths that pad the fewest tokens: `min Σᵢ (bucket(lengthᵢ) − lengthᵢ)`.

    Candidates are the multiples of 8 and `max_length`; the best set of each size is found exactly, by dynamic
    programming over "the last bucket is the j-th candidate".

    Args:
        lengths: Tokens of each sequence, `(sequences,)`; none above `max_length`.
        count: Most buckets. With `None`, the number minimizes `steps · Σᵢ bucket(lengthᵢ) / Σᵢ lengthᵢ + 20 · buckets`,
            since compiling one more program takes about as long as 20 steps.
        max_length: Length of the longest possible bucket.
        steps: Steps of the run; unused if `count` is given.

    Returns:
        Ascending lengths; the last one fits the longest sequence.

    Example:
        >>> choose_buckets(np.array([3, 7, 8, 30, 31]), count=2, max_length=64)
        (8, 32)
        >>> lengths = np.array([8, 8, 16, 32])
        >>> [choose_buckets(lengths, count=None, max_length=64, steps=steps) for steps in (1, 50, 500)]
        [(32,), (8, 32), (8, 16, 32)]
    """
    if count is not None and count < 1:
        raise ConfigError(f"`buckets` must be at least 1, got {count}.")
    longest = int(lengths.max())
    candidates = [*range(MULTIPLE, longest, MULTIPLE), min(-(-longest // MULTIPLE) * MULTIPLE, max_length)]
    count_up_to = np.searchsorted(np.sort(lengths), candidates, side="right")
    before = np.concatenate([[0], count_up_to])

    # cost[j]: slots of all sequences up to candidate j if j is a bucket.
    cost = np.array(candidates) * count_up_to
    chosen: list[list[int]] = [[j] for j in range(len(candidates))]
    best = [(cost[-1], chosen[-1])]  # with one bucket, with at most two, …
    for _ in range(min(count or len(candidates), len(candidates)) - 1):
        new_cost, new_chosen = cost.copy(), list(chosen)
        for j in range(1, len(candidates)):
            through = cost[:j] + candidates[j] * (before[j + 1] - before[1 : j + 1])
            last = int(through.argmin())
            if through[last] < new_cost[j]:
                new_cost[j], new_chosen[j] = through[last], [*chosen[last], j]
        cost, chosen = new_cost, new_chosen
        best.append((cost[-1], chosen[-1]))

    def time(option: tuple[int, list[int]]) -> float:
        slots, buckets = option
        return steps * slots / int(lengths.sum()) + PROGRAM * len(buckets)

    _, buckets = best[-1] if count is not None else min(best, key=time)
    return tuple(candidates[j] for j in buckets)


def cover(buckets: Sequence[int], longest: int, max_length: int) -> tuple[int, ...]:
    """`buckets`, and one more if a sequence (of another split) is longer than all of them."""
    if longest <= buckets[-1]:
        return tuple(buckets)
    return (*buckets, min(-(-longest // MULTIPLE) * MULTIPLE, max_length))


def bucket_of(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The index of the shortest bucket that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")
