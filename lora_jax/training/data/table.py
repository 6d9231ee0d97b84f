"""The columns asked for of a data source, row by row, and what is wrong with rows."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import DataError

_SHOWN = 20  # bad rows that a message names
_MOST = 1000  # bad rows after which reading stops, where they aren't left out
_SHOWN_NAMES = 20

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class BadRows:
    """What is wrong with the rows of a source: told of all rows at once, or counted where they are left out.

    Args:
        source: The file or data set.
        skip: Whether bad rows are left out.
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
        """Notes what is wrong with a row, in words that begin with its number; the first fault of a row counts.

        Raises:
            DataError: Bad rows aren't left out, and there are so many that the rest is not looked at.
        """
        if row in self._rows:
            return
        self._rows.add(row)
        if len(self._faults) < _MOST:
            self._faults[row] = fault.rstrip(".")
        if not self.skip and len(self) >= _MOST:
            self._refuse(f"{len(self):,} bad rows or more")

    def check(self, rows: int) -> None:
        """Refuses what can't be used of a source of so many rows.

        Raises:
            DataError: Bad rows that aren't to be left out, all of them told of; or no other rows.
        """
        if not self._rows:
            return
        if not self.skip:
            self._refuse(f"{len(self):,} bad rows")
        if len(self) >= rows:
            raise DataError(f"{self.source} has no row that can be used: {self._shown()}.")

    def describe(self, rows: int) -> str:
        """How many of so many rows are left out, and which."""
        return f"{len(self):,} of {rows:,} rows left out: {self._shown()}"

    def _refuse(self, count: str) -> None:
        if len(self) == 1:
            raise DataError(
                f"{self.source}, {self._shown()}. Fix or remove the row, or leave it out with `--skip-bad-rows`."
            )
        raise DataError(
            f"{self.source} has {count}: {self._shown()}. Fix or remove them, or leave them out with `--skip-bad-rows`."
        )

    def _shown(self) -> str:
        faults = [self._faults[row] for row in sorted(self._faults)[:_SHOWN]]
        more = len(self) - len(faults)
        return "; ".join(faults) + (f"; and {more:,} more" if more else "")


class Table:
    """Rows of a source in the columns asked for.

    Args:
        name: The file or data set, for messages.
        columns: `{column: values}`, the values as the source holds them.
        rows: The number of each row in the source, from 1 on; those that could not be parsed aren't among them.
        lines: The line of the file that each row begins at; `None` where there are no lines.
        bad: Rows that can't be used.
    """

    def __init__(
        self,
        name: str,
        columns: dict[str, list[Any]],
        *,
        rows: Sequence[int],
        lines: Sequence[int] | None = None,
        bad: BadRows,
    ) -> None:
        self.name, self.columns, self.rows, self.lines, self.bad = name, columns, rows, lines, bad

    def convert(self, column: str, make: Callable[[Any, str], Any]) -> None:
        """Puts `make(value, where)` in the place of each value; a row of which it raises `DataError` is bad."""
        values = self.columns[column]
        for place, (row, value) in enumerate(zip(self.rows, values, strict=True)):
            try:
                values[place] = make(value, f"row {row}")
            except DataError as error:
                line = f" (line {self.lines[place]})" if self.lines is not None else ""
                self.bad.add(row, f"{str(error).rstrip('.')}{line}")

    def good(self) -> Table:
        """The rows that can be used.

        Raises:
            DataError: Bad rows that aren't to be left out, or no others.
        """
        self.bad.check(self.total)
        if not self.bad:
            return self
        kept = [place for place, row in enumerate(self.rows) if row not in self.bad]
        columns = {name: [values[place] for place in kept] for name, values in self.columns.items()}
        return Table(self.name, columns, rows=[self.rows[place] for place in kept], bad=self.bad)

    @property
    def total(self) -> int:
        """How many rows the source has, bad ones included."""
        unparsed = len(self.bad) - sum(row in self.bad for row in self.rows) if self.bad else 0
        return len(self.rows) + unparsed

    @property
    def left_out(self) -> str | None:
        """What was left out, in words."""
        return self.bad.describe(self.total) if self.bad else None


def require_columns(source: str, wanted: Mapping[str, str | None], names: Iterable[str], *, hint: str = "") -> None:
    """Refuses a source that lacks a column, or has it twice.

    Args:
        source: The file or data set.
        wanted: `{flag: column}`; `None` for a column that isn't asked for.
        names: The columns that there are.
        hint: More to say where one is missing.
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
                f"{source} has no column '{column}'; its columns are {some_names(names)}.{hint} Choose with "
                f"{', '.join(flags)}{' and ' if flags else ''}{last}."
            )


def some_names(names: Sequence[str]) -> str:
    """Column names for a message, which neither their number nor their length floods."""
    shown = ", ".join(name if len(name) <= 80 else f"{name[:80]}…" for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return shown + (f" and {more:,} more" if more > 0 else "")


def shown(value: Any) -> str:
    """A value for a message: cut before it is written out, however large or deep it is."""
    return _repr.repr(value)
