"""`compare`: trains the runs of a grid one by one and saves each result before the next begins."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, cast

import jax

from lora_jax import files
from lora_jax.training.config import TrainConfig
from lora_jax.training.errors import CheckpointError, DataError, RunFolderError
from lora_jax.training.run import events as training_events
from lora_jax.training.run.loop import train
from lora_jax.training.run.progress import format_seconds
from lora_jax.training.run.result import RunResult

from ..grid.plan import PlannedRun, chosen_rate, count_left, next_run, predicted_seconds
from ..grid.result_row import ResultRow
from ..grid.settings import Comparison, Prepared, prepare_comparison, started
from ..grid.splits import data_warnings
from .costs import measure_costs
from .events import ComparisonEvent, ComparisonListener, RunFinished, RunStarted
from .programs import shared_programs
from .recommend import Recommendation, recommend
from .results import ResultsFile
from .summary import Summary, summarize

# Errors that say nothing about the candidate: the next run would meet them too.
_NOT_THE_CANDIDATES = (CheckpointError, DataError, RunFolderError, files.FileError, OSError)
_PACKAGES = ("lora_jax", "jax", "jaxlib", "optax", "flax", "numpy")


class Outcome(NamedTuple):
    """What a comparison found.

    Attributes:
        prepared: The checked settings.
        rows: Rows of `results.jsonl`, by the run's id.
        summaries: One summary per candidate, in the candidates' order.
        recommendation: The recommended method; `None` if no run has succeeded.
        left: Number of remaining runs.
    """

    prepared: Prepared
    rows: dict[str, ResultRow]
    summaries: list[Summary]
    recommendation: Recommendation | None
    left: int


def compare(
    settings: Comparison,
    *,
    on_progress: ComparisonListener | None = None,
    retry_failed: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Trains the remaining runs of a comparison and measures what its candidates cost.

    Every candidate runs at its default rate, then at its other rates, and then with the other seeds at the rate that
    was best on dev. Each run is written to `results.jsonl` before the next begins. If the comparison is interrupted,
    the same call resumes it; finished runs are not repeated.

    A run that fails (a loss that isn't finite, exhausted memory) is recorded with its error, and the next one begins.
    An error that says nothing about the candidate, such as a full disk, ends the comparison.

    Args:
        settings: Candidates, data and options.
        on_progress: Callback for every event.
        retry_failed: Whether failed runs are repeated.
        clock: Time in seconds, for `settings.minutes`.

    Returns:
        The results; `write_report` turns them into pages.

    Raises:
        ConfigError, DataError: The settings or the data are invalid; nothing was run.
        RunFolderError: `settings.output` holds something else.
    """

    def listen(event: ComparisonEvent) -> None:
        if on_progress is not None:
            on_progress(event)

    start = clock()
    prepared = prepare_comparison(settings)
    with started(prepared):
        return _compare(prepared, listen, retry_failed, start, clock)


def _compare(
    prepared: Prepared,
    listen: ComparisonListener,
    retry_failed: bool,
    start: float,
    clock: Callable[[], float],
) -> Outcome:
    settings = prepared.settings
    for note in data_warnings(prepared.splits):
        listen(training_events.Note(message=note))
    results = ResultsFile(prepared.folder / "results.jsonl")
    _require_same(prepared, results)
    if retry_failed and (count := results.forget_failures()):
        listen(training_events.Note(message=f"retrying {count} failed runs"))
    candidates, seeds = prepared.candidates, settings.seeds

    def fits(run: PlannedRun) -> bool:
        predicted = predicted_seconds(run, results.rows)
        return settings.minutes is None or clock() - start + (predicted or 0.0) <= 60 * settings.minutes

    with shared_programs(prepared.folder / "programs"):
        while (run := next_run(candidates, seeds, results.rows, fits)) is not None:
            done = _count_done(prepared, results)
            listen(
                RunStarted(
                    run=run,
                    number=done + 1,
                    total=done + count_left(candidates, seeds, results.rows),
                    seconds=predicted_seconds(run, results.rows),
                )
            )
            row = _execute(prepared, run, listen)
            results.append(row)
            _prune(prepared, results)
            listen(RunFinished(run=run, row=row, done=results.rows))
        left = count_left(candidates, seeds, results.rows)
        if left and settings.minutes is not None:
            spent = format_seconds(clock() - start)
            listen(training_events.Note(message=f"{left} runs remain, but none is predicted to fit ({spent} spent)"))
        costs = measure_costs(prepared, results.rows, listen)
    summaries = summarize(prepared, results.rows, costs)
    return Outcome(prepared, results.rows, summaries, recommend(summaries, prepared), left)


def _require_same(prepared: Prepared, results: ResultsFile) -> None:
    """Raises if a row was made with other data or another base."""
    expected = {"content": prepared.splits.fingerprints, "base": prepared.description["base"]}
    for row in results.rows.values():
        if different := [name for name, value in expected.items() if row.get(name, value) != value]:
            raise RunFolderError(
                f"{results.path}: the row {row['id']} belongs to another comparison: its `{different[0]}` differs. "
                "Remove this row, or choose another folder."
            )


def _execute(prepared: Prepared, run: PlannedRun, listen: ComparisonListener) -> ResultRow:
    """Trains a run, and returns its row, with the error if it failed."""
    config = prepared.run_config(run)
    start = time.perf_counter()
    result, error, trace = None, None, None
    try:
        result = train(config, on_progress=listen)
    except _NOT_THE_CANDIDATES:
        raise
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        trace = traceback.format_exc()
    timed = {"seconds": time.perf_counter() - start, "error": error, "traceback": trace}
    return cast(ResultRow, _describe(prepared, run, config) | _measured(result) | timed)


def _describe(prepared: Prepared, run: PlannedRun, config: TrainConfig) -> dict[str, object]:
    """The part of a row that is needed to repeat the run."""
    device = jax.devices()[0]
    return {
        "id": run.id,
        "candidate_id": run.candidate.id,
        "candidate": run.candidate.label,
        "method": run.candidate.method,
        "rate": run.rate,
        "seed": run.seed,
        "config": config.to_dict(),
        "content": prepared.splits.fingerprints,
        "base": prepared.description["base"],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": {"platform": device.platform, "kind": device.device_kind, "cores": _cores()},
        "metric": prepared.metric,
    }


def _cores() -> int | None:
    """The number of cores that this process may use, if the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _measured(result: RunResult | None) -> dict[str, object]:
    names = ("metrics", "chosen", "chosen_step", "steps", "trainable", "total", "percent", "adapter_bytes")
    names += ("train_seconds", "step_ms", "padding_share", "truncated", "resumed_from")
    row: dict[str, object] = {name: None if result is None else getattr(result, name) for name in names}
    baselines = {} if result is None else {split: held._asdict() for split, held in result.baselines.items()}
    return row | {"baselines": baselines}


def _prune(prepared: Prepared, results: ResultsFile) -> None:
    """Deletes the files of finished runs, apart from the adapters of the rates chosen so far."""
    for candidate in prepared.candidates:
        rate = chosen_rate(candidate, prepared.settings.seeds[0], results.rows)
        for row in results.rows.values():
            if row["candidate_id"] == candidate.id:
                folder = prepared.run_folder(PlannedRun(candidate, row["rate"], row["seed"]))
                keep = row["error"] is None and row["rate"] == rate
                shutil.rmtree(folder / "checkpoints" if keep else folder, ignore_errors=True)


def _count_done(prepared: Prepared, results: ResultsFile) -> int:
    ids = {candidate.id for candidate in prepared.candidates}
    return sum(row["candidate_id"] in ids for row in results.rows.values())
