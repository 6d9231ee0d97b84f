"""Text from elsewhere in what we print: names, labels and keys from files, for a terminal, a table or a page.

A label may hold what a terminal obeys or a spreadsheet computes; here it is made plain text.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Sequence

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
        text: Text from anywhere.
        lines: Whether to keep line ends.

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


def json_line(value: object) -> str:
    r"""JSON on one line, of readable letters, and without a character that a terminal obeys.

    Example:
        >>> print(json_line({"größer": "\x9b2J\u202e"}))
        {"größer": "\u009b2J\u202e"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)  # escapes those below a space itself
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]], *, line_end: str = "\n") -> str:
    r"""CSV that a spreadsheet doesn't compute: a cell that would be a formula begins with an apostrophe.

    Args:
        columns: Names of the columns.
        rows: Rows of cells: texts, numbers, or `None` for an empty cell. Numbers in texts stay numbers.
        line_end: End of each line.

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


def _cell(value: object) -> object:
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
    """A text for a message; a long one loses its middle.

    Example:
        >>> clipped("encoder/layers/0/attention/query/kernel", 20)
        'encoder/l … y/kernel'
    """
    text = str(text)
    if len(text) <= length:
        return text
    kept = length - len(_MIDDLE)
    return text[: kept - kept // 2] + _MIDDLE + text[len(text) - kept // 2 :]


def listed(items: Iterable[object], most: int = 8, *, form: str = "{}") -> str:
    """The first of several items for a message, and how many more there are.

    Args:
        items: Names, paths or other short texts; long ones lose their middle.
        most: Number of items to show.
        form: Format of each, such as `"`{}`"`.

    Example:
        >>> listed(["query", "key", "value", "output"], 2, form="'{}'")
        "'query', 'key' and 2 more"
    """
    names = list(items)
    rest = len(names) - most
    return ", ".join(form.format(clipped(name)) for name in names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def error_line(error: BaseException, length: int = 300) -> str:
    """The message of another library's error, on one line; the name of its class where it has none."""
    return clipped(" ".join(str(error).split()) or type(error).__name__, length)


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, if any looks like it; of many or long ones the beginnings decide.

    Example:
        >>> nearest_name("lerning_rate", ["learning_rate", "rank"])
        'learning_rate'
    """
    beginnings = {other[:_COMPARED]: other for _, other in zip(range(_MOST_COMPARED), known, strict=False)}
    found = difflib.get_close_matches(str(name)[:_COMPARED], beginnings, n=1)
    return beginnings[found[0]] if found else None
