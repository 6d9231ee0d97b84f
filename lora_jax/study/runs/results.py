"""`results.jsonl`: one row a run, appended whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_jax import files
from lora_jax.training.errors import RunFolderError

Row = dict[str, Any]
_LARGEST = 2**30  # bytes


class ResultsFile:
    """The rows of a comparison, by the run's id; the last of an id counts.

    A process that is killed while it writes leaves half a line at the end, which the next one takes away.

    Args:
        path: made with the first row.

    Raises:
        RunFolderError: a line that is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if not path.exists():
            return
        # Not `splitlines`, which also splits where an error's text has one of Unicode's own line breaks.
        *lines, rest = files.read_bytes(path, max_bytes=_LARGEST).split(b"\n")
        for number, line in enumerate(lines, start=1):
            row = _parse(line, f"{path}, line {number}")
            self.rows[row["id"]] = row
        if rest:
            files.write_text(path, "".join(f"{line.decode()}\n" for line in lines))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row, on disk before this returns.

        Raises:
            RunFolderError: a full disk, or another failure to write.
        """
        line = _line(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(
                f"{self.path} can't be written: {error.strerror}. The rows before are whole; start again to go on."
            ) from error
        self.rows[row["id"]] = dict(row)

    def forget_failures(self) -> int:
        """Leaves out the rows of failed runs, so that those are tried again; how many there were."""
        kept = {key: row for key, row in self.rows.items() if row["error"] is None}
        forgotten = len(self.rows) - len(kept)
        if forgotten:
            files.write_text(self.path, "".join(map(_line, kept.values())))
        self.rows = kept
        return forgotten


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(files.with_checksum(row), ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: bytes, where: str) -> Row:
    way_out = "mend or remove the line"
    try:
        row = files.parse_json(line, where)
    except files.FileError as error:
        raise RunFolderError(f"{where} isn't a row of a comparison: {way_out}. {error}") from None
    if not isinstance(row, dict) or not row.keys() >= {"id", "error", "candidate_id"}:
        raise RunFolderError(f"{where} isn't a row of a comparison: {way_out}.")
    try:
        row = files.without_checksum(row, where)
    except files.FileError as error:
        raise RunFolderError(str(error)) from None
    for name, fits in _FIELDS.items():
        if name in row and not fits(row[name]):
            raise RunFolderError(f"{where} isn't a row of a comparison: its `{name}` can't be; {way_out}.")
    if row["error"] is None and "metrics" in row and not _is_scored(row):
        raise RunFolderError(f"{where} isn't a row of a comparison: its `metrics` lack its `metric`; {way_out}.")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# What a plan is made from.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "id": lambda value: isinstance(value, str),
    "candidate_id": lambda value: isinstance(value, str),
    "error": lambda value: value is None or isinstance(value, str),
    "rate": _is_number,
    "seed": lambda value: type(value) is int,
    "seconds": _is_number,
}


def _is_scored(row: Row) -> bool:
    """Whether each split that a successful run was scored on has the metric, a number."""
    metrics = row["metrics"]
    return (
        isinstance(row.get("metric"), str)
        and isinstance(metrics, dict)
        and "dev" in metrics
        and all(isinstance(split, dict) and _is_number(split.get(row.get("metric"))) for split in metrics.values())
    )
