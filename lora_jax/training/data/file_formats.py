"""Readers of TSV, CSV, JSONL and Parquet files, which follow the formats and guess nothing.

Texts come back character for character. A line ends at `\\n`, `\\r\\n` or `\\r` only; Unicode's other line ends belong
to texts. Only the requested columns are kept, and the others may hold anything. Rows are counted from 1 after the
header, lines from 1.
"""

from __future__ import annotations

import contextlib
import csv
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_jax.files import FileError, open_regular
from lora_jax.text import error_line, listed

from ..errors import DataError
from .json_lines import parse_object
from .table import BadRows, Column, Table, require_columns

if TYPE_CHECKING:
    import pyarrow

Wanted = Mapping[str, str | None]

_MOST_NAMES = 1000  # columns of a JSONL file that are remembered for a message
_MOST_CHARACTERS = 2**31 - 1  # in a CSV field; the largest C long on every system
# What the first bytes of a file say it is, whatever its name.
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
    """Reads columns of a data file. Rows that can't be parsed are recorded in the table.

    Args:
        path: A file with one of the endings in `READERS`.
        wanted: `{flag: column}`; `None` for a column that isn't requested.
        skip_bad_rows: Whether rows that can't be parsed are skipped.

    Raises:
        DataError: The file can't be read, isn't a regular file, or lacks a column.
    """
    try:
        with open_regular(path) as file:
            is_empty = not file.read(1)
    except FileError as error:
        raise DataError(str(error)) from None
    if is_empty:
        raise DataError(f"{path} is empty.")
    bad = BadRows(str(path), skip=skip_bad_rows)
    try:
        table = READERS[path.suffix.lower()](path, wanted, bad)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    if not table.rows and not bad:
        raise DataError(f"{path} has no rows.")
    return table


# ---------------------------------------------------------------------------------------------------------------- lines


class Line(NamedTuple):
    """One line of a file or a stream.

    Attributes:
        number: Its number, from 1.
        text: The line with its line end.
        fault: Why its bytes are not UTF-8; `None` if they are.
    """

    number: int
    text: str
    fault: str | None = None


def read_lines(stream: Iterable[bytes | None], name: str) -> Iterator[Line | None]:
    """The lines of a file or a stream, as every data file is read.

    Args:
        stream: Chunks of bytes, each up to a `\\n` or the end. `None`, for a stream that has no more for the moment, is
            passed on.
        name: The file, for messages.

    Raises:
        DataError: The first bytes are those of an archive, a PDF, UTF-16 or the like.
    """
    number = 0
    for chunk in stream:
        if chunk is None:
            yield None
            continue
        for raw in chunk.splitlines(keepends=True):  # bytes split at \n, \r\n and \r only
            number += 1
            if number == 1:
                _check_magic(raw, name)
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # some editors write a byte-order mark
            try:
                yield Line(number, raw.decode())
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
                yield Line(number, raw.decode(errors="replace"), f"is not UTF-8: {byte}. Save the file as UTF-8")


def _file_lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        yield from (line for line in read_lines(file, str(path)) if line is not None)


def _check_magic(start: bytes, name: str) -> None:
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{name} is {what}.")


# ------------------------------------------------------------------------------------------------ fields under a header


class _Fields(NamedTuple):
    line: int
    fields: list[str]
    fault: str | None = None
    ends: bool = True  # whether it is known where this row ends


