"""The result of a run, and `results.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import files
from lora_jax.adapters import AdapterError, verify_adapter
from lora_jax.text import clipped

from ..baseline import Baseline
from ..errors import RunFolderError, TrainingError
from ..task_file import TASK_FILE, read_task
from .events import Listener, Note
from .folder import LogRow, RunFolder


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a finished run; `results.json` holds the same without the paths and the history.

    Attributes:
        output: Folder of the run.
        adapter: Folder of the adapter.
        metrics: Metrics of the chosen checkpoint by split, `{"dev": {...}, "test": {...}}`.
        metric: Metric that the checkpoint was chosen by; `None` for a run of an earlier version.
        baselines: Scores of one answer to all texts, by split; empty for a language model or an earlier version.
        chosen: How the checkpoint was chosen: `"best accuracy on dev"` or `"last"`.
        chosen_step: Step of the chosen checkpoint.
        steps: Number of steps.
        labels: Names of the labels; empty in a regression.
        trainable, total, percent: Parameter counts; the total includes the adapter's own.
        adapter_bytes: Size of `adapter.safetensors`.
        train_seconds: Time of the steps, with compiling and without evaluations and checkpoints.
        step_ms: Median time of a step without compiling; `None` for a run that is too short to tell.
        waiting_share: Share of `train_seconds` spent on waiting for batches; `None` for an earlier version.
        padding_share: Share of padding in the training batches.
        truncated: Number of texts cut at `max_length`, by split.
        dropped: Number of texts left out because all of their targets lie beyond `max_length`, by split.
        resumed_from: Step that this call resumed from; `None` for a run without interruption.
        history: Sequences of `metrics.jsonl`.
    """

    output: Path
    adapter: Path
    metrics: dict[str, dict[str, float | None]]
    chosen: str
    chosen_step: int
    steps: int
    labels: tuple[str, ...]
    trainable: int
    total: int
    percent: float
    adapter_bytes: int
    train_seconds: float
    step_ms: float | None
    waiting_share: float | None
    padding_share: float
    truncated: dict[str, int]
    dropped: dict[str, int]
    resumed_from: int | None
    history: list[LogRow]
    metric: str | None = None
    baselines: dict[str, Baseline] = dataclasses.field(default_factory=dict)


_NOT_IN_FILE = ("output", "adapter", "history")

Check = Callable[[object], bool]


def write_result(folder: RunFolder, result: RunResult) -> None:
    """Writes `results.json`, which marks the run as complete."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in _NOT_IN_FILE}
    baselines = {split: baseline._asdict() for split, baseline in result.baselines.items()}
    content = fields | {"labels": list(result.labels), "baselines": baselines}
    content |= {"adapter_checksum": _adapter_checksum(folder.adapter)}
    files.write_json(folder.results, files.with_checksum(content))


def read_result(folder: RunFolder, listen: Listener) -> RunResult | None:
    """The result of a complete run; `None` if the run isn't complete, or its results or its adapter are damaged.

    Args:
        folder: Folder of the run.
        listen: Callback that is told what is damaged and will be made anew from the checkpoint.

    Raises:
        RunFolderError: The folder holds the adapter of another run.
    """
    if not folder.results.exists():
        return None
    try:
        saved = files.without_checksum(_read_object(folder.results), folder.results)
        expected = saved.pop("adapter_checksum", None)
        fields = _checked({**_YOUNGER, **saved}, folder.results)
    except files.FileError as error:
        listen(Note(message=f"{folder.results} was damaged or changed, and is made anew from the checkpoint: {error}"))
        return None
    try:
        history = folder.history()
    except RunFolderError as error:
        listen(Note(message=f"the log of this run can't be read: {error}"))
        history = []
    result = RunResult(output=folder.path, adapter=folder.adapter, history=history, **fields)
    try:
        found = _adapter_checksum(folder.adapter)
    except (files.FileError, AdapterError, TrainingError) as error:
        listen(
            Note(message=f"the adapter of this run is lost or damaged, and is made anew from the checkpoint: {error}")
        )
        return None
    if expected is not None and found != expected:
        raise RunFolderError(
            f"{folder.adapter} isn't the adapter of the run in {folder.path}. Move it elsewhere and start the run "
            "again: its own adapter is made anew."
        )
    return result


def _read_object(path: Path) -> dict[str, object]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise files.FileError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _adapter_checksum(folder: Path) -> str:
    """Checksum of the adapter and its task file, once both are found to be intact."""
    read_task(folder)
    task = _read_object(folder / TASK_FILE)
    content = {"adapter": verify_adapter(folder), "task": files.with_checksum(task)[files.CHECKSUM]}
    return files.with_checksum(content)[files.CHECKSUM]


def _checked(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a result, if each has a possible value."""
    for name, fits in _FITS.items():
        if name not in saved:
            raise files.FileError(f"{path} lacks `{name}`.")
        if not fits(saved[name]):
            raise files.FileError(f"{path}: `{name}` can't be {saved[name]!r:.80}.")
    if unknown := saved.keys() - _FITS.keys():
        raise files.FileError(f"{path} has `{clipped(min(unknown))}`, which no run writes.")
    baselines = {split: Baseline(**held) for split, held in saved["baselines"].items()}
    return saved | {"labels": tuple(saved["labels"]), "baselines": baselines}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or_none(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def _table_of(fits: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_baseline(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Baseline._fields)
        and isinstance(value["answer"], str)
        and _table_of(_is_number)(value["metrics"])
    )


# Fields that the file of an earlier version may lack.
_YOUNGER: dict[str, object] = {"waiting_share": None, "dropped": {}, "baselines": {}, "metric": None}
_FITS: dict[str, Check] = {
    "metrics": _table_of(_table_of(_or_none(_is_number))),
    "baselines": _table_of(_is_baseline),
    "chosen": lambda value: isinstance(value, str),
    "metric": _or_none(lambda value: isinstance(value, str)),
    "labels": lambda value: isinstance(value, list) and all(isinstance(label, str) for label in value),
    **dict.fromkeys(("chosen_step", "steps", "trainable", "total", "adapter_bytes"), _is_count),
    **dict.fromkeys(("percent", "train_seconds", "padding_share"), _is_number),
    **dict.fromkeys(("step_ms", "waiting_share"), _or_none(_is_number)),
    **dict.fromkeys(("truncated", "dropped"), _table_of(_is_count)),
    "resumed_from": _or_none(_is_count),
}
