"""The file `results.jsonl`: one row per run, appended whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from lora_jax import files
from lora_jax.training.errors import RunFolderError

from ..grid.result_row import ResultRow

_LARGEST = 2**30  # bytes


class ResultsFile:
    """The rows of a comparison, by the run's id. The last row with an id counts.

    A process that is killed while it writes leaves half a line at the end, which the next one removes.

    Args:
        path: Path of the file, which is created with the first row.

    Raises:
        RunFolderError: A line is not a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, ResultRow] = {}
        if not path.exists():
            return
        # Not `splitlines`, which also splits at Unicode's other line breaks, and an error's text may have some.
        *lines, rest = files.read_bytes(path, max_bytes=_LARGEST).split(b"\n")
        for number, line in enumerate(lines, start=1):
            row = _parse(line, f"{path}, line {number}")
            self.rows[row["id"]] = row
        if rest:
            files.write_text(path, "".join(f"{line.decode()}\n" for line in lines))

    def append(self, row: ResultRow) -> None:
        """Adds a row, which is on disk when this returns.

        Raises:
            RunFolderError: The disk is full, or the file can't be written for another reason.
        """
        line = _line(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(
                f"{self.path} can't be written: {error.strerror}. The earlier rows are intact; run the same command to "
                "resume."
            ) from error
        self.rows[row["id"]] = row.copy()

    def forget_failures(self) -> int:
        """Removes the rows of failed runs, so that these are retried; returns how many there were."""
        kept = {key: row for key, row in self.rows.items() if row["error"] is None}
        forgotten = len(self.rows) - len(kept)
        if forgotten:
            files.write_text(self.path, "".join(map(_line, kept.values())))
        self.rows = kept
        return forgotten


def _line(row: ResultRow) -> str:
    return json.dumps(files.with_checksum(row), ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: bytes, where: str) -> ResultRow:
    way_out = "fix or remove this line"
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
            raise RunFolderError(f"{where} isn't a row of a comparison: its `{name}` is invalid; {way_out}.")
    if row["error"] is None and "metrics" in row and not _is_scored(row["metrics"], row.get("metric")):
        raise RunFolderError(f"{where} isn't a row of a comparison: its `metrics` lack its `metric`; {way_out}.")
    return cast(ResultRow, row)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The fields that a plan depends on.
_FIELDS: dict[str, Callable[[object], bool]] = {
    "id": lambda value: isinstance(value, str),
    "candidate_id": lambda value: isinstance(value, str),
    "error": lambda value: value is None or isinstance(value, str),
    "rate": _is_number,
    "seed": lambda value: type(value) is int,
    "seconds": _is_number,
}


def _is_scored(metrics: object, metric: object) -> bool:
    """Whether there is a dev score, and the metric is a number on every split."""
    return (
        isinstance(metric, str)
        and isinstance(metrics, dict)
        and "dev" in metrics
        and all(isinstance(split, dict) and _is_number(split.get(metric)) for split in metrics.values())
    )
