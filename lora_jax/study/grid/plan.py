"""Which run comes next: breadth first, so that every candidate has run at whatever moment time ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lora_jax.training.metrics import better

from .candidates import Candidate
from .result_row import ResultRow, ResultRows, score

_UNKNOWN = 1.5  # safety factor, since a candidate that hasn't run may be slower than the others


class PlannedRun(NamedTuple):
    """One training run of a comparison."""

    candidate: Candidate
    rate: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.candidate.id}-lr{self.rate:g}-seed{self.seed}"


def count_runs(candidates: Sequence[Candidate], seeds: Sequence[int]) -> int:
    """Number of runs in the whole grid if none fails."""
    return sum(len(candidate.rates) + len(seeds) - 1 for candidate in candidates)


def count_left(candidates: Sequence[Candidate], seeds: Sequence[int], rows: ResultRows) -> int:
    """Number of remaining runs, including those whose rate isn't chosen yet."""
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


def pending(candidates: Sequence[Candidate], seeds: Sequence[int], rows: ResultRows) -> Iterator[PlannedRun]:
    """The remaining runs in order, as far as they are known.

    Every candidate runs at its first rate with the first seed, then at its other rates, then with the other seeds at
    the rate that was best on dev.
    """
    first, *others = seeds
    for number in range(max(len(candidate.rates) for candidate in candidates)):
        for candidate in candidates:
            if number < len(candidate.rates):
                run = PlannedRun(candidate, candidate.rates[number], first)
                if run.id not in rows:
                    yield run
    for seed in others:
        for candidate in candidates:
            rate = chosen_rate(candidate, first, rows)
            if rate is not None and (run := PlannedRun(candidate, rate, seed)).id not in rows:
                yield run


def next_run(
    candidates: Sequence[Candidate], seeds: Sequence[int], rows: ResultRows, fits: Callable[[PlannedRun], bool]
) -> PlannedRun | None:
    """The first pending run that fits into the remaining time; `None` if none does."""
    return next((run for run in pending(candidates, seeds, rows) if fits(run)), None)


def chosen_rate(candidate: Candidate, seed: int, rows: ResultRows) -> float | None:
    """The rate with the best dev score (the earlier of equals); `None` before a run has succeeded."""
    scores = [dev_score(rows.get(PlannedRun(candidate, rate, seed).id)) for rate in candidate.rates]
    best = max(scores)
    return candidate.rates[scores.index(best)] if best > -math.inf else None


def dev_score(row: ResultRow | None) -> float:
    """The dev score, larger is better; `-inf` for a run that failed or hasn't run."""
    if row is None or row["error"] is not None:
        return -math.inf
    return better(row["metric"], score(row, "dev"))


def predicted_seconds(run: PlannedRun, rows: ResultRows) -> float | None:
    """The time of the candidate's slowest run; if it has none, 1.5 times that of the slowest run of all.

    `None` before anything has run.
    """
    finished = [row for row in rows.values() if row["error"] is None]
    own = [row["seconds"] for row in finished if row["candidate_id"] == run.candidate.id]
    if own:
        return max(own)
    return _UNKNOWN * max(row["seconds"] for row in finished) if finished else None
