"""One row of `results.jsonl`: a run of a comparison, finished or failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class BaselineRow(TypedDict):
    """See `lora_jax.training.baseline.Baseline`."""

    answer: str
    metrics: dict[str, float]


class Device(TypedDict):
    """The machine of a run."""

    platform: str
    kind: str
    cores: int | None


class ResultRow(TypedDict):
    """The fields that a comparison reads again. Measurements of a failed run are `None`."""

    id: str
    candidate_id: str
    rate: float
    seed: int
    content: dict[str, str]
    base: dict[str, str]
    versions: dict[str, str]
    device: Device
    metric: str
    metrics: dict[str, dict[str, float]] | None
    chosen_step: int | None
    steps: int | None
    adapter_bytes: int | None
    step_ms: float | None
    baselines: dict[str, BaselineRow]
    seconds: float
    error: str | None


ResultRows = Mapping[str, ResultRow]  # by the run's id


def score(row: ResultRow, split: str) -> float:
    """The comparison's metric of a successful run on a split."""
    assert row["metrics"] is not None
    return row["metrics"][split][row["metric"]]
