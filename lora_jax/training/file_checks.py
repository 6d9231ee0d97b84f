"""What a text file of data must be before it is parsed: UTF-8, regular and not empty, each fault named by its row.

The parsers under `datasets` fill a short row with nothing and report a bad byte by its place in a block; here both are
found first, and named as a person would find them in an editor. Rows count from 1 after the header, lines from 1.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError

_LINE_END = re.compile(rb"\r\n|\n|\r")


class _Line(NamedTuple):
    number: int
    text: str


def check_tsv(path: Path) -> list[str]:
    """Checks a tab-separated file (no quoting: a double quote is a plain character) and returns its column names."""
    header_line, *lines = _lines(path, blanks=" ", row_of=lambda before: len(before))
    header = header_line.text.split("\t")
    _check_header(header, rows=len(lines), path=path)
    for row, line in enumerate(lines, start=1):
        _check_width(line.text.split("\t"), header, f"{path}, row {row} (line {line.number})")
    return header


def check_csv(path: Path) -> list[str]:
    """Checks a comma-separated file (fields may be quoted and hold line ends) and returns its column names."""
    lines = _lines(path, blanks=None, row_of=lambda before: sum(1 for row in csv.reader(before) if _is_filled(row)))
    reader = csv.reader(io.StringIO("\n".join(line.text for line in lines), newline=""), strict=True)
    header: list[str] = []
    count = -1
    try:
        for fields in filter(_is_filled, reader):
            header = header or fields
            count += 1
            _check_width(fields, header, f"{path}, row {count} (line {reader.line_num})")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: this is not CSV ({error}). Mend the quotes there.") from None
    _check_header(header, rows=count, path=path)
    return header


def check_jsonl(path: Path) -> list[str]:
    """Checks a file of one JSON object a line and returns the names of every key in it."""
    columns: dict[str, None] = {}
    for row, line in enumerate(_lines(path, blanks=" \t", row_of=lambda before: len(before) + 1), start=1):
        where = f"{path}, row {row} (line {line.number})"
        columns.update(dict.fromkeys(parse_object(line.text, where)))
    return list(columns)


def parse_object(line: str, where: str) -> dict[str, Any]:
    """One line of JSONL."""
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg}, column {error.colno}): one object a line is expected."
        ) from None
    except (RecursionError, ValueError) as error:  # thousands of levels, or of digits
        raise DataError(f"{where} is not JSON that can be read: {error}.") from None
    if not isinstance(value, dict):
        raise DataError(
            f'{where} is a JSON {type(value).__name__}, and an object is expected: {{"text": ..., "label": ...}}.'
        )
    return value


def _lines(path: Path, *, blanks: str | None, row_of: Callable[[list[str]], int]) -> list[_Line]:
    """The lines of a file, decoded. Lines of nothing but `blanks` are left out, as the parsers leave them out; `None`
    keeps all. `row_of` tells the row that comes after these lines, for the message."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path} is empty: a file with at least one row is expected.")
    data = data.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write
    lines: list[_Line] = []
    for number, raw in enumerate(_LINE_END.split(data), start=1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            row = row_of([line.text for line in lines])
            where = f"row {row}" if row else "the header"
            raise DataError(
                f"{path}, {where} (line {number}) is not UTF-8: byte {error.start + 1} of the line is "
                f"0x{raw[error.start]:02x}. Save the file as UTF-8."
            ) from None
        if blanks is None or text.strip(blanks):
            lines.append(_Line(number, text))
    return lines


def _is_filled(fields: list[str]) -> bool:
    return len(fields) > 1 or any(field.strip() for field in fields)


def _check_header(header: list[str], *, rows: int, path: Path) -> None:
    if rows < 1:
        raise DataError(f"{path} has a header and no rows: at least one row is expected.")
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path} has the column '{twice[0]}' more than once: rename one.")


def _check_width(fields: list[str], header: list[str], where: str) -> None:
    if len(fields) != len(header):
        raise DataError(f"{where} has {len(fields)} fields, and the header has {len(header)}: {', '.join(header)}.")
