"""Labelled texts, and the columns of a data set that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a data set are read; each task has its own.

    Attributes:
        text, text_pair, label: of labelled texts; `text` of plain texts too.
        prompt, completion: a text, and what is to follow it.
        separator: what stands between the two.
        messages: of conversations.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    separator: str = "\n"
    messages: str | None = None


class Examples(NamedTuple):
    """Rows of a data set: texts, and labels as the source holds them (class names where it knows them).

    Attributes:
        name: the file or data set, for messages.
        texts, pairs: the texts of every row; `pairs` is `None` without a second column.
        labels: `None` where no label column was asked for.
        rows: the number of each in the source; `None` for 1, 2, 3, …
        left_out: what was left out of bad rows, in words; `None` for nothing.
        skipped: how many these are.
    """

    name: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    rows: Sequence[int] | None = None
    left_out: str | None = None
    skipped: int = 0

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.texts)

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each row in the source."""
        return self.rows if self.rows is not None else range(1, len(self.texts) + 1)
