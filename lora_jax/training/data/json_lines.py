"""One line of JSONL: the object that it holds, or why it can't be used."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import DataError

# One that isn't closed goes to the end: every character is looked at once, whatever a line holds.
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONG = 1 << 20  # characters of a line from which on its values are counted first
_MOST_VALUES = 5_000_000


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The object on a line; texts are texts and numbers are numbers, as JSON has them.

    Args:
        line: One line of JSONL.
        where: Its place, for messages.

    Raises:
        DataError: What is no JSON object, has a name twice, or is nested or long beyond all use.
    """
    # A list of empty lists takes thirty times the memory of its text.
    if len(line) > _LONG and (_STRINGS.sub("", line).count(",") > _MOST_VALUES):
        raise DataError(f"{where} has more than {_MOST_VALUES:,} values: this is no row of texts.")
    try:
        value: Any = json.loads(line, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg}, column {error.colno}): one object a line is expected."
        ) from None
    except _RepeatedName as error:
        raise DataError(f"{where} has the name '{error}' more than once in an object.") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply: an object of texts and numbers is expected.") from None
    except ValueError:
        raise DataError(f"{where} has a number of thousands of digits, which can't be read.") from None
    if not isinstance(value, dict):
        raise DataError(
            f'{where} is a JSON {type(value).__name__}, and an object is expected: {{"text": ..., "label": ...}}.'
        )
    return value


def check_writable(value: Any, where: str, *, allow_nan: bool = False) -> None:
    """Refuses what can't be written as JSON in UTF-8.

    Args:
        value: What was read.
        where: Its place, for messages.
        allow_nan: Whether NaN and infinities pass, which Python reads and writes, and JSON lacks.

    Raises:
        DataError: A lone surrogate, a NaN or an infinity, or a type that JSON lacks.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{where} has half a character (the lone surrogate \\u{half:04x}).") from None
    except ValueError:
        raise DataError(f"{where} has a NaN or an infinity, which JSON lacks: write null.") from None
    except TypeError as error:
        raise DataError(f"{where} can't be written as JSON: {error}.") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply.") from None


class _RepeatedName(Exception):
    """No `ValueError`, as which it would pass for a number that can't be read."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _RepeatedName(f"{twice:.80}")
    return names
