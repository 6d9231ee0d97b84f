"""What a run gives back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import files
from lora_jax.adapters import AdapterError, verify_adapter

from .errors import RunFolderError, TrainingError
from .events import Listener, Note
from .run_folder import RunFolder
from .task_file import TASK_FILE, read_task


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run; `results.json` holds the same, without the paths and the history.

    Attributes:
        output: the run's folder.
        adapter: the adapter's.
        metrics: `{"dev": {...}, "test": {...}}` of the chosen checkpoint, as far as there is such data.
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
    metrics: dict[str, dict[str, float]]
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


_NOT_IN_FILE = ("output", "adapter", "history")


def write_result(folder: RunFolder, result: RunResult) -> None:
    """Writes `results.json`, which also says that the run is complete."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in _NOT_IN_FILE}
    content = fields | {"labels": list(result.labels), "adapter_checksum": _adapter_checksum(folder.adapter)}
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
        fields = {"waiting_share": None, "dropped": {}, **saved, "labels": tuple(saved["labels"])}
        result = RunResult(output=folder.path, adapter=folder.adapter, history=folder.history(), **fields)
    except (files.FileError, KeyError, TypeError) as error:
        listen(
            Note(
                message=f"{folder.results} is no longer that of the run, and is made anew from the checkpoint: {error}"
            )
        )
        return None
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
