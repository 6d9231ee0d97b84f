"""What a comparison tells whoever watches it, beside the events of the run under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.training.run import events

from ..grid.plan import PlannedRun


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """A run begins.

    Attributes:
        run: which.
        number, total: counted from 1, of all that are known to be needed.
        seconds: predicted; `None` of the first.
    """

    run: PlannedRun
    number: int
    total: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """A run has ended, well or not; `row` is in `results.jsonl`, `done` are the rows by id."""

    run: PlannedRun
    row: Mapping[str, Any]
    done: Mapping[str, Mapping[str, Any]]


Event = RunStarted | RunFinished | events.Event
Listener = Callable[[Event], None]
