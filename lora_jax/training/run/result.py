"""What a run gives back."""

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
from .folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run; `results.json` holds the same, without the paths and the history.

    Attributes:
        output: the run's folder.
        adapter: the adapter's.
        metrics: `{"dev": {...}, "test": {...}}` of the chosen checkpoint, as far as there is such data.
        metric: That chooses the checkpoint; `None` of a run made before this was kept.
        baselines: What one answer to all texts scores, by split; empty of a language model, and of a run made before
            this was measured.
        chosen: how the checkpoint was chosen: `"best accuracy on dev"` or `"last"`.
        chosen_step, steps: its step, and how many there were.
        labels: the label names; empty in a regression.
        trainable, total, percent: parameters, the adapter's own included in the total.
        adapter_bytes: size of `adapter.safetensors`.
        train_seconds: of the steps, compiling included, evaluations and checkpoints not.
        step_ms: the median time of a step, compiling not included; `None` of a run too short to tell.
        waiting_share: of `train_seconds`, in which the loop waited for a batch; `None` of a run made before that was
            measured.
        padding_share: of the places in training batches that held no token.
        truncated: `{split: texts cut at max_length}`.
        dropped: `{split: texts left out}`, as all that was to be predicted lay beyond that.
        resumed_from: the step that this call went on from; `None` of a run done in one go.
        history: the rows of `metrics.jsonl`.
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
    history: list[dict[str, Any]]
    metric: str | None = None
    baselines: dict[str, Baseline] = dataclasses.field(default_factory=dict)


_NOT_IN_FILE = ("output", "adapter", "history")


def write_result(folder: RunFolder, result: RunResult) -> None:
    """Writes `results.json`, which also says that the run is complete."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in _NOT_IN_FILE}
    baselines = {split: baseline._asdict() for split, baseline in result.baselines.items()}
    content = fields | {"labels": list(result.labels), "baselines": baselines}
    content |= {"adapter_checksum": _adapter_checksum(folder.adapter)}
    files.write_json(folder.results, files.with_checksum(content))


def read_result(folder: RunFolder, listen: Listener) -> RunResult | None:
    """The result of a run that is complete; `None` of one that isn't, be it that its results or its adapter are lost.

    Args:
        folder: the run's.
        listen: told of what is lost, and made anew from the checkpoint.

    Raises:
        RunFolderError: an adapter that isn't the run's is in its place.
    """
    if not folder.results.exists():
        return None
    try:
        saved = files.without_checksum(_read_object(folder.results), folder.results)
        expected = saved.pop("adapter_checksum", None)
        fields = _checked({**_YOUNGER, **saved}, folder.results)
    except files.FileError as error:
        listen(
            Note(
                message=f"{folder.results} is no longer that of the run, and is made anew from the checkpoint: {error}"
            )
        )
        return None
    try:
        history = folder.history()
    except RunFolderError as error:
        listen(Note(message=f"the log of this run is left out: {error}"))
        history = []
    result = RunResult(output=folder.path, adapter=folder.adapter, history=history, **fields)
    try:
        found = _adapter_checksum(folder.adapter)
    except (files.FileError, AdapterError, TrainingError) as error:
        listen(Note(message=f"the adapter of this run is lost, and is made anew from the checkpoint: {error}"))
        return None
    if expected is not None and found != expected:
        raise RunFolderError(
            f"{folder.adapter} holds another adapter than that of the run in {folder.path}. Move it elsewhere and "
            "start the same command again: the run's is made anew."
        )
    return result


def _read_object(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise files.FileError(f"{path} must hold an object, and holds a {type(content).__name__}.")
    return content


def _adapter_checksum(folder: Path) -> str:
    """Of the adapter and its task, both found to be whole."""
    read_task(folder)
    task = _read_object(folder / TASK_FILE)
    content = {"adapter": verify_adapter(folder), "task": files.with_checksum(task)[files.CHECKSUM]}
    return files.with_checksum(content)[files.CHECKSUM]


def _checked(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a result, if each is what it can be."""
    for name, fits in _FITS.items():
        if name not in saved:
            raise files.FileError(f"{path} lacks `{name}`.")
        if not fits(saved[name]):
            raise files.FileError(f"{path}: `{name}` can't be {saved[name]!r:.80}.")
    if unknown := saved.keys() - _FITS.keys():
        raise files.FileError(f"{path} has `{clipped(min(unknown))}`, which no run writes.")
    baselines = {split: Baseline(**held) for split, held in saved["baselines"].items()}
    return saved | {"labels": tuple(saved["labels"]), "baselines": baselines}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_baseline(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Baseline._fields)
        and isinstance(value["answer"], str)
        and _table_of(_is_number)(value["metrics"])
    )


# What an earlier version's file lacks.
_YOUNGER: dict[str, Any] = {"waiting_share": None, "dropped": {}, "baselines": {}, "metric": None}
_FITS: dict[str, Callable[[Any], bool]] = {
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
