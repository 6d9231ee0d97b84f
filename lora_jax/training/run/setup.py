"""From a config to everything that its steps need: sequences, batches, model, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.files import FileError
from lora_jax.masks import ParamCount
from lora_jax.models.model import Model, skeleton
from lora_jax.types import PyTree

from ..baseline import Baseline
from ..config import RunConfig, TrainConfig, resolve
from ..data.batching import Sequences, TrainingBatches
from ..data.buckets import choose_buckets
from ..data.labelled import LabelledData, LabelledSequences
from ..data.language import LanguageData
from ..data.run_data import RunData
from ..errors import ConfigError
from ..metrics import is_undefined
from ..task import Task, sorted_labels
from .events import Listener, Note, WeightsRead
from .inputs import RunInputs, run_inputs
from .schedule import adamw_by_label
from .step import ModelApply, TrainState

_DATA: dict[str, Callable[[RunConfig, dict[str, str]], RunData]] = {
    "classification": LabelledData,
    "regression": LabelledData,
    "causal-lm": LanguageData,
}


class Run(NamedTuple):
    """Everything that follows from a config; the same whenever the run is started or resumed.

    Attributes:
        config: Settled options.
        task: Task that is learnt.
        splits: Sequences of each split.
        metric: Metric on dev that the checkpoint is chosen by.
        new_head, prior, baselines: See `Data`.
        max_length: Maximum length of a sequence in tokens.
        buckets: Lengths that batches are padded to.
        batches: Training batches of all steps.
        apply: The model's function, adapted.
        state: State before the first step.
        frozen: Frozen part of `lj.partition`.
        counts: Parameter counts.
        tx: Optimizer.
        key: Random key of dropout, folded with the step.
        fingerprint: Hash of the training tokens.
        inputs: Hashes of everything that the result depends on.
    """

    config: RunConfig
    task: Task
    splits: Mapping[str, Sequences]
    metric: str
    new_head: bool
    prior: np.ndarray | None
    baselines: Mapping[str, Baseline]
    max_length: int
    buckets: tuple[int, ...]
    batches: TrainingBatches
    apply: ModelApply
    state: TrainState
    frozen: PyTree
    counts: ParamCount
    tx: optax.GradientTransformation
    key: jax.Array
    fingerprint: str
    inputs: RunInputs

    @property
    def steps(self) -> int:
        return self.batches.steps

    @property
    def numbers_labels_anew(self) -> bool:
        """Whether an earlier version, which sorted labels and kept any head of their number, would train another."""
        return self.new_head or self.task.labels != sorted_labels(self.task.labels)


def prepare_run(config: TrainConfig, listen: Listener) -> Run:
    """Reads the data, loads the base and attaches the method. Nothing is written."""
    config = resolve(config)
    data = _DATA[config.task](config, config.sources)
    task = data.task
    task.check_metric(config.metric)

    model = lj.models.load(
        config.base,
        task=task.kind,
        num_labels=task.num_labels,
        dtype=config.dtype,
        seed=config.seed,
        pooling=config.pooling,
        remat=config.remat,
        new_head=data.new_head,
        progress=lambda done, total: listen(WeightsRead(done=done, total=total)),
    )
    tokenizer = lj.models.load_tokenizer(config.base)
    max_length = min(config.max_length, model.config.max_length)
    splits = data.sequences(tokenizer, max_length)
    _check_token_types(splits, model, config.base)
    rows = splits["train"]
    metric = choose_metric(task, config.metric, splits["dev"].targets if "dev" in splits else None)
    steps = config.steps or config.epochs * math.ceil(rows.num_sequences / config.batch_size)
    buckets = choose_buckets(rows.lengths, count=config.buckets, max_length=max_length, steps=steps)
    batches = TrainingBatches(rows, buckets=buckets, batch_size=config.batch_size, seed=config.seed, steps=steps)

    attach_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = lj.attach(model.params, config.method, key=attach_key)
    labels = lj.label_params(params, config.method)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, config.method))
    counts = lj.count_params(params, labels)
    tx = adamw_by_label(config, labels, steps=steps)
    if config.metric is None and metric != task.metrics[0]:
        listen(Note(message=f"dev: {task.metrics[0]} is undefined, as all targets are equal; {metric} is used instead"))
    for note in _notes(config, data, splits, counts, buckets, max_length):
        listen(Note(message=note))
    return Run(
        config=config,
        task=task,
        splits=splits,
        metric=metric,
        new_head=data.new_head,
        prior=data.prior,
        baselines=data.baselines,
        max_length=max_length,
        buckets=buckets,
        batches=batches,
        apply=lj.adapt(_with_dropout_rate(config, model, task.num_labels)),
        state=TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32)),
        frozen=frozen,
        counts=counts,
        tx=tx,
        key=run_key,
        fingerprint=rows.fingerprint(),
        inputs=run_inputs(config, data),
    )


def choose_metric(task: Task, name: str | None, dev: np.ndarray | None) -> str:
    """The metric that the checkpoint is chosen by: `name`, or the task's first, or the loss where that is undefined.

    Args:
        task: Task with the metrics.
        name: Metric that was asked for; `None` for the default.
        dev: Targets of the dev set; `None` without one.

    Raises:
        ConfigError: `name` is undefined on dev, or no metric of the task.
    """
    metric = task.check_metric(name)
    if dev is None or not is_undefined(metric, dev):
        return metric
    if name is not None:
        raise ConfigError(
            f"`metric` {name} is undefined on `dev`, where all targets are equal: choose `loss`, or give dev data "
            "whose targets differ."
        )
    return "loss"


def _check_token_types(splits: Mapping[str, Sequences], model: Model, base: str) -> None:
    """A token type without an embedding would be looked up all the same, and give NaN."""
    known = getattr(model.config, "type_vocab_size", None)
    for own in splits.values():
        if known is not None and isinstance(own, LabelledSequences) and (most := int(own.encoded.types.max())) >= known:
            raise FileError(
                f"{base}: tokenizer.json gives the second text of a pair the token type {most}, and the model has "
                f"{known} types (`type_vocab_size` in config.json). Use the tokenizer that belongs to the model."
            )


def _notes(
    config: RunConfig,
    data: RunData,
    splits: Mapping[str, Sequences],
    counts: ParamCount,
    buckets: tuple[int, ...],
    max_length: int,
) -> list[str]:
    described = ", ".join(f"{split} {rows.describe()}" for split, rows in splits.items())
    notes = [
        f"rows: {described}; {data.describe()}; batches padded to {', '.join(map(str, buckets))} tokens",
        *data.notes(),
        f"trainable: {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.3g} %)",
    ]
    if max_length < config.max_length:
        notes.append(f"`max_length` {config.max_length} is more than the base's positions: {max_length} is used")
    for split, rows in splits.items():
        notes += rows.notes(split)
    return notes


def _with_dropout_rate(config: RunConfig, model: Model, num_labels: int | None) -> ModelApply:
    """The model's function with `config.dropout` in place of the base's own rates."""
    if config.dropout is None:
        return model.apply
    return skeleton(
        model.config.with_dropout(config.dropout),
        task=model.task,
        num_labels=num_labels or 1,
        pooling=model.pooling,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    ).apply
