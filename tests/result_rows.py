"""Rows of `results.jsonl`, as a comparison's runs leave them."""

from __future__ import annotations

from lora_jax.study.grid.result_row import ResultRow


def result_row(
    name: str,
    *,
    candidate: str = "a",
    rate: float = 0.0,
    seed: int = 0,
    metric: str = "accuracy",
    score: float | None = None,
    seconds: float = 1.0,
    error: str | None = None,
) -> ResultRow:
    """The row of a run with this score on dev; without one it has no measurements."""
    return ResultRow(
        id=name,
        candidate_id=candidate,
        rate=rate,
        seed=seed,
        content={},
        base={},
        versions={},
        device={"platform": "cpu", "kind": "cpu", "cores": 1},
        metric=metric,
        metrics=None if score is None else {"dev": {metric: score}},
        chosen_step=None,
        steps=None,
        adapter_bytes=None,
        step_ms=None,
        baselines={},
        seconds=seconds,
        error=error,
    )
