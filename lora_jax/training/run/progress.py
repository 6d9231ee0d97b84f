"""Progress of a run: one live line in a terminal; in a file or a pipe, a plain line every few seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live

from lora_jax.terminal import literal

from ..baseline import Baseline
from .events import Evaluated, Event, Note, StepDone

_PLAIN_SECONDS = 10.0
_WINDOW = 20  # steps that the shown loss and accuracy are averaged over
_RATES = ("accuracy", "token_accuracy", "macro_f1", "matthews", "pearson", "spearman")


class LiveProgress:
    """A callback for `train(config, on_progress=...)` and a context manager.

    Args:
        console: Console to draw on; standard error by default, so that results can be piped.
        reword: Function that every remark passes through; a command puts its flags for the names of arguments.
    """

    def __init__(self, console: Console | None = None, *, reword: Callable[[str], str] = str) -> None:
        self._reword = reword
        self._console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._accuracies: deque[float] = deque(maxlen=_WINDOW)
        self._last_plain = -_PLAIN_SECONDS

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, Evaluated):
            mark = "  (best so far)" if event.best else ""
            beside = f"  ({format_baseline(event.baseline)})" if event.baseline is not None else ""
            self._print(f"step {event.step:,}  {event.split}: {format_metrics(event.metrics)}{beside}{mark}")
        elif isinstance(event, Note):
            self._print(self._reword(event.message))
        elif event.done and self._console.is_terminal:
            line = f"weights  {format_bytes(event.done)} of {format_bytes(event.total)}"
            self._live.update(literal(line if event.done < event.total else "", style="cyan"))

    def _show_step(self, event: StepDone) -> None:
        self._losses.append(event.loss)
        if event.accuracy is not None:
            self._accuracies.append(event.accuracy)
        line = format_step(event, loss=_mean(self._losses), accuracy=_mean(self._accuracies))
        if self._console.is_terminal:
            self._live.update(literal(line, style="cyan", overflow="ellipsis", no_wrap=True))
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS or event.step == event.steps:
            self._last_plain = time.monotonic()
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(literal(line), soft_wrap=True)


def format_step(event: StepDone, *, loss: float | None, accuracy: float | None) -> str:
    """Formats a step as one line.

    Example:
        >>> event = StepDone(step=5, steps=80, epoch=0.25, loss=1.5, accuracy=0.5, grad_norm=2.0,
        ...                  tokens_per_second=1234.5, seconds_left=75.0)
        >>> format_step(event, loss=1.5, accuracy=0.5)
        'step 5/80  loss 1.500  accuracy 50.0 %  1,234 tokens/s  1:15 left'
    """
    parts = [f"step {event.step:,}/{event.steps:,}"]
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if accuracy is not None:
        parts.append(f"accuracy {100 * accuracy:.1f} %")
    if event.tokens_per_second is not None:
        parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
    if event.seconds_left is not None:
        parts.append(f"{format_seconds(event.seconds_left)} left")
    return "  ".join(parts)


def format_metrics(metrics: Mapping[str, float | None]) -> str:
    """Formats metrics: rates in percent, losses as numbers, `None` as undefined.

    Example:
        >>> format_metrics({"accuracy": 0.9, "loss": 0.25})
        'accuracy 90.0 %  loss 0.250'
    """
    return "  ".join(f"{name.replace('_', '-')} {_format_value(name, value)}" for name, value in metrics.items())


def _format_value(metric: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{100 * value:.1f} %" if metric in _RATES else f"{value:.3f}"


def format_baseline(baseline: Baseline, *, metric: str | None = None) -> str:
    """Formats the score of one answer to all texts, in one metric, by default the task's first.

    Example:
        >>> format_baseline(Baseline("'no'", {"accuracy": 0.9, "loss": 0.25}))
        "always 'no': accuracy 90.0 %"
    """
    metric = metric or next(iter(baseline.metrics))
    return f"always {baseline.answer}: {format_metrics({metric: baseline.metrics[metric]})}"


def verdict(baseline: Baseline, metric: str, value: float | None) -> str | None:
    """A warning that a score is no better than one answer to all texts; `None` where it is better.

    Example:
        >>> verdict(Baseline("'no'", {"accuracy": 0.9}), "accuracy", 0.8)
        "no better than always answering 'no': accuracy 80.0 % against 90.0 %"
        >>> verdict(Baseline("'no'", {"accuracy": 0.9}), "accuracy", 0.9)
        "no better than always answering 'no': tied at accuracy 90.0 %"
    """
    if baseline.is_beaten(metric, value):
        return None
    said = f"{metric.replace('_', '-')} undefined" if value is None else format_metrics({metric: value})
    tied = baseline.is_tied(metric, value)
    said = f"tied at {said}" if tied else f"{said} against {_format_value(metric, baseline.metrics[metric])}"
    return f"no better than always answering {baseline.answer}: {said}"


def format_seconds(seconds: float) -> str:
    """Formats a duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(count: float) -> str:
    """Formats a size in decimal units.

    Example:
        >>> format_bytes(1_336_344)
        '1.34 MB'
    """
    if count < 1000:
        return f"{count:,.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.3g} GB"


def _mean(values: deque[float]) -> float | None:
    return sum(values) / len(values) if values else None
