"""Lines of a stream that may stay open: those that have arrived can be answered before the next ones are there."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Iterator
from typing import TypeVar

Row = TypeVar("Row")

_PATIENCE = 0.05  # seconds without a new byte after which a stream counts as waiting


def arriving_lines(stream: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream, and a `None` wherever it has given all that has arrived and more may come.

    On Windows, which can't wait for a pipe with a limit, and of what is no file of the system's, all lines and no
    `None`.
    """
    try:
        number = stream.fileno()  # pyright: ignore[reportAttributeAccessIssue]
        select.select([number], [], [], 0)
    except (AttributeError, OSError, ValueError):
        yield from stream
        return
    rest = bytearray()
    while True:
        if not select.select([number], [], [], _PATIENCE)[0]:
            yield None
            select.select([number], [], [])
        if not (read := os.read(number, 1 << 16)):
            break
        *lines, last = read.split(b"\n")
        for line in lines:
            yield bytes(rest) + line + b"\n"
            rest.clear()
        rest += last
    if rest:
        yield bytes(rest)


def chunks(rows: Iterable[Row | None], size: int) -> Iterator[list[Row]]:
    """Lists of at most `size` rows; one ends where a `None` says that the next row isn't there yet.

    Example:
        >>> list(chunks([1, 2, None, None, 3, 4, 5], 2))
        [[1, 2], [3, 4], [5]]
    """
    chunk: list[Row] = []
    for row in rows:
        if row is not None:
            chunk.append(row)
        if chunk and (row is None or len(chunk) == size):
            yield chunk
            chunk = []
    if chunk:
        yield chunk
