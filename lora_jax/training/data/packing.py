"""Several short texts in one row, so that little of a batch is padding: first-fit."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np


def first_fit(lengths: Iterable[int], size: int) -> list[list[int]]:
    """Puts each item, in the order given, into the first row that has room for it, or into a new one.

    Args:
        lengths: of the items, from 1 to `size`.
        size: of a row.

    Returns:
        The items of each row, by their places.

    Example:
        >>> first_fit([5, 4, 3, 3, 6], size=8)
        [[0, 2], [1, 3], [4]]
    """
    rows: list[list[int]] = []
    # Of the rows with so much room, those that come first; and the first of all of them, to be searched at once.
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]
    none = np.iinfo(np.int64).max
    first = np.full(size + 1, none)
    for item, length in enumerate(lengths):
        room = length + int(first[length:].argmin())
        if first[room] == none:
            row, room = len(rows), size
            rows.append([])
        else:
            row = heapq.heappop(open_rows[room])
            first[room] = open_rows[room][0] if open_rows[room] else none
        rows[row].append(item)
        left = room - length
        heapq.heappush(open_rows[left], row)
        first[left] = open_rows[left][0]
    return rows
