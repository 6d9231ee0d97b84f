"""The rows of a comparison: training slices and a dev split, drawn by seed and written so that runs can be repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lora_jax as lj
from lora_jax import files
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.base_head import choose_head
from lora_jax.training.data.label_names import WARNING
from lora_jax.training.data.labelled import read_labelled, target_notes
from lora_jax.training.errors import ConfigError
from lora_jax.training.examples import Examples
from lora_jax.training.task import LabelledTask, Regression, make_task


class Splits(NamedTuple):
    """What a comparison learns from and is measured on.

    Attributes:
        task: what the training rows define.
        examples: by split; there is always a `"dev"`.
        sources: where a split is read from; those that were drawn here aren't in it.
        held_out: the share of the training rows that became dev; `None` where dev was given.
        fingerprints: of each split's content.
        left_out: What was left out of the sources, in words.
    """

    task: LabelledTask
    examples: dict[str, Examples]
    sources: dict[str, str]
    held_out: float | None
    fingerprints: dict[str, str]
    left_out: dict[str, str]


def read_splits(config: TrainConfig, *, dev_share: float, seed: int) -> Splits:
    """Reads all rows and checks all labels.

    Args:
        config: sources, columns and task.
        dev_share: of the training rows, held out as dev where `config.dev` is `None`.
        seed: of that draw.

    Raises:
        DataError: as `read_examples` and `LabelledTask.encode`.
        ConfigError: too few rows to hold any out.
    """
    given = {"train": config.train, "dev": config.dev, "test": config.test}
    sources = {split: source for split, source in given.items() if source is not None}
    examples = {split: read_labelled(config, source, split) for split, source in sources.items()}
    task = make_task(config.task, examples["train"])
    for rows in examples.values():
        task.encode(rows)  # an unknown label is told before the base is looked at
    task = choose_head(task, lj.models.checkpoint_head(config.base)).task
    left_out = {split: rows.left_out for split, rows in examples.items() if rows.left_out is not None}
    held_out = None
    if "dev" not in examples:
        if not 0 < dev_share < 1:
            raise ConfigError(f"`dev_share` is {dev_share}, and a share between 0 and 1 is expected.")
        train = examples["train"]
        counts = _quotas(_classes(train, task), round(dev_share * len(train)), leave=1)
        if not sum(counts.values()):
            raise ConfigError(
                f"`dev` is missing, and {train.name} has too few rows ({len(train)}) to hold {dev_share:.0%} of them "
                "out: rates are chosen on dev rows. Give a dev split."
            )
        chosen = _draw(_classes(train, task), counts, seed)
        rest = np.setdiff1d(np.arange(len(train)), chosen)
        examples |= {"train": _rows(train, rest), "dev": _rows(train, chosen)}
        del sources["train"]
        held_out = dev_share
    fingerprints = {name: _fingerprint(rows) for name, rows in examples.items()}
    return Splits(task, examples, sources, held_out, fingerprints, left_out)


def data_warnings(splits: Splits) -> list[str]:
    """The rows that were left out, and what may be a mistake in the labels, see `label_notes`."""
    left_out = [f"{split}: {told}" for split, told in splits.left_out.items()]
    targets = {split: splits.task.encode(examples) for split, examples in splits.examples.items()}
    return left_out + [note for note in target_notes(splits.task, targets) if note.startswith(WARNING)]


def take_rows(examples: Examples, task: LabelledTask, count: int, *, seed: int) -> Examples:
    """`count` rows drawn by seed: of a classification so that each label keeps its share, at least one row of each.

    Raises:
        ConfigError: more rows than there are, or fewer than there are labels.
    """
    classes = _classes(examples, task)
    least = len(set(classes))
    if not least <= count <= len(examples):
        raise ConfigError(
            f"`train_rows` is {count:,}, and {examples.name} has {len(examples):,} rows to train on"
            + (f" of {least} labels: at least one row of each is taken." if least > 1 else ".")
        )
    return _rows(examples, _draw(classes, _quotas(classes, count, least=1), seed))


def write_rows(examples: Examples, config: TrainConfig, path: Path) -> str:
    """Writes JSONL that `config`'s columns are read from again; its path."""
    read = config.columns
    names = [name for name in (read.text, read.text_pair, read.label) if name is not None]
    columns = [column for column in (examples.texts, examples.pairs, examples.labels) if column is not None]
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in zip(*columns, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "\n".join(lines) + "\n")
    return str(path)


def _classes(examples: Examples, task: LabelledTask) -> list[int]:
    """Rows to be drawn evenly from: those of each label; of a regression all are alike."""
    return [0] * len(examples) if isinstance(task, Regression) else task.encode(examples).tolist()


def _quotas(classes: Sequence[int], count: int, *, least: int = 0, leave: int = 0) -> dict[int, int]:
    """How many rows of each class make up `count`, by the largest remainders.

    Of each, at least `least` and all but `leave` at most; the sum is less than `count` only where `leave` forbids it.
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
    """Rows, ascending; a larger draw of a class with the same seed has the rows of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(classes))
    names = np.asarray(classes)[order]
    return np.sort(np.concatenate([order[names == name][:count] for name, count in counts.items()]))


def _rows(examples: Examples, places: np.ndarray) -> Examples:
    def pick(column: Sequence[Any] | None) -> list[Any] | None:
        return None if column is None else [column[place] for place in places]

    texts = [examples.texts[place] for place in places]
    return Examples(examples.name, texts, pick(examples.pairs), pick(examples.labels), pick(examples.rows))


def _fingerprint(examples: Examples) -> str:
    content = json.dumps([examples.texts, examples.pairs, examples.labels], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
