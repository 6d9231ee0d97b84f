"""Best and last checkpoints of a run, through Orbax: trainable leaves and what resuming needs, never the base.

A checkpoint is written under a temporary name and renamed when it is complete, so a kill or a full disk leaves the
earlier ones as they were. One that was damaged later is detected by its checksums, and there is another to resume from.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_jax import files
from lora_jax.errors import ArgumentError
from lora_jax.masters import Masters
from lora_jax.text import error_line
from lora_jax.types import PyTree

from ..errors import CheckpointError, DamagedCheckpointError, NotFiniteError
from .meter import MeterState
from .step import TrainState

# After a failed save: how often what is left is looked for, how many looks in a row must find nothing, seconds between.
_LOOKS, _CLEAN, _PAUSE = 60, 4, 0.05

# Arrays by name in a plain nested dictionary, which any Orbax can read.
Arrays = dict[str, Any]


class RunProgress(TypedDict):
    """The progress of a run in plain values.

    Attributes:
        iterator: Position in the data.
        meter: Counts and times so far.
        data: Hash of the training tokens.
        dev: Metrics on dev; `None` without it.
    """

    iterator: dict[str, int]
    meter: MeterState
    data: str
    dev: dict[str, float | None] | None


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        state: Trainable leaves, optimizer state and step.
        key: Random key of the run.
        progress: Progress of the run in plain values.
    """

    state: TrainState
    key: jax.Array
    progress: RunProgress


