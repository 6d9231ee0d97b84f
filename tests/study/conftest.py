"""The tiny base and data of the training tests, one real comparison to look at, and runs that cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jax.study import Comparison, compare, make_candidate
from lora_jax.training.config import resolve
from lora_jax.training.run.loop import RunResult
from tests.training.conftest import (  # noqa: F401
    _compile_each_program_once,
    _own_cache,
    base,
    data,
)

HOSTILE = '<script>alert(1)</script> & "$x_1^2$" | `a`'


@pytest.fixture(scope="session")
def shared(base, data) -> dict:  # noqa: F811
    """Options of short runs of one shape."""
    return {**data, "base": base, "epochs": 2, "batch_size": 16, "dropout": 0.0, "buckets": 1}


@pytest.fixture(scope="session")
def settings(shared, tmp_path_factory) -> Comparison:
    """With a label that wants to be markup, and a rate at which training breaks."""
    return Comparison(
        output=str(tmp_path_factory.mktemp("studies") / "study"),
        options=shared,
        candidates=(
            make_candidate("frozen", rates=[3e-2]),
            make_candidate({"name": "lora", "rank": 2}, label=HOSTILE, rates=[1e-2, 1e30], mark="r=2"),
            make_candidate("full", rates=[1e-2]),
        ),
        seeds=(0, 1),
    )


@pytest.fixture(scope="session")
def outcome(settings):
    return compare(settings)


class FakeTraining:
    """In place of `train`: scores by rate, takes time on a clock of its own, and breaks where it is told to."""

    def __init__(self, scores: dict[float, float], *, seconds: float = 10.0) -> None:
        self.scores, self.seconds, self.now = scores, seconds, 0.0
        self.ran: list[tuple[str, float, int]] = []
        self.errors: dict[tuple[str, float, int], BaseException] = {}

    def clock(self) -> float:
        return self.now

    def __call__(self, config, *, on_progress=None) -> RunResult:
        run = (type(resolve(config).method).__name__, config.lr, config.seed)
        if run in self.errors:
            raise self.errors[run]
        self.ran.append(run)
        self.now += self.seconds
        folder = Path(config.output)
        for name in ("adapter", "checkpoints"):
            (folder / name).mkdir(parents=True)
        scores: dict[str, float | None] = {
            "accuracy": self.scores[config.lr],
            "macro_f1": 0.5,
            "matthews": 0.5,
            "loss": 1.0,
        }
        return RunResult(
            output=folder,
            adapter=folder / "adapter",
            metrics={"dev": scores, "test": scores},
            chosen="last",
            chosen_step=4,
            steps=4,
            labels=("neg", "pos"),
            trainable=10,
            total=100,
            percent=10.0,
            adapter_bytes=100,
            train_seconds=self.seconds,
            step_ms=5.0,
            waiting_share=0.0,
            padding_share=0.0,
            truncated={},
            dropped={},
            resumed_from=None,
            history=[],
        )


@pytest.fixture
def fake(monkeypatch) -> FakeTraining:
    """Two candidates at the rates 0.1 and 0.2 are compared in no time; costs aren't measured."""
    training = FakeTraining({0.1: 0.8, 0.2: 0.9})
    monkeypatch.setattr("lora_jax.study.runs.comparison.train", training)
    monkeypatch.setattr("lora_jax.study.runs.comparison.measure_costs", lambda *arguments: {})
    monkeypatch.setattr("lora_jax.study.runs.comparison.time.perf_counter", training.clock)
    return training


@pytest.fixture
def small(shared, tmp_path) -> Comparison:
    return Comparison(
        output=str(tmp_path / "study"),
        options=shared,
        candidates=(make_candidate("bitfit", rates=[0.1, 0.2]), make_candidate("full", rates=[0.1, 0.2])),
        seeds=(0, 1),
    )
