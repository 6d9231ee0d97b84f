"""Labelled texts as rows of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import lora_jax as lj

from ..baseline import Baseline, baseline_of
from ..config import TrainConfig
from ..examples import Examples
from ..task import LabelledTask, make_task
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


class LabelledRows(NamedTuple):
    """Tokens, and a target for each row; `Rows` of batching."""

    encoded: Encoded
    targets: np.ndarray
    pad_id: int

    @property
    def lengths(self) -> np.ndarray:
        return self.encoded.lengths

    @property
    def rows(self) -> int:
        return self.encoded.rows

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
        return [f"{split}: {self.truncated:,} of {self.rows:,} texts cut at {self.max_length} tokens"]

    def describe(self) -> str:
        return f"{self.rows:,}"


def read_labelled(config: TrainConfig, source: str, split: str) -> Examples:
    """The rows of `"train"`, `"dev"` or `"test"`, in the config's columns."""
    columns = config.columns
    return read_examples(
        source,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        split=HUB_SPLITS[split],
        skip_bad_rows=config.skip_bad_rows,
    )


class LabelledData:
    """The splits of a run on labelled texts, read and checked: `Data` of the set-up.

    Args:
        config: its columns and task.
        sources: by split.

    Attributes:
        task: What the training rows define, with the labels in the order of the base's head where that is kept.
        new_head: Whether the base has a head of something else, which is left aside.
        prior: What the training rows tell of an answer without its text.
        baselines: By split, what that scores.

    Raises:
        DataError: a file that can't be used, or a label that can't be one.
        FileError: The base isn't found, or is malformed.
    """

    def __init__(self, config: TrainConfig, sources: dict[str, str]) -> None:
        self._examples: dict[str, Examples] = {
            split: read_labelled(config, source, split) for split, source in sources.items()
        }
        task = make_task(config.task, self._examples["train"])
        for rows in self._examples.values():
            task.encode(rows)  # an unknown label is told before the base is looked at
        choice = choose_head(task, lj.models.checkpoint_head(config.base))
        self.task, self.new_head, self._head_note = choice
        self._targets = {name: self.task.encode(rows) for name, rows in self._examples.items()}
        self._escaped = config.escape_special_tokens
        self._text_notes: list[str] = []
        self.prior = self.task.prior(self._targets["train"])
        self.baselines: dict[str, Baseline] = {
            name: baseline_of(self.task, self.prior, targets)
            for name, targets in self._targets.items()
            if name != "train"
        }

    def rows(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> dict[str, LabelledRows]:
        """Each split in tokens."""
        tokenizer.encode_special_tokens = self._escaped
        if not self._escaped:
            special = special_texts(tokenizer)
            for name, examples in self._examples.items():
                texts = [*examples.texts, *(examples.pairs or ())]
                self._text_notes += [f"{name}: {note}" for note in special_text_note(texts, special)]
        return {
            name: LabelledRows(
                encode_cached(examples, tokenizer, max_length),
                self._targets[name],
                padding_id(tokenizer),
            )
            for name, examples in self._examples.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        return {
            name: text_fingerprint((rows.texts, rows.pairs), self._targets[name].tobytes())
            for name, rows in self._examples.items()
        }

    def describe(self) -> str:
        return f"{len(self.task.labels)} labels" if self.task.labels else "a number"

    def notes(self) -> list[str]:
        """What was left out, what is known of the answers before anything is learnt, and what may be wrong in them."""
        left_out = [f"{split}: {rows.left_out}" for split, rows in self._examples.items() if rows.left_out is not None]
        head = [self._head_note] if self._head_note is not None else []
        return [*left_out, *target_notes(self.task, self._targets), *head, *self._text_notes]


def target_notes(task: LabelledTask, targets: Mapping[str, np.ndarray]) -> list[str]:
    """The labels with their counts, see `label_notes`; of a regression the range of the numbers."""
    if task.labels:
        counts = {name: np.bincount(own, minlength=len(task.labels)) for name, own in targets.items()}
        return label_notes(task.labels, counts)
    train = targets["train"]
    return [f"numbers: {train.min():.3g} to {train.max():.3g}, {task.answer(task.prior(train))}"]
