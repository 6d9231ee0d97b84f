"""First-fit packing of several short texts into one sequence."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np


def first_fit(lengths: Iterable[int], size: int) -> list[list[int]]:
    """Puts each item, in the given order, into the first bin that has room for it, or into a new one.

    Args:
        lengths: Lengths of the items, from 1 to `size`.
        size: Size of a bin.

    Returns:
        The indices of the items in each bin.

    Example:
        >>> first_fit([5, 4, 3, 3, 6], size=8)
        [[0, 2], [1, 3], [4]]
    """
    bins: list[list[int]] = []
    # For each amount of room a heap of the bins that have it, and the first of these, for a vectorized search.
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    none = np.iinfo(np.int64).max
    first = np.full(size + 1, none)
    for item, length in enumerate(lengths):
        room = length + int(first[length:].argmin())
        if first[room] == none:
            target, room = len(bins), size
            bins.append([])
        else:
            target = heapq.heappop(by_room[room])
            first[room] = by_room[room][0] if by_room[room] else none
        bins[target].append(item)
        left = room - length
        heapq.heappush(by_room[left], target)
        first[left] = by_room[left][0]
    return bins
