"""From a config to everything that its steps need: rows, batches, model, optimizer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.models.model import Model, skeleton

from .batching import TrainingBatches
from .buckets import choose_buckets
from .config import TrainConfig
from .data import Examples, read_examples
from .encoding import Encoded
from .events import Listener, Note, WeightsRead
from .metrics import check_metric, default_metric
from .optimizer import make_optimizer
from .predict import padding_id
from .step import TrainState
from .task import Task, make_task
from .token_cache import encode_cached

_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


class Labelled(NamedTuple):
    """A split, ready for batching."""

    encoded: Encoded
    targets: np.ndarray


class Run(NamedTuple):
    """Everything that follows from a config, and is the same whenever its run is taken up.

    Attributes:
        task, splits, metric: what is learnt, from what, and what chooses the checkpoint.
        max_length, pad_id, buckets, batches: how texts become batches.
        apply: the model's, adapted.
        state: before the first step.
        frozen: the other part of `lj.partition`.
        counts: of `lj.count_params`.
        tx: the optimizer.
        key: folded with the step for dropout.
        fingerprint: of the training rows.
    """

    task: Task
    splits: dict[str, Labelled]
    metric: str
    max_length: int
    pad_id: int
    buckets: tuple[int, ...]
    batches: TrainingBatches
    apply: Any
    state: TrainState
    frozen: Any
    counts: Any
    tx: Any
    key: jax.Array
    fingerprint: str

    @property
    def steps(self) -> int:
        return self.batches.steps


def prepare(config: TrainConfig, listen: Listener) -> Run:
    """Reads the data, loads the base and attaches the method. Nothing is written."""
    sources = {"train": config.train, "dev": config.dev, "test": config.test}
    examples = {split: _read(config, source, split) for split, source in sources.items() if source is not None}
    task = make_task(config.task, examples["train"])
    targets = {split: task.encode(rows) for split, rows in examples.items()}
    metric = check_metric(config.metric or default_metric(task), task)

    model = lj.models.load(
        config.base,
        task=task.kind,
        num_labels=task.num_labels,
        dtype=config.dtype,
        seed=config.seed,
        pooling=config.pooling,
        remat=config.remat,
        progress=lambda done, total: listen(WeightsRead(done=done, total=total)),
    )
    tokenizer = lj.models.load_tokenizer(config.base)
    max_length = min(config.max_length, model.config.max_length)
    splits = {
        split: Labelled(encode_cached(rows, tokenizer, max_length), targets[split]) for split, rows in examples.items()
    }
    encoded = splits["train"].encoded
    steps = config.steps or config.epochs * math.ceil(encoded.rows / config.batch_size)
    buckets = choose_buckets(encoded.lengths, count=config.buckets, max_length=max_length, steps=steps)
    batches = TrainingBatches(
        *splits["train"],
        buckets=buckets,
        batch_size=config.batch_size,
        pad_id=padding_id(tokenizer),
        seed=config.seed,
        steps=steps,
    )

    attach_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = lj.attach(model.params, config.method, key=attach_key)
    labels = lj.label_params(params, config.method)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, config.method))
    counts = lj.count_params(params, labels)
    tx = make_optimizer(config, labels, steps=steps)
    for note in _notes(config, task, splits, counts, buckets, max_length):
        listen(Note(message=note))
    return Run(
        task=task,
        splits=splits,
        metric=metric,
        max_length=max_length,
        pad_id=padding_id(tokenizer),
        buckets=buckets,
        batches=batches,
        apply=lj.adapt(_with_dropout_rate(config, model, task.num_labels)),
        state=TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32)),
        frozen=frozen,
        counts=counts,
        tx=tx,
        key=run_key,
        fingerprint=encoded.fingerprint(),
    )


def _read(config: TrainConfig, source: str, split: str) -> Examples:
    return read_examples(
        source, text=config.text, text_pair=config.text_pair, label=config.label, split=_HUB_SPLITS[split]
    )


def _notes(
    config: TrainConfig,
    task: Task,
    splits: dict[str, Labelled],
    counts: Any,
    buckets: tuple[int, ...],
    max_length: int,
) -> list[str]:
    rows = ", ".join(f"{split} {labelled.encoded.rows:,}" for split, labelled in splits.items())
    kind = "a number" if task.is_regression else f"{len(task.labels)} labels"
    notes = [
        f"rows: {rows}; {kind}; batches padded to {', '.join(map(str, buckets))} tokens",
        f"trainable: {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.3g} %)",
    ]
    if max_length < config.max_length:
        notes.append(f"`max_length` {config.max_length} is more than the base's positions: {max_length} are used")
    for split, (encoded, _) in splits.items():
        if encoded.truncated:
            notes.append(f"{split}: {encoded.truncated:,} of {encoded.rows:,} texts cut at {max_length} tokens")
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
