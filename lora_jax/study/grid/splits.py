"""The data of a comparison: training slices and a dev split, drawn by seed and written so that runs can be repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import lora_jax as lj
from lora_jax import files
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.base_head import choose_head
from lora_jax.training.data.label_names import WARNING
from lora_jax.training.data.labelled import read_splits, target_notes
from lora_jax.training.errors import ConfigError
from lora_jax.training.examples import Examples
from lora_jax.training.task import LabelledTask, Regression


class Splits(NamedTuple):
    """The data that a comparison learns from and is measured on.

    Attributes:
        task: The task that the training examples define.
        examples: Examples of each split; there is always a `"dev"`.
        sources: Sources of the splits that weren't drawn here.
        held_out: Share of the training examples that became dev; `None` if dev was given.
        fingerprints: A hash of each split's content.
        left_out: For each split, which rows were skipped, in words.
    """

    task: LabelledTask
    examples: dict[str, Examples]
    sources: dict[str, str]
    held_out: float | None
    fingerprints: dict[str, str]
    left_out: dict[str, str]


def comparison_splits(config: TrainConfig, *, dev_share: float, seed: int) -> Splits:
    """Reads all examples, checks their labels, and holds out a dev split if there is none.

    Args:
        config: Sources, columns and task.
        dev_share: Share of the training examples to hold out if `config.dev` is `None`.
        seed: Seed of that draw.

    Raises:
        DataError: See `read_examples`.
        ConfigError: There are too few examples to hold any out.
    """
    given = {"train": config.train, "dev": config.dev, "test": config.test}
    sources = {split: source for split, source in given.items() if source is not None}
    task, examples = read_splits(config, sources)
    task = choose_head(task, lj.models.checkpoint_head(config.base)).task
    left_out = {split: rows.left_out for split, rows in examples.items() if rows.left_out is not None}
    held_out = None
    if "dev" not in examples:
        if not 0 < dev_share < 1:
            raise ConfigError(f"`dev_share` must be between 0 and 1, got {dev_share}.")
        train = examples["train"]
        counts = _quotas(_classes(train, task), round(dev_share * len(train)), leave=1)
        if not sum(counts.values()):
            raise ConfigError(
                f"`dev` is missing, and {train.name} has too few examples ({len(train)}) to hold out {dev_share:.0%}. "
                "Give a dev split, on which rates are chosen."
            )
        chosen = _draw(_classes(train, task), counts, seed)
        rest = np.setdiff1d(np.arange(len(train)), chosen)
        examples |= {"train": _subset(train, rest), "dev": _subset(train, chosen)}
        del sources["train"]
        held_out = dev_share
    fingerprints = {name: _fingerprint(rows) for name, rows in examples.items()}
    return Splits(task, examples, sources, held_out, fingerprints, left_out)


def data_warnings(splits: Splits) -> list[str]:
    """Warnings about skipped rows and about labels that may be mistakes; see `label_notes`."""
    left_out = [f"{split}: {told}" for split, told in splits.left_out.items()]
    targets = {split: splits.task.encode(examples) for split, examples in splits.examples.items()}
    return left_out + [note for note in target_notes(splits.task, targets) if note.startswith(WARNING)]


def take_rows(examples: Examples, task: LabelledTask, count: int, *, seed: int) -> Examples:
    """Draws `count` examples. In a classification each label keeps its share, and at least one example.

    Raises:
        ConfigError: `count` exceeds the number of examples, or is less than that of the labels.
    """
    classes = _classes(examples, task)
    least = len(set(classes))
    if not least <= count <= len(examples):
        raise ConfigError(
            f"`train_rows` must be between {least} (one per label) and {len(examples):,}, the number of examples in "
            f"{examples.name}, got {count:,}."
        )
    return _subset(examples, _draw(classes, _quotas(classes, count, least=1), seed))


def write_rows(examples: Examples, config: TrainConfig, path: Path) -> str:
    """Writes JSONL in the columns of `config`, and returns its path."""
    read = config.columns
    names = [name for name in (read.text, read.text_pair, read.label) if name is not None]
    columns = [column for column in (examples.texts, examples.pairs, examples.labels) if column is not None]
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in zip(*columns, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "\n".join(lines) + "\n")
    return str(path)


def _classes(examples: Examples, task: LabelledTask) -> list[int]:
    """The class of each example to stratify by; a regression has one."""
    return [0] * len(examples) if isinstance(task, Regression) else task.encode(examples).tolist()


def _quotas(classes: Sequence[int], count: int, *, least: int = 0, leave: int = 0) -> dict[int, int]:
    """How many examples of each class make up `count`, by the largest-remainder method.

    Each class gives at least `least` and keeps at least `leave`; only `leave` can make the sum less than `count`.
    """
    sizes = {int(name): int(size) for name, size in zip(*np.unique(classes, return_counts=True), strict=True)}
    exact = {name: count * size / len(classes) for name, size in sizes.items()}
    quotas = {name: min(max(int(exact[name]), least), size - leave) for name, size in sizes.items()}
    while (short := count - sum(quotas.values())) != 0:
        step = 1 if short > 0 else -1
        free = [n for n, q in quotas.items() if (q < sizes[n] - leave if step > 0 else q > least)]
        if not free:
            break
        quotas[max(free, key=lambda name: (step * (exact[name] - quotas[name]), -name))] += step
    return quotas


def _draw(classes: Sequence[int], counts: Mapping[int, int], seed: int) -> np.ndarray:
    """Indices in ascending order. With the same seed, a larger draw of a class contains a smaller one."""
    order = np.random.default_rng(seed).permutation(len(classes))
    names = np.asarray(classes)[order]
    return np.sort(np.concatenate([order[names == name][:count] for name, count in counts.items()]))


_T = TypeVar("_T")


def _subset(examples: Examples, indices: np.ndarray) -> Examples:
    def pick(column: Sequence[_T] | None) -> list[_T] | None:
        return None if column is None else [column[index] for index in indices]

    texts = [examples.texts[index] for index in indices]
    return Examples(examples.name, texts, pick(examples.pairs), pick(examples.labels), pick(examples.rows))


def _fingerprint(examples: Examples) -> str:
    content = json.dumps([examples.texts, examples.pairs, examples.labels], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
