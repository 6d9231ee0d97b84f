"""The interface between a run and its data, whatever the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..baseline import Baseline
from ..task import Task
from .batching import Sequences

if TYPE_CHECKING:
    import tokenizers


class RunData(Protocol):
    """The splits of a run, read and checked."""

    @property
    def task(self) -> Task: ...
    @property
    def new_head(self) -> bool:
        """Whether the base's own head is replaced."""
        ...

    @property
    def prior(self) -> np.ndarray | None:
        """What the training targets tell about an answer without its text; `None` for a language model."""
        ...

    @property
    def baselines(self) -> Mapping[str, Baseline]:
        """Scores of answering from `prior` alone, by split."""
        ...

    def sequences(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> Mapping[str, Sequences]:
        """The tokens of each split."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        ...

    def describe(self) -> str:
        """What is learned, in words."""
        ...

    def notes(self) -> list[str]:
        """Notes for the user, on skipped rows among others."""
        ...
