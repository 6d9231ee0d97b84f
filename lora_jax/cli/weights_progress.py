"""A bar while weights are read or written: in a terminal, and only where that takes a while."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS = 0.5  # below that a bar would only flicker


class WeightsProgress:
    """A `lora_jax.models.Progress` and a context manager.

    Args:
        console: Console to draw on; standard error by default, so that results can be piped on.
        delay: Seconds before a bar appears.
    """

    def __init__(self, console: Console | None = None, *, delay: float = _SECONDS) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("weights", start=False)
        self._delay = delay
        self._began = 0.0

    def __enter__(self) -> WeightsProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, done: int, total: int) -> None:
        if not self._console.is_terminal:
            return
        if done == 0:  # reading, and then writing
            self._began = time.monotonic()
            self._bar.reset(self._task)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._stop()
        elif time.monotonic() - self._began >= self._delay:
            self._bar.start()

    def _stop(self) -> None:
        if self._bar.live.is_started:  # otherwise it would end a line that it hasn't begun
            self._bar.stop()
