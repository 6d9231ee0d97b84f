"""Which run comes next: breadth first, so that whenever time ends every candidate has been seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.metrics import better

from .candidates import Candidate

Rows = Mapping[str, Mapping[str, Any]]  # of `results.jsonl`, by the run's id

_UNKNOWN = 1.5  # a candidate that hasn't run may be slower than those that have


class PlannedRun(NamedTuple):
    """One training run of a comparison."""

    candidate: Candidate
    rate: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.candidate.id}-lr{self.rate:g}-seed{self.seed}"


def count_runs(candidates: Sequence[Candidate], seeds: Sequence[int]) -> int:
    """Of the whole grid, where no run fails."""
    return sum(len(candidate.rates) + len(seeds) - 1 for candidate in candidates)


def count_left(candidates: Sequence[Candidate], seeds: Sequence[int], rows: Rows) -> int:
    """How many runs are still to do, also those whose rate isn't chosen yet."""
    first, *others = seeds
    left = 0
    for candidate in candidates:
        rates = sum(PlannedRun(candidate, rate, first).id not in rows for rate in candidate.rates)
        rate = chosen_rate(candidate, first, rows)
        if rate is not None:
            left += sum(PlannedRun(candidate, rate, seed).id not in rows for seed in others)
        elif rates:
            left += len(others)
        left += rates
    return left


def pending(candidates: Sequence[Candidate], seeds: Sequence[int], rows: Rows) -> Iterator[PlannedRun]:
    """What is left to run, in order, as far as it is known.

    Every candidate at its first rate and the first seed; then the other rates; then the other seeds, each candidate at
    the rate that dev chose among those that ran.
    """
    first, *others = seeds
    for place in range(max(len(candidate.rates) for candidate in candidates)):
        for candidate in candidates:
            if place < len(candidate.rates):
                run = PlannedRun(candidate, candidate.rates[place], first)
                if run.id not in rows:
                    yield run
    for seed in others:
        for candidate in candidates:
            rate = chosen_rate(candidate, first, rows)
            if rate is not None and (run := PlannedRun(candidate, rate, seed)).id not in rows:
                yield run


def next_run(
    candidates: Sequence[Candidate], seeds: Sequence[int], rows: Rows, fits: Callable[[PlannedRun], bool]
) -> PlannedRun | None:
    """The first pending run that fits into the time left; `None` where none does."""
    return next((run for run in pending(candidates, seeds, rows) if fits(run)), None)


def chosen_rate(candidate: Candidate, seed: int, rows: Rows) -> float | None:
    """The rate with the best score on dev, the earlier of equals; `None` before a run has succeeded."""
    scores = [dev_score(rows.get(PlannedRun(candidate, rate, seed).id)) for rate in candidate.rates]
    best = max(scores)
    return candidate.rates[scores.index(best)] if best > -math.inf else None


def dev_score(row: Mapping[str, Any] | None) -> float:
    """Larger is better; `-inf` of a run that failed or hasn't been."""
    if row is None or row["error"] is not None:
        return -math.inf
    return better(row["metric"], row["metrics"]["dev"][row["metric"]])


def predicted_seconds(run: PlannedRun, rows: Rows) -> float | None:
    """As long as the candidate's slowest run; before it has one, half as much again as the slowest of all.

    `None` before anything has run.
    """
    finished = [row for row in rows.values() if row["error"] is None]
    own = [row["seconds"] for row in finished if row["candidate_id"] == run.candidate.id]
    if own:
        return max(own)
    return _UNKNOWN * max(row["seconds"] for row in finished) if finished else None
