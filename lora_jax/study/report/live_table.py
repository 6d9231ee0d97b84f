"""Shows a comparison in a terminal as a live table of its candidates; in a file or a pipe, one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from lora_jax.terminal import literal
from lora_jax.training.run.events import Note, StepDone
from lora_jax.training.run.progress import format_seconds, format_step

from ..grid.candidates import Candidate
from ..grid.plan import PlannedRun, chosen_rate
from ..grid.result_row import ResultRows, score
from ..runs.events import ComparisonEvent, RunFinished, RunStarted
from ..runs.quality import Quality


class LiveTable:
    """A callback for `compare(..., on_progress=...)` and a context manager.

    Args:
        seeds: Seeds of the comparison; rates are chosen with the first.
        console: Console to draw on; standard error by default, so that results can be piped.
    """

    def __init__(self, seeds: Sequence[int], console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._seeds = seeds
        self._candidates: dict[str, Candidate] = {}
        self._rows: ResultRows = {}
        self._line = ""
        self._in_a_run = False

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: ComparisonEvent) -> None:
        if isinstance(event, RunStarted):
            self._in_a_run = True
            self._candidates.setdefault(event.run.candidate.id, event.run.candidate)
            predicted = f", about {format_seconds(event.seconds)}" if event.seconds is not None else ""
            self._line = f"run {event.number} of {event.total}: {_name(event.run)}{predicted}"
        elif isinstance(event, RunFinished):
            self._in_a_run, self._line, self._rows = False, "", event.done
            self._tell(event)
        elif isinstance(event, StepDone):
            if self._console.is_terminal:
                steps = format_step(event, loss=event.loss, accuracy=None)
                self._live.update(self._drawn(steps))
            return
        elif isinstance(event, Note) and not self._in_a_run:  # notes of runs would repeat
            self._print(event.message)
        if self._console.is_terminal:
            self._live.update(self._drawn(""), refresh=True)

    def _tell(self, event: RunFinished) -> None:
        row = event.row
        if row["error"] is not None:
            self._print(f"{_name(event.run)}: FAILED: {row['error']}", style="red")
            return
        quality = Quality(row["metric"])
        scores = ", ".join(f"{split} {quality.text(score(row, split))}" for split in row["metrics"] or ())
        if beside := row.get("baselines"):
            answer = next(iter(beside.values()))["answer"]
            known = (f"{split} {quality.text(held['metrics'][quality.metric])}" for split, held in beside.items())
            scores += f" (always {answer}: {', '.join(known)})"
        self._print(f"{_name(event.run)}: {quality.name} {scores} in {format_seconds(row['seconds'])}")

    def _print(self, line: str, *, style: str = "") -> None:
        self._console.print(literal(line, style=style), soft_wrap=True)

    def _drawn(self, steps: str) -> Group:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method", overflow="fold")
        for column in ("rate", "dev", "test", "runs"):
            table.add_column(column, justify="right")
        for candidate in self._candidates.values():
            table.add_row(*map(literal, self._cells(candidate)))
        lines = [literal(line, style="cyan", overflow="ellipsis", no_wrap=True) for line in (self._line, steps) if line]
        return Group(table, *lines)

    def _cells(self, candidate: Candidate) -> tuple[str, ...]:
        own = [row for row in self._rows.values() if row["candidate_id"] == candidate.id]
        rate = chosen_rate(candidate, self._seeds[0], self._rows)
        chosen = [row for row in own if row["error"] is None and row["rate"] == rate]
        if not chosen:
            return candidate.label, "", "failed" if own else "", "", str(len(own))
        quality = Quality(chosen[0]["metric"])
        scores = [
            quality.spread([score(row, split) for row in chosen]) if split in (chosen[0]["metrics"] or ()) else ""
            for split in ("dev", "test")
        ]
        return candidate.label, f"{rate:g}", *scores, str(len(own))


def _name(run: PlannedRun) -> str:
    return f"{run.candidate.label}, rate {run.rate:g}, seed {run.seed}"
