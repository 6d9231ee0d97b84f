"""Events of a run, which its callback receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..baseline import Baseline


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark worth reading once: what is trained, what was cut, where a run resumes."""

    message: str


@dataclass(frozen=True, kw_only=True)
class WeightsRead:
    """Bytes of the base's weights that have been read, and their total."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step.

    Attributes:
        step, steps: Steps done, and their total.
        epoch: Epochs done, as a fraction.
        loss: Mean loss of the batch.
        accuracy: Share of the batch's targets that were predicted right; `None` in a regression.
        grad_norm: Global norm of the gradient before clipping.
        tokens_per_second: Tokens per second over the last steps, without padding; `None` before it is known.
        seconds_left: Seconds left at the pace of the last steps, without evaluations; `None` before it is known.
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
    """A split was scored.

    Attributes:
        step: Step of the checkpoint.
        split: `"dev"` or `"test"`.
        metrics: Metrics, see `Task.measure`.
        best: Whether this is the best checkpoint so far; `None` for `test`.
        baseline: Scores of one answer to all texts; `None` for a language model.
    """

    step: int
    split: str
    metrics: dict[str, float | None]
    best: bool | None = None
    baseline: Baseline | None = None


Event = Note | WeightsRead | StepDone | Evaluated
Listener = Callable[[Event], None]
