"""The runs of each candidate in summary."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from ..grid.candidates import Candidate
from ..grid.plan import PlannedRun, chosen_rate
from ..grid.result_row import ResultRows, score
from ..grid.settings import Prepared
from .costs import Cost, Costs


class Summary(NamedTuple):
    """A candidate at its chosen rate.

    Attributes:
        candidate: The candidate.
        trainable, percent: Number of trained parameters, and their percentage of all.
        rate: Learning rate chosen on dev; `None` if no run succeeded.
        tried: Dev score of each rate that has run with the first seed; `None` for a failed run.
        scores: For each split, the metric of each seed's run at the chosen rate, in the order of the seeds.
        seeds: Seeds that have run at the chosen rate.
        errors: Rate, seed and error of each failed run.
        adapter_bytes: Size of the saved file.
        step_ms: Median time of a step in the candidate's fastest run, without compilation.
        steps: Number of steps of a run.
        step_memory, latency_ms, tokens: See `measure_costs`.
    """

    candidate: Candidate
    trainable: int
    percent: float
    rate: float | None
    tried: dict[float, float | None]
    scores: dict[str, list[float]]
    seeds: list[int]
    errors: list[tuple[float, int, str]]
    adapter_bytes: int | None
    step_ms: float | None
    steps: int | None
    step_memory: int | None
    latency_ms: dict[int, float]
    tokens: int | None

    @property
    def train_seconds(self) -> float | None:
        """Number of steps times their median time: without compilation and evaluation."""
        return None if self.step_ms is None or self.steps is None else self.steps * self.step_ms / 1000

    @property
    def rate_is_at_the_edge(self) -> bool:
        """Whether the best of several rates is the lowest or the highest, so that one beyond may be better."""
        tried = [rate for rate, score in self.tried.items() if score is not None]
        return len(tried) > 1 and self.rate in (min(tried), max(tried))

    def mean(self, split: str) -> float | None:
        return statistics.mean(self.scores[split]) if self.scores.get(split) else None

    def deviation(self, split: str) -> float | None:
        """The sample standard deviation over seeds; `None` for fewer than two."""
        return statistics.stdev(self.scores[split]) if len(self.scores.get(split, ())) > 1 else None

    def standard_error(self, split: str) -> float | None:
        """The standard error of the mean over seeds."""
        deviation = self.deviation(split)
        return None if deviation is None else deviation / math.sqrt(len(self.scores[split]))


def summarize(prepared: Prepared, rows: ResultRows, costs: Costs) -> list[Summary]:
    """One summary per candidate, in the candidates' order."""
    return [_summary(prepared, candidate, rows, costs.get(candidate.id, {})) for candidate in prepared.candidates]


def _summary(prepared: Prepared, candidate: Candidate, rows: ResultRows, cost: Cost) -> Summary:
    seeds = prepared.settings.seeds
    report = prepared.reports[candidate.id]
    rate = chosen_rate(candidate, seeds[0], rows)
    own = [row for row in rows.values() if row["candidate_id"] == candidate.id]
    good = [row for row in own if row["error"] is None]
    first = {r: row for r in candidate.rates if (row := rows.get(PlannedRun(candidate, r, seeds[0]).id)) is not None}
    chosen = [row for seed in seeds for row in good if row["rate"] == rate and row["seed"] == seed]
    return Summary(
        candidate=candidate,
        trainable=report.trainable,
        percent=report.percent,
        rate=rate,
        tried={r: score(row, "dev") if row["error"] is None else None for r, row in first.items()},
        scores={split: [score(row, split) for row in chosen] for split in {"dev", prepared.split}},
        seeds=[row["seed"] for row in chosen],
        errors=[(row["rate"], row["seed"], error) for row in own if (error := row["error"]) is not None],
        adapter_bytes=chosen[0]["adapter_bytes"] if chosen else None,
        step_ms=min((ms for row in good if (ms := row["step_ms"]) is not None), default=None),
        steps=chosen[0]["steps"] if chosen else None,
        step_memory=cost.get("step_memory"),
        latency_ms={int(size): ms for size, ms in cost.get("latency_ms", {}).items()},
        tokens=cost.get("tokens"),
    )
