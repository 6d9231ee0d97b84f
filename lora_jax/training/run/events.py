"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..baseline import Baseline


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence worth reading once: what is trained, what was cut, where a run goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class WeightsRead:
    """So many bytes of the base's weights are read, of so many."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step.

    Attributes:
        step, steps: done, and in all.
        epoch: in epochs, as a fraction.
        loss: the batch's mean.
        accuracy: the share of the batch that was right; `None` in a regression.
        grad_norm: before clipping.
        tokens_per_second: tokens of the batches' own rows, over the last steps.
        seconds_left: at the pace of the last steps, evaluations not counted; `None` before there is a pace.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    accuracy: float | None
    grad_norm: float
    tokens_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A data set was scored.

    Attributes:
        split: `"dev"` or `"test"`.
        metrics: as `Task.measure` gives them.
        best: whether this is the best checkpoint so far; `None` for `test`.
        baseline: What one answer to all texts scores there; `None` of a language model.
    """

    step: int
    split: str
    metrics: dict[str, float | None]
    best: bool | None = None
    baseline: Baseline | None = None


Event = Note | WeightsRead | StepDone | Evaluated
Listener = Callable[[Event], None]
