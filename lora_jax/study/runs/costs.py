"""The costs of a candidate: memory of a training step, and latency of the trained model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import jax
import numpy as np

import lora_jax as lj
from lora_jax import files
from lora_jax.inference.classify import load_run_adapter
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.batching import AnyBatch, BatchPlan
from lora_jax.training.run.evaluate import Forward, make_forward
from lora_jax.training.run.events import Event, Listener, Note
from lora_jax.training.run.loop import step_of
from lora_jax.training.run.setup import prepare_run

from ..grid.plan import PlannedRun, chosen_rate
from ..grid.result_row import ResultRows
from ..grid.settings import Prepared

BATCHES = (1, 32)
_ROUNDS = 5
_WARM_UP, _CALLS = 1, 3


class Cost(TypedDict, total=False):
    """An entry of `costs.json`; see `measure_costs`."""

    run: str
    step_memory: int | None
    tokens: int
    latency_ms: dict[str, float]


Costs = dict[str, Cost]  # by the candidate's id


def measure_costs(prepared: Prepared, rows: ResultRows, listen: Listener) -> Costs:
    """Measures each candidate whose adapter was kept, and saves the costs in `costs.json`.

    - `step_memory`: Bytes that the compiled step needs for the longest batch, as the compiler reports them: arguments
      (with the frozen base), results and temporaries.
    - `latency_ms`: For each batch size, the median over rounds in which the candidates take turns, so that other load
      on the machine affects all alike. The adapter is merged first if possible; such candidates share one program.
    - `tokens`: Length that both are measured at, the longest that training batches are padded to.

    Costs are measured again only if the chosen runs have changed.
    """
    seed = prepared.settings.seeds[0]
    runs = {
        candidate.id: PlannedRun(candidate, rate, seed)
        for candidate in prepared.candidates
        if (rate := chosen_rate(candidate, seed, rows)) is not None
        and (prepared.folder / "runs" / PlannedRun(candidate, rate, seed).id / "adapter").is_dir()
    }
    path = prepared.folder / "costs.json"
    held = _read(path)
    names = {key: run.id for key, run in runs.items()}
    if {key: cost.get("run") for key, cost in held.items()} == names:
        return held
    listen(Note(message="measuring memory and latency of each candidate"))
    costs: Costs = {}
    if runs:
        batch = _longest_batch(prepared, runs)
        for key, run in runs.items():
            costs[key] = {
                "run": run.id,
                "step_memory": _step_memory(prepared.run_config(run), batch),
                "tokens": batch.inputs["input_ids"].shape[1],
            }
        for key, times in _latencies(prepared, runs, batch).items():
            costs[key]["latency_ms"] = {str(size): 1000 * statistics.median(taken) for size, taken in times.items()}
    files.write_json(path, files.with_checksum(costs))
    return costs


def _read(path: Path) -> Costs:
    """The saved costs; none if the file was changed, so that they are measured again."""
    try:
        held = files.read_json(path) if path.exists() else {}
        held = files.without_checksum(held, path) if isinstance(held, dict) else {}
    except files.FileError:
        return {}
    return held if all(isinstance(cost, dict) for cost in held.values()) else {}


def _longest_batch(prepared: Prepared, runs: Mapping[str, PlannedRun]) -> AnyBatch:
    """The batch that all candidates are measured with: the longest of the candidate with the most training rows."""
    run = max(runs.values(), key=lambda run: run.candidate.train_rows or math.inf)
    made = prepare_run(prepared.run_config(run), _unheard)
    train = made.splits["train"]
    size = prepared.config.batch_size
    longest = np.argsort(-train.lengths, kind="stable")[:size]
    return train.batch(BatchPlan(longest, made.buckets[-1]), size)


def _step_memory(config: TrainConfig, batch: AnyBatch) -> int | None:
    run = prepare_run(config, _unheard)
    step = cast(jax.stages.Wrapped, step_of(run))
    memory = step.lower(run.state, run.frozen, batch, run.key).compile().memory_analysis()
    if memory is None:  # the backend doesn't report it
        return None
    # Donated arrays are counted both as arguments and as results.
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _latencies(
    prepared: Prepared, runs: Mapping[str, PlannedRun], batch: AnyBatch
) -> dict[str, dict[int, list[float]]]:
    """Seconds per call. One candidate's parameters are held at a time, since they may be a whole model."""
    batches = {
        size: jax.device_put(jax.tree.map(lambda x, n=size: np.resize(x, (n, *x.shape[1:])), batch)) for size in BATCHES
    }
    times: dict[str, dict[int, list[float]]] = {key: {size: [] for size in BATCHES} for key in runs}
    forward: Forward | None = None
    for _ in range(_ROUNDS):
        for key, run in runs.items():
            loaded = load_run_adapter(prepared.run_folder(run))
            forward = forward or make_forward(lj.adapt(loaded.model.apply), prepared.splits.task)
            params = lj.merge_params(loaded.params)
            for size in BATCHES:
                times[key][size] += _seconds(forward, params, batches[size])
    return times


def _unheard(event: Event) -> None:
    """Ignores events that were already reported during training."""


def _seconds(forward: Forward, params: lj.types.Params, batch: AnyBatch) -> list[float]:
    taken = []
    for _ in range(_WARM_UP + _CALLS):
        start = time.perf_counter()
        jax.block_until_ready(forward(params, batch))
        taken.append(time.perf_counter() - start)
    return taken[_WARM_UP:]
