"""The folder of a run: its files, whether the run may resume in it, and its log.

```
config.yaml      settled options
run.json         hashes of everything that the result depends on
metrics.jsonl    losses and metrics by step
checkpoints/     best and last checkpoints
adapter/         adapter, with task.json
results.json     final metrics, counts, times; there when the run is complete
tensorboard/     scalars, on request
```
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from lora_jax import files
from lora_jax.files.locks import BusyError, locked

from ..config import RunConfig, TrainConfig
from ..config_file import read_yaml, write_yaml
from ..errors import ConfigError, RunFolderError
from .inputs import RunInputs, describe_differences, read_inputs, source_sums, write_inputs

# A row of `metrics.jsonl`: step, split and numbers.
LogRow = Mapping[str, Any]

LOCK = ".lora_jax.lock"
_LARGEST_LOG = 2**30


class RunFolder:
    """`config.output`, checked to be free or to hold the beginning of this run; nothing is written before `start`.

    As a context manager it locks the folder: at once where it exists, from `start` on where it doesn't.

    Args:
        config: Settled options of the run.

    Raises:
        RunFolderError: The folder holds another run (the options that differ are shown) or other files, or is in use
            by another process.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.output)
        self._options = config
        self._held: contextlib.ExitStack | None = None
        self.config = self.path / "config.yaml"
        self.inputs = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.results = self.path / "results.json"
        self.tensorboard = self.path / "tensorboard"
        if self.path.exists():
            self._check()

    def __enter__(self) -> Self:
        if self.path.exists():
            self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.close()

    def _hold(self) -> None:
        self._held = contextlib.ExitStack()
        self._held.enter_context(held_alone(self.path))
        self._check()  # another run may have started here since

    def start(self) -> None:
        """Makes the folder and writes the settled options into it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"`output` {self.path} can't be made: {error.strerror}.") from error
        if self._held is None:
            self._hold()
        write_yaml(self.config, self._options)

    def require_inputs(self, inputs: RunInputs) -> list[str]:
        """Refuses to resume a run that began with other inputs.

        Returns:
            Packages whose versions have changed, which may change the last bits.

        Raises:
            RunFolderError: An input has changed; it is named.
        """
        if not self.inputs.exists():  # a new run, or one of an earlier version
            return []
        begun = read_inputs(self.inputs)
        if differences := begun.differences(inputs):
            changed = describe_differences(self._options, differences)
            raise RunFolderError(
                f"`output` {self.path} holds a run on {changed}. Choose another folder, or restore what has changed to "
                "resume that run."
            )
        names = {**begun.versions, **inputs.versions}
        return [
            f"{name} {begun.versions.get(name)} is {inputs.versions.get(name)} now"
            for name in names
            if begun.versions.get(name) != inputs.versions.get(name)
        ]

    def keep_inputs(self, inputs: RunInputs) -> None:
        """Writes `run.json` if it doesn't exist."""
        if not self.inputs.exists():
            write_inputs(self.inputs, inputs)

    def has_its_sources(self) -> bool:
        """Whether the data files that exist are those the run began with, byte for byte."""
        if not self.inputs.exists():
            return True
        begun = read_inputs(self.inputs).sources
        return all(begun.get(name, found) == found for name, found in source_sums(self._options).items())

    def _check(self) -> None:
        if not self.path.is_dir():
            raise RunFolderError(f"`output` must be a folder, and {self.path} is a file.")
        if not self.config.exists():
            # A hidden file may be what a killed process was about to rename to `config.yaml`.
            if held := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
                raise RunFolderError(
                    f"`output` {self.path} holds other files ({', '.join(held[:5])}): choose a new or an empty folder."
                )
            return
        try:
            earlier = TrainConfig.from_dict({**read_yaml(self.config), "output": str(self.path)})
        except ConfigError as error:
            where = "" if str(self.config) in str(error) else f"{self.config}: "
            raise RunFolderError(f"{where}{error} Fix the file, or choose another folder.") from error
        if differences := earlier.differences(self._options):
            shown = "; ".join(
                f"`{key}` is {theirs!r} there and {mine!r} here" for key, (theirs, mine) in differences.items()
            )
            raise RunFolderError(
                f"`output` {self.path} holds another run: {shown}. Choose another folder, or the same options to "
                "resume that run."
            )

    def log(self, row: LogRow) -> None:
        """Adds a row to `metrics.jsonl`."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.metrics} can't be written: {error.strerror}.") from error

    def history(self) -> list[LogRow]:
        """The rows of `metrics.jsonl`, without a last one that an interruption cut off.

        Raises:
            RunFolderError: A line isn't a row, and no interruption can explain it.
        """
        if not self.metrics.exists():
            return []
        rows: list[LogRow] = []
        *lines, rest = files.read_bytes(self.metrics, max_bytes=_LARGEST_LOG).split(b"\n")
        for number, line in enumerate([*lines, rest], start=1):
            try:
                row = files.parse_json(line, f"line {number}")
            except files.FileError as error:
                if number <= len(lines) or not rest.isascii():  # as every row is that a run writes
                    raise self._no_log(str(error).rstrip(".")) from None
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise self._no_log(f"line {number} is no object with a `step`")
            rows.append(row)
        return rows

    def _no_log(self, reason: str | None) -> RunFolderError:
        return RunFolderError(
            f"{self.metrics} isn't the log of a run: {reason}. Restore it, or remove it to resume without."
        )

    def rewind_log(self, step: int) -> None:
        """Drops the rows after `step`, as those steps are repeated."""
        if self.metrics.exists():
            kept = [row for row in self.history() if row["step"] <= step]
            files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


@contextlib.contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Locks an existing folder for this process and thread.

    Raises:
        RunFolderError: The folder is in use by another; the message says by which.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK))
        except BusyError as holder:
            raise RunFolderError(
                f"`output` {folder} is in use by {holder}: wait until it ends, or choose another folder."
            ) from None
        yield
