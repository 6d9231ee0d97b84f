"""Data files, each read once: rows of TSV, CSV, JSONL and Parquet as their own formats say, nothing guessed.

Texts come back character for character. A line ends at `\\n`, `\\r\\n` or `\\r` and nowhere else: Unicode's other line
ends belong to texts. Only the columns asked for are kept, and others don't matter. Rows count from 1 after the header,
lines from 1.
"""

from __future__ import annotations

import contextlib
import csv
import json
import stat
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .json_lines import parse_object
from .table import BadRows, Table, require_columns, some_names

Wanted = Mapping[str, str | None]

_MOST_NAMES = 1000  # of JSONL's columns that a message may list
_MOST_CHARACTERS = 2**31 - 1  # of a CSV field; the largest C long everywhere
# What a file is by its first bytes, whatever its name.
_MAGIC = {
    b"PK\x03\x04": "a spreadsheet or an archive: open it and save the table as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an office file: open it and save the table as CSV (UTF-8)",
    b"\x1f\x8b": "compressed: unpack it first",
    b"%PDF": "a PDF: save the table as CSV (UTF-8)",
    b"PAR1": "Parquet: give it the ending .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}


def read_file(path: Path, wanted: Wanted, *, skip_bad_rows: bool = False) -> Table:
    """The rows of a data file, in the columns wanted.

    Args:
        path: A file with one of the endings in `READERS`.
        wanted: `{flag: column}`; `None` for a column that isn't asked for.
        skip_bad_rows: Whether rows that can't be parsed are left out.

    Raises:
        DataError: A file that can't be read, isn't a regular one, or lacks a column. Rows that can't be parsed are
            noted in the table.
    """
    check_regular(path)
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: a file with at least one row is expected.")
    bad = BadRows(str(path), skip=skip_bad_rows)
    try:
        table = READERS[path.suffix.lower()](path, wanted, bad)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    if not table.rows and not bad:
        raise DataError(f"{path} has no rows: at least one is expected.")
    return table


def check_regular(path: Path) -> None:
    """Refuses what isn't a file with an end: a pipe or a device can be read for ever.

    Raises:
        DataError: A pipe, a device, a socket, or nothing that can be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{path} doesn't exist.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a regular file: save the rows to one first.")


# ---------------------------------------------------------------------------------------------------------------- lines


class _Line(NamedTuple):
    number: int
    text: str  # its end included
    fault: str | None = None


def _lines(path: Path) -> Iterator[_Line]:
    number = 0
    with path.open("rb") as file:
        for chunk in file:
            for raw in chunk.splitlines(keepends=True):  # of bytes: at \n, \r\n and \r alone
                number += 1
                if number == 1:
                    _check_magic(raw, path)
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write
                try:
                    yield _Line(number, raw.decode())
                except UnicodeDecodeError as error:
                    byte = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
                    fault = f" (line {number}) is not UTF-8: {byte}. Save the file as UTF-8"
                    yield _Line(number, raw.decode(errors="replace"), fault)


def _check_magic(start: bytes, path: Path) -> None:
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path} is {what}.")


# ------------------------------------------------------------------------------------------------ fields under a header


class _Fields(NamedTuple):
    line: int
    fields: list[str]
    fault: str | None = None
    ends: bool = True  # whether it is known where the row ends


def _read_tsv(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    """Tab-separated, no quoting: a double quote is a plain character."""
    names = _header(path, _tsv_rows(path))
    hint = ""
    for separator, word in ((",", "commas"), (";", "semicolons")):
        if len(names) == 1 and _has_all(wanted, names[0].split(separator)):
            hint = f" It is separated by {word}: give it the ending .csv."
    require_columns(str(path), wanted, names, hint=hint)
    return _read_fields(path, _tsv_rows(path), wanted, bad)


def _tsv_rows(path: Path) -> Iterator[_Fields]:
    for line in _lines(path):
        text = line.text.removesuffix("\n").removesuffix("\r")
        if text.strip(" "):
            yield _Fields(line.number, text.split("\t"), line.fault)


def _read_csv(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    """Comma-separated; or by semicolons or tabs, where the header has the columns wanted only then."""
    with _long_fields():
        separators = (",", ";", "\t")
        separator = next((each for each in separators if _has_all(wanted, _names_by(path, each))), ",")
        require_columns(str(path), wanted, _header(path, _csv_rows(path, separator)))
        return _read_fields(path, _csv_rows(path, separator), wanted, bad)


def _names_by(path: Path, separator: str) -> list[str]:
    """The header, if it is one by this separator."""
    try:
        return _header(path, _csv_rows(path, separator))
    except DataError:
        return []


def _csv_rows(path: Path, separator: str) -> Iterator[_Fields]:
    """The rows; one whose quotes are wrong has a fault.

    By the number of its quotes a row ends with its line or it doesn't. Where it doesn't, nothing after it can be told.
    """
    taken: list[_Line] = []

    def texts() -> Iterator[str]:
        for line in _lines(path):
            taken.append(line)
            yield line.text

    reader = csv.reader(texts(), delimiter=separator, strict=True)
    had_wrong_quotes = False
    while True:
        taken.clear()
        fault = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = []
            fault = f", line {taken[-1].number}: this is not CSV ({error}); a quote inside quotes is written twice"
            had_wrong_quotes = True
        if fault is None and len(fields) <= 1 and not taken[0].text.strip():
            continue
        quotes = sum(line.text.count('"') for line in taken) if had_wrong_quotes else 0
        if quotes % 2 and fault is None:
            fault = f" (line {taken[0].number}) has one quote too many or too few, after a row whose quotes are wrong"
        encoding = next((line.fault for line in taken if line.fault is not None), None)
        yield _Fields(taken[0].number, fields, encoding or fault, ends=fields != [] or quotes % 2 == 0)


def _header(path: Path, rows: Iterator[_Fields]) -> list[str]:
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path} is empty: a file with at least one row is expected.")
    if header.fault is not None:
        raise DataError(f"{path}, the header{header.fault}.")
    return header.fields


def _read_fields(path: Path, rows: Iterator[_Fields], wanted: Wanted, bad: BadRows) -> Table:
    header = _header(path, rows)
    # Columns at the end that have no name, as a last comma makes them, need not be there.
    least = max((place for place, name in enumerate(header, start=1) if name), default=0)
    places = {column: header.index(column) for column in wanted.values() if column is not None}
    columns: dict[str, list[Any]] = {column: [] for column in places}
    numbers, lines = array("q"), array("q")
    row = 0
    for row, (line, fields, fault, ends) in enumerate(rows, start=1):
        if fault is None and not least <= len(fields) <= len(header):
            fault = f" (line {line}) has {len(fields)} fields, and the header has {len(header)}: {some_names(header)}"
        if fault is None:
            numbers.append(row)
            lines.append(line)
            for column, place in places.items():
                columns[column].append(fields[place])
            continue
        bad.add(row, f"row {row}{fault}")
        if not ends and bad.skip:
            raise DataError(f"{path}, row {row}{fault}. It can't be left out, as it can't be told where it ends.")
        if not ends:
            break
    if not row:
        raise DataError(f"{path} has a header and no rows: at least one row is expected.")
    return Table(str(path), columns, rows=numbers, lines=lines, bad=bad)


def _has_all(wanted: Wanted, names: Sequence[str]) -> bool:
    return all(column in names for column in wanted.values() if column is not None)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_MOST_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---------------------------------------------------------------------------------------------------- JSONL and Parquet


def _read_jsonl(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    """One JSON object a line; what a row lacks is `None`."""
    columns: dict[str, list[Any]] = {column: [] for column in wanted.values() if column is not None}
    numbers, lines = array("q"), array("q")
    names: dict[str, None] = {}
    missing = set(columns)
    row = 0
    for line in _lines(path):
        if not line.text.strip(" \t\r\n"):
            continue
        row += 1
        if line.fault is not None:
            bad.add(row, f"row {row}{line.fault}")
            continue
        try:
            values = parse_object(line.text, f"row {row} (line {line.number})")
        except DataError as error:
            bad.add(row, str(error))
            continue
        numbers.append(row)
        lines.append(line.number)
        for column, held in columns.items():
            held.append(values.get(column))
        if missing:
            missing.difference_update(values)
            names.update(dict.fromkeys(list(values)[: _MOST_NAMES - len(names)]))
    if not row:
        raise DataError(f"{path} is empty: a file with at least one row is expected.")
    if numbers and missing:
        require_columns(str(path), wanted, [*names, *(set(columns) - missing - set(names))])
    return Table(str(path), columns, rows=numbers, lines=lines, bad=bad)


def _read_parquet(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    import pyarrow
    import pyarrow.parquet

    columns = list(dict.fromkeys(column for column in wanted.values() if column is not None))
    try:
        # The file alone: `read_table` would make columns of the names of its folders.
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        require_columns(str(path), wanted, schema.names)
        held = file.read(columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as .parquet: {' '.join(str(error).split())}") from error
    rows = range(1, held.num_rows + 1)
    values = {column: _values(held.column(column), bad) for column in columns}
    for column, names in _class_names(schema).items():
        if column in values:
            values[column] = [_class_name(value, names) for value in values[column]]
    return Table(str(path), values, rows=rows, bad=bad)


def _values(column: Any, bad: BadRows) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for row, value in enumerate(column, start=1):
            try:
                values.append(value.as_py())
            except UnicodeDecodeError:
                values.append(None)
                bad.add(row, f"row {row} is not UTF-8")
        return values


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names behind the numbers of columns that `datasets` has written as class labels."""
    found = {}
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            names = feature.get("names")
            if feature.get("_type") == "ClassLabel" and isinstance(names, list):
                found[column] = list(map(str, names))
    return found


def _class_name(value: Any, names: list[str]) -> Any:
    """`None` for -1, the hub's mark in hidden test sets."""
    if type(value) is not int:
        return value
    return names[value] if 0 <= value < len(names) else None


READERS: dict[str, Callable[[Path, Wanted, BadRows], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
