"""Best and last checkpoints of a run, through Orbax: trainable leaves and what training needs to go on, never the base.

A checkpoint is written under a temporary name and renamed when it is whole, so a process that is killed, or a disk
that is full, leaves the earlier ones as they were. One that was damaged since is told by its checksums, and there is
another to go on from.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_jax import files
from lora_jax.errors import ArgumentError
from lora_jax.masters import Masters

from ..errors import CheckpointError, DamagedCheckpointError, NotFiniteError
from .step import TrainState


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: trainable leaves, optimizer state and step.
        key: the run's random key.
        progress: plain values: the data's position, the best metric so far, tokens seen, …
    """

    state: TrainState
    key: jax.Array
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder: the last, and the best by `score`; where that is one, the one before too.

    Args:
        folder: made if it doesn't exist. Unfinished checkpoints in it are removed.
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
        """Of the checkpoints there are, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def last_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the largest score, the later of equals; `None` where none has a score."""
        scores = {step: self._score(step) for step in self._manager.all_steps()}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        return max(scored)[1] if scored else None

    def save(self, checkpoint: Checkpoint, *, score: float | None) -> None:
        """Writes a checkpoint, then deletes those that are not kept. One of this step, if there is any, is replaced.

        Args:
            checkpoint: what to write.
            score: larger is better; `None` where nothing was evaluated.

        Raises:
            NotFiniteError: a trainable leaf holds NaN or infinity; nothing is written.
            CheckpointError: a full disk, or another failure to write. The earlier checkpoints are whole.
        """
        arrays = jax.device_get(_arrays(checkpoint.state) | {"key": jax.random.key_data(checkpoint.key)})
        step = int(checkpoint.state.step)
        for name, value in arrays["trainable"].items():
            if not np.isfinite(value).all():
                raise NotFiniteError(f"{name} isn't finite at step {step}: no checkpoint of it is kept.", step=step)
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
            kept = f"the one of step {earlier} is whole" if earlier is not None else "there is no earlier one"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk (or the quota) is full" if full or "space" in str(error).lower() else _short(error)
            raise CheckpointError(
                f"The checkpoint of step {step} can't be written to {self.folder}: {reason}. Of the checkpoints, "
                f"{kept}; free some space and start the same command again."
            ) from error

    def restore(self, step: int, template: TrainState) -> Checkpoint:
        """Reads a checkpoint back, onto the shapes and dtypes of `template`.

        Raises:
            DamagedCheckpointError: the checkpoint can't be read, or isn't as it was written.
            CheckpointError: the checkpoint is of another run.
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
                    "`--output`."
                ) from error
            raise self._damaged(step, _short(error)) from error
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), abstract)
        if jax.tree.map(lambda x: (x.shape, str(x.dtype)), loaded["arrays"]) != shapes:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} is of another model or method: its leaves have other "
                "shapes. Choose another `--output`."
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
        """What is kept beside the arrays; an earlier version kept the progress alone."""
        if not isinstance(content, dict):
            raise self._damaged(step, "its progress is no JSON object")
        try:
            content = files.without_checksum(content, "its progress")
        except files.FileError as error:
            raise self._damaged(step, _short(error)) from None
        return content if {"progress", "arrays"} <= content.keys() else {"progress": content, "arrays": None}

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        others = [other for other in self.steps if other != step]
        way = f"go on from that of step {others[-1]}" if others else "begin anew"
        return DamagedCheckpointError(
            f"The checkpoint of step {step} in {self.folder} can't be read: {reason}. Delete its folder step_{step} to "
            f"{way}, or choose another `--output`.",
            reason=reason,
        )

    def _has_masters(self, step: int) -> bool:
        try:
            return "copies" in (self.folder / f"step_{step}" / "arrays" / "_METADATA").read_text(errors="replace")
        except OSError:
            return True  # damaged in another way

    def _score(self, step: int) -> float | None:
        """As it is kept under a checksum; what Orbax keeps beside it, where there is none."""
        with contextlib.suppress(Exception):  # what is damaged is refused when it is restored
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())
            content = self._opened(step, self._manager.restore(step, args=args)["progress"])
            if "score" in content:
                return content["score"]
        metrics = self._manager.metrics(step)
        if metrics and not isinstance(metrics.get("score"), int | float):
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} has no score in its `metrics`: delete its folder to "
                "go on from the other one."
            )
        return metrics["score"] if metrics else None

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


class _BestAndLast:
    """Orbax asks this which checkpoints to keep, two at least; they come in the order of their steps."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = [info.metrics["score"] if info.metrics else None for info in checkpoints]
        scored = [(score, place) for place, score in enumerate(scores) if score is not None]
        kept = {len(checkpoints) - 1, *([max(scored)[1]] if scored else [])}
        if len(kept) < 2:
            kept.add(len(checkpoints) - 2)
        return [place in kept for place in range(len(checkpoints))]


def _arrays(state: TrainState) -> dict[str, Any]:
    """The leaves by name: a plain nested dictionary that any Orbax can read, without our node types or `None`s."""
    return {
        "trainable": _by_name(state.trainable),
        "optimizer": _by_name(state.optimizer),
        "step": state.step,
    }


def _flat(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        f"{group}{name}": np.asarray(value) for group, tree in arrays.items() for name, value in _by_name(tree).items()
    }


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _state(arrays: Mapping[str, Any], template: TrainState) -> TrainState:
    def filled(tree: Any, by_name: Mapping[str, Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), [by_name[name] for name in _by_name(tree)])

    return TrainState(
        filled(template.trainable, arrays["trainable"]),
        filled(template.optimizer, arrays["optimizer"]),
        arrays["step"],
    )


def _short(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " …"
