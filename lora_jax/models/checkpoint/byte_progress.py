"""Progress of reading or writing weights, reported to a callback."""

from __future__ import annotations

from collections.abc import Callable

# Called with the bytes done and the bytes in total.
Progress = Callable[[int, int], None]


class ByteCount:
    """Calls a `Progress` at the start and after each part.

    Example:
        >>> count = ByteCount(12, lambda done, total: print(f"{done} of {total}"))
        0 of 12
        >>> count.add(8)
        8 of 12
        >>> ByteCount(12, None).add(8)
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
