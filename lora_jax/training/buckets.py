"""The few lengths that batches are padded to: one compiled program each, chosen so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import ConfigError

MULTIPLE = 8  # lengths that vector units and tensor cores like


def choose_buckets(lengths: np.ndarray, *, count: int, max_length: int) -> tuple[int, ...]:
    """The at most `count` lengths that pad the fewest tokens: `min Σᵢ (bucket(lengthᵢ) − lengthᵢ)`.

    Candidates are the multiples of 8 and `max_length`; the best set is found exactly, by dynamic programming over
    "the last bucket is the j-th candidate".

    Args:
        lengths: tokens of each row, `(rows,)`; none above `max_length`.
        count: the most buckets.
        max_length: no bucket is longer.

    Returns:
        Ascending lengths; the last holds the longest row.

    Example:
        >>> choose_buckets(np.array([3, 7, 8, 30, 31]), count=2, max_length=64)
        (8, 32)
    """
    if count < 1:
        raise ConfigError(f"`buckets` is {count}, and at least 1 is expected.")
    longest = int(lengths.max())
    candidates = [*range(MULTIPLE, longest, MULTIPLE), min(-(-longest // MULTIPLE) * MULTIPLE, max_length)]
    rows_up_to = np.searchsorted(np.sort(lengths), candidates, side="right")
    before = np.concatenate([[0], rows_up_to])

    # cost[j]: padded tokens of every row up to candidate j, when j is a bucket; the rows' own tokens are a constant.
    cost = np.array(candidates) * rows_up_to
    chosen: list[list[int]] = [[j] for j in range(len(candidates))]
    for _ in range(min(count, len(candidates)) - 1):
        new_cost, new_chosen = cost.copy(), list(chosen)
        for j in range(1, len(candidates)):
            through = cost[:j] + candidates[j] * (before[j + 1] - before[1 : j + 1])
            best = int(through.argmin())
            if through[best] < new_cost[j]:
                new_cost[j], new_chosen[j] = through[best], [*chosen[best], j]
        cost, chosen = new_cost, new_chosen
    return tuple(candidates[j] for j in chosen[-1])


def cover(buckets: Sequence[int], longest: int, max_length: int) -> tuple[int, ...]:
    """`buckets`, and one more where a row (of another file) is longer than all of them."""
    if longest <= buckets[-1]:
        return tuple(buckets)
    return (*buckets, min(-(-longest // MULTIPLE) * MULTIPLE, max_length))


def bucket_of(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The place in `buckets` of the shortest one that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")
