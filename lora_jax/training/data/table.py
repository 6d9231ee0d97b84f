"""A data source as columns, read row by row, and the rows that can't be used."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.text import listed

from ..errors import DataError

Column = list[Any]  # anything as it is read; texts or labels once it is converted

_SHOWN = 20  # bad rows named in a message
_MOST = 1000  # bad rows after which reading stops, unless they are skipped

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class BadRows:
    """The rows of a source that can't be used: reported all at once, or counted if they are skipped.

    Args:
        source: The file or data set.
        skip: Whether bad rows are skipped.
    """

    def __init__(self, source: str, *, skip: bool = False) -> None:
        self.source, self.skip = source, skip
        self._rows: set[int] = set()
        self._faults: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int, fault: str) -> None:
        """Records what is wrong with a row, in words that begin with its number. A row's first fault counts.

        Raises:
            DataError: There are so many bad rows that reading on is pointless, and they aren't skipped.
        """
        if row in self._rows:
            return
        self._rows.add(row)
        if len(self._faults) < _MOST:
            self._faults[row] = fault.rstrip(".")
        if not self.skip and len(self) >= _MOST:
            self._refuse(f"{len(self):,} bad rows or more")

    def check(self, total: int) -> None:
        """Raises if the source can't be used as it is.

        Args:
            total: Number of rows in the source, bad ones included.

        Raises:
            DataError: There are bad rows and they aren't skipped (all are reported), or there are no good ones.
        """
        if not self._rows:
            return
        if not self.skip:
            self._refuse(f"{len(self):,} bad rows")
        if len(self) >= total:
            raise DataError(f"{self.source} has no usable row: {self._shown()}.")

    def describe(self, total: int) -> str:
        """How many of the source's `total` rows were skipped, and which."""
        return f"{len(self):,} of {total:,} rows skipped: {self._shown()}"

    def _refuse(self, count: str) -> None:
        if len(self) == 1:
            raise DataError(
                f"{self.source}, {self._shown()}. Fix or remove the row, or leave it out with `skip_bad_rows=True`."
            )
        raise DataError(
            f"{self.source} has {count}: {self._shown()}. Fix or remove them, or leave them out with "
            "`skip_bad_rows=True`."
        )

    def _shown(self) -> str:
        faults = [self._faults[row] for row in sorted(self._faults)[:_SHOWN]]
        more = len(self) - len(faults)
        return "; ".join(faults) + (f"; and {more:,} more" if more else "")


class Table:
    """The requested columns of a source.

    Args:
        name: The file or data set, for messages.
        columns: `{column: values}`, with the values as the source holds them.
        rows: Number of each row in the source, from 1. Rows that could not be parsed aren't included.
        lines: Line of the file on which each row begins; `None` if the source has no lines.
        bad: Rows that can't be used.
    """

    def __init__(
        self,
        name: str,
        columns: dict[str, Column],
        *,
        rows: Sequence[int],
        lines: Sequence[int] | None = None,
        bad: BadRows,
    ) -> None:
        self.name, self.columns, self.rows, self.lines, self.bad = name, columns, rows, lines, bad

    def convert(self, column: str, make: Callable[[object, str], object]) -> None:
        """Replaces each value by `make(value, where)`. A row for which that raises `DataError` is bad."""
        values = self.columns[column]
        for index, (row, value) in enumerate(zip(self.rows, values, strict=True)):
            try:
                values[index] = make(value, f"row {row}")
            except DataError as error:
                line = f" (line {self.lines[index]})" if self.lines is not None else ""
                self.bad.add(row, f"{str(error).rstrip('.')}{line}")

    def good(self) -> Table:
        """The rows that can be used.

        Raises:
            DataError: See `BadRows.check`.
        """
        self.bad.check(self.total)
        if not self.bad:
            return self
        kept = [index for index, row in enumerate(self.rows) if row not in self.bad]
        columns = {name: [values[index] for index in kept] for name, values in self.columns.items()}
        return Table(self.name, columns, rows=[self.rows[index] for index in kept], bad=self.bad)

    @property
    def total(self) -> int:
        """Number of rows in the source, bad ones included."""
        unparsed = len(self.bad) - sum(row in self.bad for row in self.rows) if self.bad else 0
        return len(self.rows) + unparsed

    @property
    def left_out(self) -> str | None:
        """Which rows were skipped, in words."""
        return self.bad.describe(self.total) if self.bad else None


def require_columns(source: str, wanted: Mapping[str, str | None], names: Iterable[str], *, hint: str = "") -> None:
    """Raises if a source lacks a column, or has it twice.

    Args:
        source: The file or data set.
        wanted: `{flag: column}`; `None` for a column that isn't requested.
        names: The columns of the source.
        hint: More advice if one is missing.
    """
    names = list(names)
    for column in dict.fromkeys(wanted.values()):
        if column is None:
            continue
        count = names.count(column)
        if count > 1:
            raise DataError(f"{source} has the column '{column}' more than once: rename one.")
        if not count:
            *flags, last = (f"`{flag}`" for flag in wanted)
            raise DataError(
                f"{source} has no column '{column}'; its columns are {listed(names, 20)}.{hint} Choose with "
                f"{', '.join(flags)}{' and ' if flags else ''}{last}."
            )


def short_repr(value: object) -> str:
    """A value for a message, cut before it is written out, however large or deep it is."""
    return _repr.repr(value)
