"""`results.jsonl`: one row a run, appended whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import files
from lora_jax.training.errors import RunFolderError

Row = dict[str, Any]


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
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if rest:
            files.write_text(path, "".join(f"{line}\n" for line in lines))
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is None:
                raise RunFolderError(f"{path}, line {number} isn't a row of a comparison: mend or remove the line.")
            try:
                self.rows[row["id"]] = files.without_checksum(row, f"{path}, line {number}")
            except files.FileError as error:
                raise RunFolderError(str(error)) from None

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


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"id", "error", "candidate_id"} <= row.keys() else None
