"""The data of a run on labelled texts: its splits as examples, targets and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import lora_jax as lj

from ..baseline import Baseline, baseline_of
from ..config import TrainConfig
from ..examples import Examples
from ..task import LabelledTask, make_task, training_label_check
from .base_head import choose_head
from .batching import Batch, BatchPlan, collate
from .encoding import Encoded, padding_id
from .fingerprint import text_fingerprint
from .label_names import label_notes
from .sources import HUB_SPLITS, read_examples
from .special_text import special_text_note, special_texts
from .token_cache import encode_cached

if TYPE_CHECKING:
    import tokenizers


class LabelledSequences(NamedTuple):
    """Tokens and a target for each example; `Sequences` of `batching`."""

    encoded: Encoded
    targets: np.ndarray
    pad_id: int

    @property
    def lengths(self) -> np.ndarray:
        return self.encoded.lengths

    @property
    def num_sequences(self) -> int:
        return self.encoded.num_sequences

    @property
    def max_length(self) -> int:
        return self.encoded.max_length

    @property
    def truncated(self) -> int:
        return self.encoded.truncated

    @property
    def dropped(self) -> int:
        return 0

    @property
    def largest_batch(self) -> int:
        return 64

    def batch(self, plan: BatchPlan, size: int) -> Batch:
        return collate(self.encoded, self.targets, plan, batch_size=size, pad_id=self.pad_id)

    def fingerprint(self) -> str:
        return self.encoded.fingerprint()

    def notes(self, split: str) -> list[str]:
        if not self.truncated:
            return []
        return [f"{split}: {self.truncated:,} of {self.num_sequences:,} texts truncated to {self.max_length} tokens"]

    def describe(self) -> str:
        return f"{self.num_sequences:,}"


def read_labelled(config: TrainConfig, source: str, split: str, *, task: LabelledTask | None = None) -> Examples:
    """Reads the examples of `"train"`, `"dev"` or `"test"` from the config's columns.

    Args:
        config: Columns, task, and whether bad rows are skipped.
        source: A file or a hub data set.
        split: Name of the split.
        task: The task whose labels are valid; `None` for training examples, which define it.
    """
    columns = config.columns
    return read_examples(
        source,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        split=HUB_SPLITS[split],
        skip_bad_rows=config.skip_bad_rows,
        check_label=training_label_check(config.task) if task is None else task.target,
    )


def read_splits(config: TrainConfig, sources: Mapping[str, str]) -> tuple[LabelledTask, dict[str, Examples]]:
    """Reads all splits, and the task that the training examples define.

    Args:
        config: See `read_labelled`.
        sources: The source of each split, `"train"` among them.

    Raises:
        DataError: See `read_examples`; or there are fewer than two labels.
    """
    train = read_labelled(config, sources["train"], "train")
    task = make_task(config.task, train)
    others = {name: read_labelled(config, sources[name], name, task=task) for name in sources if name != "train"}
    return task, {"train": train, **others}


class LabelledData:
    """The splits of a run on labelled texts, read and checked; implements `RunData`.

    Args:
        config: See `read_labelled`.
        sources: The source of each split.

    Attributes:
        task: The task that the training examples define, with its labels in the order of the base's head if it is kept.
        new_head: Whether the base has a head for something else, which is replaced.
        prior: What the training targets tell about an answer without its text.
        baselines: Scores of answering from `prior` alone, for each split but `"train"`.

    Raises:
        DataError: See `read_splits`.
        FileError: The base isn't found, or is malformed.
    """

    def __init__(self, config: TrainConfig, sources: dict[str, str]) -> None:
        task, self._examples = read_splits(config, sources)
        self.task, self.new_head, self._head_note = choose_head(task, lj.models.checkpoint_head(config.base))
        self._targets = {name: self.task.encode(examples) for name, examples in self._examples.items()}
        self._escaped = config.escape_special_tokens
        self._text_notes: list[str] = []
        self.prior = self.task.prior(self._targets["train"])
        self.baselines: dict[str, Baseline] = {
            name: baseline_of(self.task, self.prior, targets)
            for name, targets in self._targets.items()
            if name != "train"
        }

    def sequences(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> dict[str, LabelledSequences]:
        """The tokens of each split."""
        tokenizer.encode_special_tokens = self._escaped
        if not self._escaped:
            special = special_texts(tokenizer)
            for name, examples in self._examples.items():
                texts = [*examples.texts, *(examples.pairs or ())]
                self._text_notes += [f"{name}: {note}" for note in special_text_note(texts, special)]
        return {
            name: LabelledSequences(
                encode_cached(examples, tokenizer, max_length), self._targets[name], padding_id(tokenizer)
            )
            for name, examples in self._examples.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        return {
            name: text_fingerprint((examples.texts, examples.pairs), self._targets[name].tobytes())
            for name, examples in self._examples.items()
        }

    def describe(self) -> str:
        return f"{len(self.task.labels)} labels" if self.task.labels else "a number"

    def notes(self) -> list[str]:
        """Notes on bad rows, the labels, the head, and special tokens in the texts."""
        left_out = [
            f"{split}: {examples.left_out}"
            for split, examples in self._examples.items()
            if examples.left_out is not None
        ]
        head = [self._head_note] if self._head_note is not None else []
        return [*left_out, *target_notes(self.task, self._targets), *head, *self._text_notes]


def target_notes(task: LabelledTask, targets: Mapping[str, np.ndarray]) -> list[str]:
    """Notes on the labels, see `label_notes`; for a regression, the range of the training numbers."""
    if task.labels:
        counts = {name: np.bincount(own, minlength=len(task.labels)) for name, own in targets.items()}
        return label_notes(task.labels, counts)
    train = targets["train"]
    return [f"numbers: {train.min():.3g} to {train.max():.3g}, {task.answer(task.prior(train))}"]
