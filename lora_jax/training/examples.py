"""Labelled texts, and the columns of a data set that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a data set are read; each task has its own.

    Attributes:
        text, text_pair, label: Columns of labelled texts; `text` also of plain texts.
        prompt, completion: Columns of prompts and of what follows them.
        separator: Text between a prompt and its completion.
        messages: Column of conversations.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    separator: str = "\n"
    messages: str | None = None


class Examples(NamedTuple):
    """Examples of a data set: texts, and labels as the source holds them (class names where it knows them).

    Attributes:
        name: Name of the file or data set, for messages.
        texts, pairs: First and second texts; `pairs` is `None` without a second column.
        labels: Labels; `None` without a label column.
        rows: Row number of each example in the source; `None` for 1, 2, 3, …
        left_out: Description of the bad rows that were left out; `None` for none.
        skipped: Number of bad rows that were left out.
    """

    name: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[str | int | float | bool] | None = None
    rows: Sequence[int] | None = None
    left_out: str | None = None
    skipped: int = 0

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.texts)

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each row in the source."""
        return self.rows if self.rows is not None else range(1, len(self.texts) + 1)
