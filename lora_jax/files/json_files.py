"""JSON: read with bounds on its size and depth, written with a checksum that tells damage."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .reading import FileError, read_bytes
from .writing import write_text

CHECKSUM = "checksum"
# A value of a byte or two takes up to seventy bytes of memory.
_MOST_VALUES = 4_000_000
_DEEPEST = 100  # levels
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class RepeatedNameError(Exception):
    """A name that an object has twice. Not a `ValueError`, which would pass for malformed JSON."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads` that refuses a repeated name: readers differ in which one counts."""
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RepeatedNameError(f"{twice:.200}")
    return names


def read_json(path: str | os.PathLike[str], *, max_bytes: int = 64 * 2**20) -> Any:
    """Reads a JSON file of at most `max_bytes`.

    Raises:
        FileError: See `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes, kind="a JSON file"), f"{path}: the file")


def parse_json(data: bytes | str, what: str) -> Any:
    """Parses JSON from elsewhere.

    Args:
        data: The JSON.
        what: What error messages call it: `"table.jsonl, line 3"`.

    Raises:
        FileError: Malformed JSON, or a name twice in an object, half a character, too many values or levels, or a
            number of thousands of digits. The message begins with `what`.

    Example:
        >>> parse_json('{"rank": 4, "rank": 8}', "method.json")
        Traceback (most recent call last):
        ...
        lora_jax.files.reading.FileError: method.json has two entries named 'rank', and one of each name is expected.
    """
    count = count_values(data, what)
    too_deep = FileError(f"{what} is JSON nested too deeply to be honest.")
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=unique_names)
        if _ESCAPED_HALF.search(text):  # usually of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RepeatedNameError as error:
        raise FileError(f"{what} has two entries named '{error}', and one of each name is expected.") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8 (byte {error.start:,}): it is corrupt or another format.") from None
    except UnicodeEncodeError:
        raise FileError(f"{what} has half a character, which no text can hold: it is corrupt.") from None
    except json.JSONDecodeError as error:
        raise FileError(
            f"{what} is not JSON ({error.msg}, line {error.lineno}, column {error.colno}): it is corrupt or "
            "another format."
        ) from None
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise FileError(f"{what} is not JSON that can be read: {error}.") from None
    if count > _DEEPEST and _is_deep(value):
        raise too_deep
    return value


def count_values(data: bytes | str, what: str) -> int:
    """The number of values in JSON, before any is made: every value but the first follows one of three characters.

    Raises:
        FileError: There are too many.
    """
    # Both types have `count`, and neither takes the other's text.
    marks = [data.count(mark) for mark in (b",", b"[", b"{")] if isinstance(data, bytes) else map(data.count, ",[{")
    if (count := sum(marks)) > _MOST_VALUES:
        raise FileError(f"{what} is JSON of some {count:,} values, and at most {_MOST_VALUES:,} are expected.")
    return count


def _is_deep(value: object) -> bool:
    """Whether it is too deep for functions that recurse once a level, such as `repr`."""
    level: list[object] = [value]
    for _ in range(_DEEPEST + 1):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        level = [child for entry in containers for child in (entry.values() if isinstance(entry, dict) else entry)]
        if not level:
            return False
    return True


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Writes `obj` as indented JSON, atomically.

    Raises:
        FileError: A value that JSON lacks, NaN and infinity among them; or see `write_bytes`.
    """
    try:
        text = json.dumps(obj, ensure_ascii=False, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: this can't be written as JSON: {error}") from error
    write_text(path, text + "\n")


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with an entry `checksum` over all others, for files that are written and read here.

    It tells damage and changes by hand; it is no security check, since anybody can compute it.

    Example:
        >>> with_checksum({"rank": 8})["checksum"][:20]
        'sha256:fd6fa1f57597d'
    """
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, CHECKSUM: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


def without_checksum(content: Mapping[str, Any], where: str | os.PathLike[str]) -> dict[str, Any]:
    """The inverse of `with_checksum`. An object without a checksum, as earlier versions wrote it, is accepted.

    Args:
        content: The object that was read.
        where: Its file and place, for error messages.

    Raises:
        FileError: The checksum is that of other content.
    """
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    if CHECKSUM in content and content[CHECKSUM] != with_checksum(rest)[CHECKSUM]:
        raise FileError(
            f"{os.fspath(where)} isn't what its `{CHECKSUM}` was written for: it is damaged, or was changed by hand. "
            f"Put back the original; or, if the change is meant, remove the entry `{CHECKSUM}`."
        )
    return rest


def array_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of arrays on the host: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"
