"""Parses one line of JSONL."""

from __future__ import annotations

import json
import re

from lora_jax.files.json_files import RepeatedNameError, unique_names

from ..errors import DataError

# A string that isn't closed goes to the end, so that every character is visited once, whatever a line holds.
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONG = 1 << 20  # characters; the values of a longer line are counted before it is parsed
_MOST_VALUES = 5_000_000


def parse_object(line: str, where: str) -> dict[str, object]:
    """The object on a line.

    Args:
        line: One line of JSONL.
        where: Its position, for messages.

    Raises:
        DataError: The line is not a JSON object, has a name twice, or is far too long or too deeply nested.
    """
    # A list of empty lists takes thirty times as much memory as its text.
    if len(line) > _LONG and (_STRINGS.sub("", line).count(",") > _MOST_VALUES):
        raise DataError(f"{where} has more than {_MOST_VALUES:,} values, too many for a row of texts.")
    try:
        value: object = json.loads(line, object_pairs_hook=unique_names)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg}, column {error.colno}): each line must be an object."
        ) from None
    except RepeatedNameError as error:
        raise DataError(f"{where} has the name '{error}' more than once in an object.") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply.") from None
    except ValueError:
        raise DataError(f"{where} has a number with thousands of digits.") from None
    if not isinstance(value, dict):
        raise DataError(
            f'{where} must be a JSON object such as {{"text": ..., "label": ...}}, got a {type(value).__name__}.'
        )
    return value


def check_writable(value: object, where: str, *, allow_nan: bool = False) -> None:
    """Raises if a value can't be written as JSON in UTF-8.

    Args:
        value: Any value.
        where: Its position, for messages.
        allow_nan: Whether to accept NaN and infinities, which Python writes although JSON lacks them.

    Raises:
        DataError: The value holds a lone surrogate, a NaN, an infinity, or a type that JSON lacks.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{where} has half a character (the lone surrogate \\u{half:04x}).") from None
    except ValueError:
        raise DataError(f"{where} has a NaN or an infinity, which JSON lacks: use null.") from None
    except TypeError as error:
        raise DataError(f"{where} can't be written as JSON: {error}.") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply.") from None