def _read_tsv(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    """Tab-separated, no quoting: a double quote is a plain character."""
    names = _header(path, _tsv_rows(path))
    hint = ""
    for separator, word in ((",", "commas"), (";", "semicolons")):
        if len(names) == 1 and _has_all(wanted, names[0].split(separator)):
            hint = f" Its columns are separated by {word}: give it the ending .csv."
    require_columns(str(path), wanted, names, hint=hint)
    return _read_fields(path, _tsv_rows(path), wanted, bad)


def _tsv_rows(path: Path) -> Iterator[_Fields]:
    for line in _file_lines(path):
        text = line.text.removesuffix("\n").removesuffix("\r")
        if text.strip(" "):
            yield _Fields(line.number, text.split("\t"), _decoding_fault(line))


def _decoding_fault(line: Line) -> str | None:
    return None if line.fault is None else f" (line {line.number}) {line.fault}"


def _read_csv(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    """Separated by commas; or by semicolons or tabs if only then the header has the requested columns."""
    with _long_fields():
        separators = (",", ";", "\t")
        separator = next((each for each in separators if _has_all(wanted, _names_by(path, each))), ",")
        require_columns(str(path), wanted, _header(path, _csv_rows(path, separator)))
        return _read_fields(path, _csv_rows(path, separator), wanted, bad)


def _names_by(path: Path, separator: str) -> list[str]:
    """The header as this separator splits it; empty if it can't be parsed so."""
    try:
        return _header(path, _csv_rows(path, separator))
    except DataError:
        return []


def _csv_rows(path: Path, separator: str) -> Iterator[_Fields]:
    """The rows. One with wrong quotes has a fault.

    Such a row ends with its line if the number of its quotes is even. If it is odd, the rows after it can't be found.
    """
    taken: list[Line] = []

    def texts() -> Iterator[str]:
        for line in _file_lines(path):
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
            fault = f", line {taken[-1].number}: this is not CSV ({error}); a quote inside quotes must be doubled"
            had_wrong_quotes = True
        if fault is None and len(fields) <= 1 and not taken[0].text.strip():
            continue
        quotes = sum(line.text.count('"') for line in taken) if had_wrong_quotes else 0
        if quotes % 2 and fault is None:
            fault = f" (line {taken[0].number}) has an odd number of quotes, after a row with wrong quotes"
        undecodable = next(filter(None, map(_decoding_fault, taken)), None)
        yield _Fields(taken[0].number, fields, undecodable or fault, ends=fields != [] or quotes % 2 == 0)


def _header(path: Path, rows: Iterator[_Fields]) -> list[str]:
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path} is empty.")
    if header.fault is not None:
        raise DataError(f"{path}, the header{header.fault}.")
    return header.fields


def _read_fields(path: Path, rows: Iterator[_Fields], wanted: Wanted, bad: BadRows) -> Table:
    header = _header(path, rows)
    # Nameless columns at the end, such as a trailing comma makes, may be missing in a row.
    least = max((index for index, name in enumerate(header, start=1) if name), default=0)
    positions = {column: header.index(column) for column in wanted.values() if column is not None}
    columns: dict[str, Column] = {column: [] for column in positions}
    numbers, lines = array("q"), array("q")
    row = 0
    for row, (line, fields, fault, ends) in enumerate(rows, start=1):
        if fault is None and not least <= len(fields) <= len(header):
            fault = f" (line {line}) has {len(fields)} fields, and the header has {len(header)}: {listed(header, 20)}"
        if fault is None:
            numbers.append(row)
            lines.append(line)
            for column, index in positions.items():
                columns[column].append(fields[index])
            continue
        bad.add(row, f"row {row}{fault}")
        if not ends and bad.skip:
            raise DataError(f"{path}, row {row}{fault}. It can't be skipped, as its end can't be found.")
        if not ends:
            break
    if not row:
        raise DataError(f"{path} has a header and no rows.")
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
    """One JSON object per line; a column that a row lacks is `None`."""
    columns: dict[str, Column] = {column: [] for column in wanted.values() if column is not None}
    numbers, lines = array("q"), array("q")
    names: dict[str, None] = {}
    missing = set(columns)
    row = 0
    for line in _file_lines(path):
        if not line.text.strip(" \t\r\n"):
            continue
        row += 1
        if (fault := _decoding_fault(line)) is not None:
            bad.add(row, f"row {row}{fault}")
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
        raise DataError(f"{path} is empty.")
    if numbers and missing:
        require_columns(str(path), wanted, [*names, *(set(columns) - missing - set(names))])
    return Table(str(path), columns, rows=numbers, lines=lines, bad=bad)


def _read_parquet(path: Path, wanted: Wanted, bad: BadRows) -> Table:
    import pyarrow
    import pyarrow.parquet

    columns = list(dict.fromkeys(column for column in wanted.values() if column is not None))
    try:
        # `read_table` would make columns of the names of the folders.
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        require_columns(str(path), wanted, schema.names)
        held = file.read(columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as .parquet: {error_line(error)}") from error
    rows = range(1, held.num_rows + 1)
    values = {column: _values(held.column(column), bad) for column in columns}
    for column, names in _class_names(schema).items():
        if column in values:
            values[column] = [_class_name(value, names) for value in values[column]]
    return Table(str(path), values, rows=rows, bad=bad)


def _values(column: pyarrow.ChunkedArray, bad: BadRows) -> Column:
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


def _class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """The class names of each column of class labels, which `datasets` writes as numbers."""
    found = {}
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            names = feature.get("names")
            if feature.get("_type") == "ClassLabel" and isinstance(names, list):
                found[column] = list(map(str, names))
    return found


def _class_name(value: object, names: list[str]) -> object:
    """The name behind a number; `None` for -1, which marks hidden labels of test sets."""
    if type(value) is not int:
        return value
    return names[value] if 0 <= value < len(names) else None


READERS: dict[str, Callable[[Path, Wanted, BadRows], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
