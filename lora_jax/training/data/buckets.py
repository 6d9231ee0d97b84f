"""The few lengths that batches are padded to: one compiled program each, chosen so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

MULTIPLE = 8  # lengths that vector units and tensor cores like
PROGRAM = 20  # steps that take about as long as it takes to compile one more program


def choose_buckets(lengths: np.ndarray, *, count: int | None, max_length: int, steps: int = 0) -> tuple[int, ...]:
    """The lengths that pad the fewest tokens: `min Σᵢ (bucket(lengthᵢ) − lengthᵢ)`.

    Candidates are the multiples of 8 and `max_length`; the best set of each size is found exactly, by dynamic
    programming over "the last bucket is the j-th candidate".

    Args:
        lengths: tokens of each row, `(rows,)`; none above `max_length`.
        count: the most buckets. With `None` there are as many as pay in a run of `steps`: those that minimize
            `steps · Σᵢ bucket(lengthᵢ) / Σᵢ lengthᵢ + 20 · buckets`, since one more program takes about 20 steps' time
            to compile.
        max_length: no bucket is longer.
        steps: of the run; not used with a `count`.

    Returns:
        Ascending lengths; the last holds the longest row.

    Example:
        >>> choose_buckets(np.array([3, 7, 8, 30, 31]), count=2, max_length=64)
        (8, 32)
        >>> lengths = np.array([8, 8, 16, 32])
        >>> [choose_buckets(lengths, count=None, max_length=64, steps=steps) for steps in (1, 50, 500)]
        [(32,), (8, 32), (8, 16, 32)]
    """
    if count is not None and count < 1:
        raise ConfigError(f"`buckets` is {count}, and at least 1 is expected.")
    longest = int(lengths.max())
    candidates = [*range(MULTIPLE, longest, MULTIPLE), min(-(-longest // MULTIPLE) * MULTIPLE, max_length)]
    rows_up_to = np.searchsorted(np.sort(lengths), candidates, side="right")
    before = np.concatenate([[0], rows_up_to])

    # cost[j]: places of every row up to candidate j, when j is a bucket.
    cost = np.array(candidates) * rows_up_to
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
        places, buckets = option
        return steps * places / int(lengths.sum()) + PROGRAM * len(buckets)

    _, buckets = best[-1] if count is not None else min(best, key=time)
    return tuple(candidates[j] for j in buckets)


def cover(buckets: Sequence[int], longest: int, max_length: int) -> tuple[int, ...]:
    """`buckets`, and one more where a row (of another file) is longer than all of them."""
    if longest <= buckets[-1]:
        return tuple(buckets)
    return (*buckets, min(-(-longest // MULTIPLE) * MULTIPLE, max_length))


def bucket_of(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The place in `buckets` of the shortest one that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")
