"""Events of a comparison; the events of the current run come in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_jax.training.run import events

from ..grid.plan import PlannedRun
from ..grid.result_row import ResultRow, ResultRows


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """A run begins.

    Attributes:
        run: The run.
        number: Number of the run, from 1.
        total: Number of runs that are known to be needed.
        seconds: Predicted duration; `None` for the first run.
    """

    run: PlannedRun
    number: int
    total: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """A run has succeeded or failed.

    Attributes:
        run: The run.
        row: Its row of `results.jsonl`.
        done: All rows, by the run's id.
    """

    run: PlannedRun
    row: ResultRow
    done: ResultRows


ComparisonEvent = RunStarted | RunFinished | events.Event
ComparisonListener = Callable[[ComparisonEvent], None]
