"""A whole run: steps, evaluations, checkpoints, adapter. An interrupted run resumes where it stopped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import jax

import lora_jax as lj
from lora_jax.host_memory import memory_first
from lora_jax.types import PyTree

from ..config import TrainConfig, resolve
from ..data.batching import AnyBatch, padding_share
from ..errors import DamagedCheckpointError, NotFiniteError, RunFolderError
from ..metrics import better
from ..task_file import TaskFile, save_task_adapter
from .checkpoint import Checkpoint, Checkpoints, RunProgress
from .evaluate import make_forward, predict_outputs
from .events import Evaluated, Event, Listener, Note, StepDone
from .folder import RunFolder
from .meter import Meter
from .result import RunResult, read_result, write_result
from .setup import Run, prepare_run
from .step import Step, StepOutput, make_step
from .tensorboard import Scalars


def train(config: TrainConfig, *, on_progress: Listener | None = None) -> RunResult:
    """Fine-tunes a bundled model and saves the adapter.

    A run that was interrupted, even by a kill, resumes from its last intact checkpoint when `train` is called again
    with the same config, and ends with the same trainable leaves, bit for bit (on the same machine and JAX version).
    It resumes only with the data, the base and the tokenizer that it began with. A complete run isn't repeated; files
    that it has lost since are made anew.

    Args:
        config: Options of the run: what to train, on what, and where to save it.
        on_progress: Callback for every `Event`; `LiveProgress` draws them.

    Returns:
        Metrics, counts, times, and the adapter's folder.

    Raises:
        DataError: A data file can't be used.
        RunFolderError: `config.output` holds another run or other files, or is in use by another process; or what the
            run depends on has changed since it began.
        NotFiniteError: The loss or its gradient became NaN or infinite; the last good checkpoint is kept.
        CheckpointError, lora_jax.files.FileError: The disk is full; what was saved before is intact.

    Example:
        result = train(TrainConfig(train="train.tsv", dev="dev.tsv", output="out"))
        result.metrics["dev"]["accuracy"]
    """

    def listen(event: Event) -> None:
        if on_progress is not None:
            on_progress(event)

    settled = resolve(config)
    with RunFolder(settled) as folder:
        finished = read_result(folder, listen)
        if finished is not None and folder.has_its_sources():
            return _complete(finished, listen)
        run = prepare_run(settled, listen)
        changed = folder.require_inputs(run.inputs)
        if not folder.inputs.exists() and folder.checkpoints.exists() and run.numbers_labels_anew:
            raise RunFolderError(
                f"`output` {folder.path} holds a run of an earlier version, which had the labels in another order or "
                "kept another head. Choose another folder."
            )
        if finished is not None:  # the files have changed, but not their content
            return _complete(finished, listen)
        if changed:
            listen(
                Note(message=f"this run began with other versions, so the last bits may differ: {', '.join(changed)}")
            )
        folder.start()
        with Checkpoints(folder.checkpoints) as checkpoints:
            training = _Training(run, folder, checkpoints, listen)
            folder.keep_inputs(run.inputs)
            training.run_steps()
            return training.finish()


def _complete(result: RunResult, listen: Listener) -> RunResult:
    listen(Note(message=f"{result.output} holds this run, and it is complete: there is nothing left to do."))
    return result


def step_of(run: Run) -> Step:
    """The jitted step that `train` takes."""
    config = run.config
    return make_step(
        run.apply,
        run.task,
        run.tx,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        model_dropout=config.dropout != 0,
        compiler_options=memory_first(),
    )


class _Training:
    """A run under way: the state that changes from step to step, and what is done with it."""

    def __init__(self, run: Run, folder: RunFolder, checkpoints: Checkpoints, listen: Listener) -> None:
        self.run, self.config, self.folder, self.checkpoints, self.listen = run, run.config, folder, checkpoints, listen
        self.state, self.meter, self.position = run.state, Meter(), 0
        self.resumed_from: int | None = None
        for step in reversed(checkpoints.steps):
            try:
                self._restore(step)
            except DamagedCheckpointError as error:
                if step == checkpoints.steps[0]:
                    raise
                self.listen(
                    Note(message=f"an earlier checkpoint is used: that of step {step:,} is damaged, {error.reason}")
                )
                continue
            self.resumed_from = step
            break
        self.folder.rewind_log(self.position)
        self.forward = make_forward(run.apply, run.task)

    def _restore(self, step: int) -> None:
        checkpoint = self.checkpoints.restore(step, self.state)
        progress = checkpoint.progress
        position = _position(progress)
        if position != step:
            raise RunFolderError(
                f"The checkpoint of step {step} in {self.checkpoints.folder} was changed: its position in the data is "
                f"{position!r:.50}. Restore it, or choose another folder."
            )
        if progress["data"] != self.run.fingerprint:
            raise RunFolderError(
                f"`output` {self.folder.path} holds a run on other training data: {self.config.train} has changed "
                "since. Choose another folder."
            )
        self.state, self.meter, self.position = checkpoint.state, Meter(**progress["meter"]), step
        if step < self.run.steps:
            self.listen(Note(message=f"resuming from step {step:,} of {self.run.steps:,}"))

    def run_steps(self) -> None:
        run, config = self.run, self.config
        step = step_of(run)
        if self.position >= run.steps:
            return
        batches = run.batches.iterator(self.position)
        eval_every = config.eval_every or run.batches.steps_per_epoch
        pending: deque[_Pending] = deque()
        tensorboard = self.folder.tensorboard if config.tensorboard else None
        with Scalars(tensorboard, start=self.position) as self.scalars:
            self.meter.start()
            for number in range(self.position + 1, run.steps + 1):
                batch = self.meter.wait_for(batches)
                self.meter.dispatch(batch.inputs["input_ids"].shape)
                self.state, output = step(self.state, run.frozen, batch, run.key)
                pending.append(_Pending(number, batch, output))
                if number % eval_every and number < run.steps:
                    # Read the output before this one, so that the device works on the next step meanwhile.
                    if len(pending) > 1:
                        self._settle(pending.popleft())
                    continue
                while pending:
                    self._settle(pending.popleft())
                self.meter.stop()
                self._evaluate_and_save(number, batches.get_state())
                self.meter.start()
            self.meter.stop()

    def _settle(self, pending: _Pending) -> None:
        """Reads a step's output and reports it."""
        number, batch, output = pending
        loss, correct, count, norm = (float(value) for value in jax.device_get(output))
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                self._refuse(number, f"The {what} became {value}")
        slots = batch.inputs["input_ids"].size
        self.meter.count(tokens=batch.tokens, slots=slots, loss=loss, correct=correct, count=count)
        has_accuracy = self.run.task.has_accuracy
        self.listen(
            StepDone(
                step=number,
                steps=self.run.steps,
                epoch=number / self.run.batches.steps_per_epoch,
                loss=loss,
                accuracy=correct / count if has_accuracy else None,
                grad_norm=norm,
                tokens_per_second=self.meter.tokens_per_second,
                seconds_left=self.meter.seconds_left(self.run.steps - number),
            )
        )
        if number % self.config.log_every == 0 or number == self.run.steps:
            row = self.meter.take_means() | {"grad_norm": norm}
            if not has_accuracy:
                del row["accuracy"]
            if (speed := self.meter.tokens_per_second) is not None:
                row["tokens_per_second"] = speed
            self._log(number, "train", row)

    def _evaluate_and_save(self, number: int, iterator_state: dict[str, int]) -> None:
        metrics, score = None, None
        if "dev" in self.run.splits:
            metrics = self._evaluate(self.state.trainable, "dev")
            value = metrics[self.run.metric]
            assert value is not None  # `prepare_run` has chosen a metric that dev defines
            score = better(self.run.metric, value)
            if not math.isfinite(score):
                self._refuse(number, f"The dev set's {self.run.metric} became {score}")
            self._log(number, "dev", metrics)
        progress: RunProgress = {
            "iterator": iterator_state,
            "meter": self.meter.state(),
            "data": self.run.fingerprint,
            "dev": metrics,
        }
        self.checkpoints.save(Checkpoint(self.state, self.run.key, progress), score=score)
        if metrics is not None:
            best = self.checkpoints.best_step == number
            baseline = self.run.baselines.get("dev")
            self.listen(Evaluated(step=number, split="dev", metrics=metrics, best=best, baseline=baseline))

    def _evaluate(self, trainable: PyTree, split: str) -> dict[str, float | None]:
        run = self.run
        rows = run.splits[split]
        params = lj.combine(trainable, run.frozen)
        return run.task.measure(predict_outputs(self.forward, params, rows, buckets=run.buckets), rows.targets)

    def _log(self, number: int, split: str, values: Mapping[str, float | None]) -> None:
        self.folder.log({"step": number, "split": split, **values})
        self.scalars.write(split, values, number)

    def _refuse(self, number: int, what: str) -> None:
        last = self.checkpoints.last_step
        kept = f"the checkpoint of step {last:,} is kept" if last is not None else "there is no earlier checkpoint"
        raise NotFiniteError(
            f"{what} at step {number:,} of {self.run.steps:,}, and training stopped; {kept} in {self.folder.path}. "
            f"Start again in another folder with a lower `lr` than {self.config.lr} or a longer `warmup`.",
            step=number,
        )

    def finish(self) -> RunResult:
        """Saves the adapter of the chosen checkpoint, and scores it on the test set."""
        run, config, folder = self.run, self.config, self.folder
        best = self.checkpoints.best_step
        step = best if best is not None else self.checkpoints.last_step
        assert step is not None  # the last step saves
        chosen = self.checkpoints.restore(step, run.state)
        metrics: dict[str, dict[str, float | None]] = {}
        if chosen.progress["dev"] is not None:
            metrics["dev"] = chosen.progress["dev"]
        if "test" in run.splits:
            metrics["test"] = self._evaluate(chosen.state.trainable, "test")
            baseline = run.baselines.get("test")
            self.listen(Evaluated(step=step, split="test", metrics=metrics["test"], baseline=baseline))

        params, method = config.method.folded(lj.combine(chosen.state.trainable, run.frozen))
        save_task_adapter(
            folder.adapter,
            params,
            method,
            TaskFile(
                base=config.base,
                task=run.task,
                pooling=config.pooling,
                max_length=run.max_length,
                dtype=config.dtype,
                columns=config.columns,
                escape_special_tokens=config.escape_special_tokens,
                new_head=run.new_head,
                prior=() if run.prior is None else tuple(run.prior.tolist()),
            ),
        )
        result = RunResult(
            output=folder.path,
            adapter=folder.adapter,
            metrics=metrics,
            metric=run.metric,
            baselines={split: run.baselines[split] for split in metrics if split in run.baselines},
            chosen=f"best {run.metric} on dev" if best is not None else "last",
            chosen_step=step,
            steps=run.steps,
            labels=run.task.labels,
            trainable=run.counts.trainable,
            total=run.counts.total,
            percent=run.counts.percent,
            adapter_bytes=(folder.adapter / "adapter.safetensors").stat().st_size,
            train_seconds=self.meter.seconds,
            step_ms=self.meter.step_ms,
            waiting_share=self.meter.waiting_share,
            padding_share=padding_share(self.meter.tokens, self.meter.slots),
            truncated={split: rows.truncated for split, rows in run.splits.items()},
            dropped={split: rows.dropped for split, rows in run.splits.items()},
            resumed_from=self.resumed_from,
            history=folder.history(),
        )
        write_result(folder, result)
        return result


def _position(progress: RunProgress) -> int | None:
    try:
        return progress["iterator"]["next_index"]
    except (KeyError, TypeError):  # a checkpoint that was changed
        return None


class _Pending(NamedTuple):
    """A step that was dispatched and whose output isn't read yet."""

    number: int
    batch: AnyBatch
    output: StepOutput
