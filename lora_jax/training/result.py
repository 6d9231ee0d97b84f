"""What a run gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import files

from .baseline import Baseline
from .run_folder import RunFolder


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
    files.write_json(folder.results, fields | {"labels": list(result.labels), "baselines": baselines})


def read_result(folder: RunFolder, saved: Mapping[str, Any]) -> RunResult:
    """The result of a run that was complete before."""
    return RunResult(
        output=folder.path,
        adapter=folder.adapter,
        history=folder.history(),
        **{
            "waiting_share": None,
            "dropped": {},
            **saved,
            "labels": tuple(saved["labels"]),
            "baselines": {split: Baseline(**held) for split, held in saved.get("baselines", {}).items()},
        },
    )
