"""Texts of others in what we write: names, labels and keys from files, on their way to a terminal, a table or a page.

A label may hold what a terminal obeys or a spreadsheet computes. Here it becomes something to be read.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_MIDDLE = " … "
# What moves the cursor, ends a line or turns the reading direction; halves of characters, which can't be encoded.
_CONTROLS = "\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
_UNSEEN = re.compile(f"[{_CONTROLS}]")
_UNSEEN_OR_LINE_END = re.compile(f"[{_CONTROLS}\n]")
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_COMPARED = 100  # characters of a name; comparing takes the product of the lengths
_MOST_COMPARED = 1_000


def printable(text: object, *, lines: bool = False) -> str:
    r"""A text with its control characters written out.

    Args:
        text: from wherever it is.
        lines: whether line ends may stay.

    Example:
        >>> print(printable("good\x1b[2J\nbad"), printable("größer, 大きい"))
        good\x1b[2J\nbad größer, 大きい
    """
    return (_UNSEEN if lines else _UNSEEN_OR_LINE_END).sub(_written_out, str(text))


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    short = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character)
    code = ord(character)
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def json_line(value: Any) -> str:
    r"""JSON on one line, of readable letters, and without a character that a terminal obeys.

    Example:
        >>> print(json_line({"größer": "\x9b2J\u202e"}))
        {"größer": "\u009b2J\u202e"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)  # escapes those below a space itself
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, line_end: str = "\n") -> str:
    r"""A CSV file that a spreadsheet shows and doesn't compute: before what would be a formula stands an apostrophe.

    Args:
        columns: names.
        rows: cells: texts, numbers, `None` for nothing. Numbers stay numbers, in a text too.
        line_end: of each line.

    Example:
        >>> print(csv_text(("path", "change"), [("=1+1", -0.5), ("-2", None)]), end="")
        path,change
        '=1+1,-0.5
        -2,
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=line_end)
    writer.writerows([_cell(cell) for cell in row] for row in (columns, *rows))
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def clipped(text: object, length: int = 200) -> str:
    """A text from elsewhere for a message: the middle of a long one is left out.

    Example:
        >>> clipped("encoder/layers/0/attention/query/kernel", 20)
        'encoder/l … y/kernel'
    """
    text = str(text)
    if len(text) <= length:
        return text
    kept = length - len(_MIDDLE)
    return text[: kept - kept // 2] + _MIDDLE + text[len(text) - kept // 2 :]


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, if any looks like it; of many or long ones the beginnings decide.

    Example:
        >>> nearest_name("lerning_rate", ["learning_rate", "rank"])
        'learning_rate'
    """
    beginnings = {other[:_COMPARED]: other for _, other in zip(range(_MOST_COMPARED), known, strict=False)}
    found = difflib.get_close_matches(str(name)[:_COMPARED], beginnings, n=1)
    return beginnings[found[0]] if found else None
