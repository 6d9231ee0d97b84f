"""What a run asks of its data, whatever their task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..baseline import Baseline
from ..task import Task
from .batching import Rows

if TYPE_CHECKING:
    import tokenizers


class Data(Protocol):
    """The splits of a run, read and checked."""

    @property
    def task(self) -> Task: ...
    @property
    def new_head(self) -> bool:
        """Whether the base's own head is left aside."""
        ...

    @property
    def prior(self) -> np.ndarray | None:
        """What is known of an answer without its text; `None` of a language model's."""
        ...

    @property
    def baselines(self) -> Mapping[str, Baseline]:
        """What one answer to all scores, by split."""
        ...

    def rows(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> Mapping[str, Rows]:
        """Each split in tokens."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        ...

    def describe(self) -> str:
        """What is learnt, in words."""
        ...

    def notes(self) -> list[str]:
        """What was left out, and what else a user should know of the data."""
        ...
