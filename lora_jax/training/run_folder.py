"""The folder of a run: what is in it, whether it may be gone on with, and its log.

```
config.yaml      the resolved options
metrics.jsonl    one row a log or evaluation
checkpoints/     best and last
adapter/         the adapter, with task.json
results.json     final metrics, counts, seconds; there when the run is complete
tensorboard/     scalars, on request
```
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import files

from .config import TrainConfig, read_yaml, write_yaml
from .errors import ConfigError, RunFolderError

_LARGEST_LOG = 2**30


class RunFolder:
    """`config.output`, checked to be free for this run or to hold its beginning; nothing is written before `start`.

    Raises:
        RunFolderError: the folder holds another run (the options that differ are shown) or other files.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.results = self.path / "results.json"
        self.tensorboard = self.path / "tensorboard"
        if self.path.exists():
            self._check(config)

    def start(self, config: TrainConfig) -> None:
        """Makes the folder and writes the resolved options into it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"`output` {self.path} can't be made: {error.strerror}.") from error
        write_yaml(self.config, config)

    def _check(self, config: TrainConfig) -> None:
        if not self.path.is_dir():
            raise RunFolderError(f"`output` {self.path} is a file, and a folder is expected.")
        if not self.config.exists():
            # A hidden file may be what a killed process was about to rename to `config.yaml`.
            if held := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
                raise RunFolderError(
                    f"`output` {self.path} holds other files ({', '.join(held[:5])}): choose a new or an empty folder."
                )
            return
        try:
            earlier = TrainConfig.from_dict({**read_yaml(self.config), "output": config.output})
        except ConfigError as error:
            where = "" if str(self.config) in str(error) else f"{self.config}: "
            raise RunFolderError(f"{where}{error} Mend the file, or choose another folder.") from error
        if differences := earlier.differences(config):
            shown = "; ".join(
                f"`{key}` is {theirs!r} there and {mine!r} here" for key, (theirs, mine) in differences.items()
            )
            raise RunFolderError(
                f"`output` {self.path} holds another run: {shown}. Choose another folder, or the same options to go on "
                "with that run."
            )

    def finished(self) -> Any | None:
        """The results of a run that is complete."""
        return files.read_json(self.results) if self.results.exists() else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Adds a row to `metrics.jsonl`."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.metrics} can't be written: {error.strerror}.") from error

    def history(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; last ones that were cut off by an interruption are left out.

        Raises:
            RunFolderError: a line that is no row, with rows after it: that is no interruption's.
        """
        if not self.metrics.exists():
            return []
        lines = files.read_bytes(self.metrics, max_bytes=_LARGEST_LOG).split(b"\n")
        rows = [_row(line) for line in lines]
        while rows and rows[-1] is None:
            rows.pop()
        if None in rows:
            raise RunFolderError(
                f"{self.metrics}, line {rows.index(None) + 1} is no row of a run's log, an object with a `step`: mend "
                "or remove the line."
            )
        return [row for row in rows if row is not None]

    def rewind_log(self, step: int) -> None:
        """Drops rows after `step`: those steps are done again."""
        if self.metrics.exists():
            kept = [row for row in self.history() if row["step"] <= step]
            files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def _row(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(files.FileError):
        row = files.parse_json(line, "the line")
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return None
