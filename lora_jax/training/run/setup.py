"""From a config to everything that its steps need: rows, batches, model, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.files import FileError
from lora_jax.models.model import Model, skeleton

from ..baseline import Baseline
from ..config import TrainConfig
from ..data.batching import Rows, TrainingBatches
from ..data.buckets import choose_buckets
from ..data.labelled import LabelledData, LabelledRows
from ..data.language import LanguageData
from ..data.splits import Data
from ..errors import ConfigError
from ..metrics import is_undefined
from ..task import Task, sorted_labels
from .events import Listener, Note, WeightsRead
from .inputs import RunInputs, run_inputs
from .schedule import make_optimizer
from .step import TrainState

if TYPE_CHECKING:
    pass


_DATA: dict[str, Callable[[TrainConfig, dict[str, str]], Data]] = {
    "classification": LabelledData,
    "regression": LabelledData,
    "causal-lm": LanguageData,
}


class Run(NamedTuple):
    """Everything that follows from a config, and is the same whenever its run is taken up.

    Attributes:
        task, splits, metric: what is learnt, from what, and what chooses the checkpoint.
        new_head, prior, baselines: see `Data`.
        max_length, buckets, batches: how texts become batches.
        apply: the model's, adapted.
        state: before the first step.
        frozen: the other part of `lj.partition`.
        counts: of `lj.count_params`.
        tx: the optimizer.
        key: folded with the step for dropout.
        fingerprint: of the training rows' tokens.
        inputs: what all of it was made of.
    """

    task: Task
    splits: Mapping[str, Rows]
    metric: str
    new_head: bool
    prior: np.ndarray | None
    baselines: Mapping[str, Baseline]
    max_length: int
    buckets: tuple[int, ...]
    batches: TrainingBatches
    apply: Any
    state: TrainState
    frozen: Any
    counts: Any
    tx: Any
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


def prepare(config: TrainConfig, listen: Listener) -> Run:
    """Reads the data, loads the base and attaches the method. Nothing is written."""
    sources = {"train": config.train, "dev": config.dev, "test": config.test}
    data = _DATA[config.task](config, {name: source for name, source in sources.items() if source is not None})
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
    assert config.max_length is not None  # resolved when the config was made
    max_length = min(config.max_length, model.config.max_length)
    splits = data.rows(tokenizer, max_length)
    _check_token_types(splits, model, config.base)
    rows = splits["train"]
    metric = choose_metric(task, config.metric, splits["dev"].targets if "dev" in splits else None)
    steps = config.steps or config.epochs * math.ceil(rows.rows / config.batch_size)
    buckets = choose_buckets(rows.lengths, count=config.buckets, max_length=max_length, steps=steps)
    batches = TrainingBatches(rows, buckets=buckets, batch_size=config.batch_size, seed=config.seed, steps=steps)

    attach_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = lj.attach(model.params, config.method, key=attach_key)
    labels = lj.label_params(params, config.method)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, config.method))
    counts = lj.count_params(params, labels)
    tx = make_optimizer(config, labels, steps=steps)
    if config.metric is None and metric != task.metrics[0]:
        listen(Note(message=f"dev: {task.metrics[0]} is undefined, as all rows have one target: {metric} chooses"))
    for note in _notes(config, data, splits, counts, buckets, max_length):
        listen(Note(message=note))
    return Run(
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


def choose_metric(task: Task, name: str | None, dev: Any) -> str:
    """What dev chooses the checkpoint by: `name`, or the task's first metric, or the loss where that is undefined.

    Raises:
        ConfigError: `name` is undefined on dev, or no metric of the task.
    """
    metric = task.check_metric(name)
    if dev is None or not is_undefined(metric, dev):
        return metric
    if name is not None:
        raise ConfigError(
            f"`metric` is {name!r}, which is undefined on `dev`: all its rows have one target. Choose `loss`, or give "
            "dev rows that differ."
        )
    return "loss"


def _check_token_types(splits: Mapping[str, Rows], model: Model, base: str) -> None:
    """A type that the embeddings have no row for would be looked up all the same, and make NaN of the text."""
    known = getattr(model.config, "type_vocab_size", None)
    for rows in splits.values():
        if known is not None and isinstance(rows, LabelledRows) and (most := int(rows.encoded.types.max())) >= known:
            raise FileError(
                f"{base}: tokenizer.json gives the second text of a pair the type {most}, and the model has {known} "
                f"(`type_vocab_size` in config.json). Take the tokenizer that belongs to the model."
            )


def _notes(
    config: TrainConfig,
    data: Data,
    splits: Mapping[str, Rows],
    counts: Any,
    buckets: tuple[int, ...],
    max_length: int,
) -> list[str]:
    described = ", ".join(f"{split} {rows.describe()}" for split, rows in splits.items())
    notes = [
        f"rows: {described}; {data.describe()}; batches padded to {', '.join(map(str, buckets))} tokens",
        *data.notes(),
        f"trainable: {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.3g} %)",
    ]
    if max_length < (config.max_length or 0):
        notes.append(f"`max_length` {config.max_length} is more than the base's positions: {max_length} are used")
    for split, rows in splits.items():
        notes += rows.notes(split)
    return notes


def _with_dropout_rate(config: TrainConfig, model: Model, num_labels: int | None) -> Any:
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
