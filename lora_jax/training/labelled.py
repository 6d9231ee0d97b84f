"""Labelled texts as rows of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .batching import Batch, BatchPlan, collate
from .config import TrainConfig
from .data import HUB_SPLITS, Examples, read_examples
from .encoding import Encoded, padding_id
from .inputs import text_fingerprint
from .task import LabelledTask, make_task
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
        source, text=columns.text, text_pair=columns.text_pair, label=columns.label, split=HUB_SPLITS[split]
    )


class LabelledData:
    """The splits of a run on labelled texts, read and checked: `Data` of the set-up.

    Args:
        config: its columns and task.
        sources: by split.

    Raises:
        DataError: a file that can't be used, or a label that can't be one.
    """

    task: LabelledTask

    def __init__(self, config: TrainConfig, sources: dict[str, str]) -> None:
        self._examples: dict[str, Examples] = {
            split: read_labelled(config, source, split) for split, source in sources.items()
        }
        self.task = make_task(config.task, self._examples["train"])
        self._targets = {name: self.task.encode(rows) for name, rows in self._examples.items()}

    def rows(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> dict[str, LabelledRows]:
        """Each split in tokens."""
        return {
            name: LabelledRows(
                encode_cached(examples, tokenizer, max_length), self._targets[name], padding_id(tokenizer)
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
