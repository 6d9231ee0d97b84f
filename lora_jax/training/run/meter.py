"""Timing and counts of a run under way."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypedDict

from ..data.batching import AnyBatch

_WINDOW = 20  # steps that pace and throughput are measured over


class MeterState(TypedDict):
    """Arguments of a meter that continues this one."""

    seconds: float
    waiting: float
    tokens: int
    slots: int
    window: list[float]


class Meter:
    """Time, tokens and means of a run.

    Args:
        seconds, waiting, tokens, slots: Counts of an earlier part of the run.
        window: Sums of losses, right answers and targets since the last row of the log.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        waiting: float = 0.0,
        tokens: int = 0,
        slots: int = 0,
        window: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        self.waiting = waiting
        self.tokens = tokens
        self.slots = slots
        self._seconds = seconds
        self._started: float | None = None
        self._last: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._step_times: list[float] = []
        self._seen_shapes: set[tuple[int, ...]] = set()
        self._compiled = False
        # Sums rather than a list, so that a resumed run adds up in the order of one that was never interrupted.
        self._window = tuple(window)

    @property
    def seconds(self) -> float:
        """Time between `start` and `stop`, summed."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def start(self) -> None:
        self._started = self._last = time.perf_counter()

    def stop(self) -> None:
        self._seconds, self._started, self._last = self.seconds, None, None

    def wait_for(self, batches: Iterator[AnyBatch]) -> AnyBatch:
        """The next batch; the time spent on waiting for it is time in which the device may be idle."""
        start = time.perf_counter()
        batch = next(batches)
        self.waiting += time.perf_counter() - start
        return batch

    def dispatch(self, shape: tuple[int, ...]) -> None:
        """Notes that a step is dispatched; one of a new shape compiles first and isn't timed as a step."""
        self._compiled |= shape not in self._seen_shapes
        self._seen_shapes.add(shape)

    def count(self, *, tokens: int, slots: int, loss: float, correct: float, count: float) -> None:
        """Counts a step that is done."""
        now = time.perf_counter()
        self.tokens += tokens
        self.slots += slots
        added = (loss * count, correct, count)
        self._window = tuple(total + value for total, value in zip(self._window, added, strict=True))
        if self._last is not None and not self._compiled:
            self._recent.append((now - self._last, tokens))
            self._step_times.append(now - self._last)
        self._last, self._compiled = now, False

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else None

    def seconds_left(self, steps: int) -> float | None:
        """Seconds that `steps` more steps take at the current pace; `None` before it is known."""
        return steps * sum(seconds for seconds, _ in self._recent) / len(self._recent) if self._recent else None

    @property
    def waiting_share(self) -> float:
        """Share of the run's time that the loop waited for batches."""
        return self.waiting / self.seconds if self.seconds else 0.0

    @property
    def step_ms(self) -> float | None:
        """Median time of the steps that compiled nothing."""
        return 1000 * statistics.median(self._step_times) if self._step_times else None

    def take_means(self) -> dict[str, float]:
        """Mean loss and accuracy over the targets since the last call."""
        loss, correct, count = self._window
        self._window = (0.0, 0.0, 0.0)
        return {"loss": loss / count, "accuracy": correct / count}

    def state(self) -> MeterState:
        """The counts so far, as arguments of a meter that continues."""
        return {
            "seconds": self.seconds,
            "waiting": self.waiting,
            "tokens": self.tokens,
            "slots": self.slots,
            "window": list(self._window),
        }