class Checkpoints:
    """The checkpoints in a folder: the last and the best by `score`; where these are one, the one before it too.

    Args:
        folder: Folder of the checkpoints, made if it doesn't exist. Unfinished checkpoints in it are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._link = contextlib.ExitStack()
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            preservation_policy=_BestAndLast(),
            best_fn=lambda metrics: metrics["score"],  # without one Orbax doesn't keep the metrics
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if odd := next((path for path in self.folder.rglob("*") if not path.is_file() and not path.is_dir()), None):
                raise ArgumentError(f"{odd} is neither a file nor a folder. Remove it.")  # Orbax would wait for a pipe
            plain = self._link.enter_context(files.plainly_named(self.folder))
            self._manager = ocp.CheckpointManager(plain, options=options)
        except (OSError, ValueError) as error:
            self._link.close()
            raise CheckpointError(f"The checkpoints in {folder} can't be opened: {error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()
        self._link.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def last_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step with the largest score, the later of equals; `None` if none has a score."""
        scores = {step: self._score(step) for step in self._manager.all_steps()}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        return max(scored)[1] if scored else None

    def save(self, checkpoint: Checkpoint, *, score: float | None) -> None:
        """Writes a checkpoint, in place of one of the same step, then deletes those that are no longer needed.

        Args:
            checkpoint: Content of the checkpoint.
            score: Score, the larger the better; `None` if nothing was evaluated.

        Raises:
            NotFiniteError: A trainable leaf holds NaN or infinity; nothing is written.
            CheckpointError: The disk is full, or writing failed otherwise. The earlier checkpoints are intact.
        """
        arrays = jax.device_get(_arrays(checkpoint.state) | {"key": jax.random.key_data(checkpoint.key)})
        step = int(checkpoint.state.step)
        for name, value in arrays["trainable"].items():
            if not np.isfinite(value).all():
                raise NotFiniteError(f"{name} isn't finite at step {step}: no checkpoint is written.", step=step)
        sealed = files.with_checksum(
            {"progress": checkpoint.progress, "score": score, "arrays": files.array_checksum(_flat(arrays))}
        )
        try:
            if step in self.steps:
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(sealed)),
                metrics=None if score is None else {"score": score},
                force=True,
            )
        except Exception as error:  # tensorstore's and Orbax's own kinds, for a full disk too
            self._remove_unfinished()
            earlier = self.last_step
            kept = f"That of step {earlier} is intact" if earlier is not None else "There is no earlier checkpoint"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk (or the quota) is full" if full or "space" in str(error).lower() else error_line(error)
            raise CheckpointError(
                f"The checkpoint of step {step} can't be written to {self.folder}: {reason}. {kept}; free some space "
                "and start the run again."
            ) from error

    def restore(self, step: int, template: TrainState) -> Checkpoint:
        """Reads a checkpoint into the structure, shapes and dtypes of `template`.

        Raises:
            DamagedCheckpointError: The checkpoint can't be read, or isn't as it was written.
            CheckpointError: The checkpoint belongs to another run.
        """
        expected = _arrays(template) | {"key": jax.random.key_data(jax.random.key(0))}
        abstract = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected)
        try:
            loaded = self._manager.restore(
                step,
                args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
        except Exception as error:
            if isinstance(template.optimizer, Masters) and not self._has_masters(step):
                raise CheckpointError(
                    f"The checkpoint of step {step} in {self.folder} is of an earlier lora_jax, which trained leaves "
                    "of fewer bits than float32 without float32 copies, and so lost small updates. Choose another "
                    "`output`."
                ) from error
            raise self._damaged(step, error_line(error)) from error
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), abstract)
        if jax.tree.map(lambda x: (x.shape, str(x.dtype)), loaded["arrays"]) != shapes:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} belongs to another model or method: its leaves have "
                "other shapes. Choose another `output`."
            )
        if int(loaded["arrays"]["step"]) != step:
            raise self._damaged(step, f"it is of step {int(loaded['arrays']['step'])}")
        progress = self._opened(step, loaded["progress"])
        if progress["arrays"] not in (None, files.array_checksum(_flat(loaded["arrays"]))):
            raise self._damaged(step, "its arrays aren't those that were written")
        arrays = jax.tree.map(jax.numpy.asarray, loaded["arrays"])
        key = jax.random.wrap_key_data(arrays["key"])
        return Checkpoint(_state(arrays, template), key, progress["progress"])

    def _opened(self, step: int, content: Any) -> dict[str, Any]:
        """What is stored beside the arrays, where an earlier version stored only the progress."""
        if not isinstance(content, dict):
            raise self._damaged(step, "its progress is no JSON object")
        try:
            content = files.without_checksum(content, "its progress")
        except files.FileError as error:
            raise self._damaged(step, error_line(error)) from None
        return content if {"progress", "arrays"} <= content.keys() else {"progress": content, "arrays": None}

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        others = [other for other in self.steps if other != step]
        way = f"resume from that of step {others[-1]}" if others else "start again"
        return DamagedCheckpointError(
            f"The checkpoint of step {step} in {self.folder} can't be read: {reason}. Delete its folder step_{step} to "
            f"{way}, or choose another `output`.",
            reason=reason,
        )

    def _has_masters(self, step: int) -> bool:
        try:
            return "copies" in (self.folder / f"step_{step}" / "arrays" / "_METADATA").read_text(errors="replace")
        except OSError:
            return True  # damaged in another way

    def _score(self, step: int) -> float | None:
        """The score under the checksum, or what Orbax stores beside the checkpoint where there is none."""
        with contextlib.suppress(Exception):  # a damaged checkpoint is refused when it is restored
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())
            content = self._opened(step, self._manager.restore(step, args=args)["progress"])
            if "score" in content:
                return content["score"]
        metrics = self._manager.metrics(step)
        if metrics and not isinstance(metrics.get("score"), int | float):
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} has no score in its metrics: delete its folder to "
                "resume from the other one."
            )
        return metrics["score"] if metrics else None

    def _remove_unfinished(self) -> None:
        """Removes what a failed save leaves, until it stays away: Orbax's other threads may still be writing."""
        clean = 0
        for _ in range(_LOOKS):
            left = list(self.folder.glob("*.orbax-checkpoint-tmp*"))
            for path in left:
                with contextlib.suppress(OSError):
                    shutil.rmtree(path)
            clean = 0 if left else clean + 1
            if clean == _CLEAN:
                return
            time.sleep(_PAUSE)


class _BestAndLast:
    """Orbax's policy of which checkpoints to keep, at least two; they are given in the order of their steps."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        scores = [info.metrics["score"] if info.metrics else None for info in checkpoints]
        scored = [(score, place) for place, score in enumerate(scores) if score is not None]
        kept = {len(checkpoints) - 1, *([max(scored)[1]] if scored else [])}
        if len(kept) < 2:
            kept.add(len(checkpoints) - 2)
        return [place in kept for place in range(len(checkpoints))]


def _arrays(state: TrainState) -> Arrays:
    """The leaves by name, without our node types and `None`s."""
    return {
        "trainable": _by_name(state.trainable),
        "optimizer": _by_name(state.optimizer),
        "step": state.step,
    }


def _flat(arrays: Arrays) -> dict[str, np.ndarray]:
    return {
        f"{group}{name}": np.asarray(value) for group, tree in arrays.items() for name, value in _by_name(tree).items()
    }


def _by_name(tree: PyTree) -> Arrays:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _state(arrays: Arrays, template: TrainState) -> TrainState:
    def filled(tree: PyTree, by_name: Arrays) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(tree), [by_name[name] for name in _by_name(tree)])

    return TrainState(
        filled(template.trainable, arrays["trainable"]),
        filled(template.optimizer, arrays["optimizer"]),
        arrays["step"],
    )
