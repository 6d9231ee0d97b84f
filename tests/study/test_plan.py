"""The order of runs, and what is predicted of them."""

from __future__ import annotations

from lora_jax.study.grid.candidates import make_candidate
from lora_jax.study.grid.plan import (
    PlannedRun,
    chosen_rate,
    count_left,
    count_runs,
    next_run,
    pending,
    predicted_seconds,
)

A = make_candidate("bitfit", rates=[0.1, 0.2, 0.3])
B = make_candidate("full", rates=[1.0, 2.0])
SEEDS = (5, 6, 7)


def row(run: PlannedRun, score: float | None, *, seconds: float = 1.0, metric: str = "accuracy") -> dict:
    return {
        "id": run.id,
        "candidate_id": run.candidate.id,
        "metric": metric,
        "metrics": None if score is None else {"dev": {metric: score}},
        "error": "broke" if score is None else None,
        "seconds": seconds,
    }


def everything(score) -> list[tuple[str, float, int]]:
    """All runs in the order in which they come, where `score(run)` says how each ends."""
    rows: dict[str, dict] = {}
    order = []
    while (run := next_run((A, B), SEEDS, rows, lambda run: True)) is not None:
        order.append((run.candidate.method["name"], run.rate, run.seed))
        rows[run.id] = row(run, score(run))
    assert len(rows) == len(order)
    return order


def test_breadth_first_then_seeds_at_the_chosen_rate():
    order = everything(lambda run: {0.2: 0.9, 1.0: 0.8}.get(run.rate, 0.5))
    first = [("bitfit", 0.1, 5), ("full", 1.0, 5)]
    rates = [("bitfit", 0.2, 5), ("full", 2.0, 5), ("bitfit", 0.3, 5)]
    seeds = [("bitfit", 0.2, 6), ("full", 1.0, 6), ("bitfit", 0.2, 7), ("full", 1.0, 7)]
    assert order == first + rates + seeds
    assert len(order) == count_runs((A, B), SEEDS)


def test_a_failed_rate_is_never_chosen_and_a_candidate_that_always_fails_has_no_seeds():
    order = everything(lambda run: None if run.candidate is B or run.rate == 0.2 else run.rate)
    assert [run for run in order if run[0] == "full"] == [("full", 1.0, 5), ("full", 2.0, 5)]
    assert order[-2:] == [("bitfit", 0.3, 6), ("bitfit", 0.3, 7)]


def test_of_equals_the_earlier_rate_and_a_loss_counts_downward():
    runs = [PlannedRun(A, rate, 5) for rate in A.rates]
    assert chosen_rate(A, 5, {run.id: row(run, 0.5) for run in runs}) == 0.1
    losses = {run.id: row(run, score, metric="loss") for run, score in zip(runs, (0.5, 0.2, 0.4), strict=True)}
    assert chosen_rate(A, 5, losses) == 0.2
    assert chosen_rate(A, 5, {}) is None


def test_what_does_not_fit_is_passed_over():
    rows = {PlannedRun(A, 0.1, 5).id: row(PlannedRun(A, 0.1, 5), 0.5)}
    run = next_run((A, B), SEEDS, rows, lambda run: run.candidate is A)
    assert run is not None
    assert run[1:] == (0.2, 5)
    assert next_run((A, B), SEEDS, rows, lambda run: False) is None
    # Seeds of a candidate may run while rates of another are still to do.
    assert PlannedRun(A, 0.1, 6) in list(pending((A, B), SEEDS, rows))


def test_predictions():
    rows = {run.id: row(run, 0.5, seconds=s) for run, s in ((PlannedRun(A, 0.1, 5), 4.0), (PlannedRun(A, 0.2, 5), 3.0))}
    assert predicted_seconds(PlannedRun(A, 0.3, 5), {}) is None
    assert predicted_seconds(PlannedRun(A, 0.3, 5), rows) == 4.0
    assert predicted_seconds(PlannedRun(B, 1.0, 5), rows) == 6.0


def test_what_is_left():
    rows: dict[str, dict] = {}
    for done, run in enumerate(iter(lambda: next_run((A, B), SEEDS, rows, lambda run: True), None)):
        assert count_left((A, B), SEEDS, rows) == count_runs((A, B), SEEDS) - done
        rows[run.id] = row(run, run.rate)
    assert count_left((A, B), SEEDS, rows) == 0
    failed = {run.id: row(run, None) for run in (PlannedRun(B, rate, 5) for rate in B.rates)}
    assert count_left((B,), SEEDS, failed) == 0
