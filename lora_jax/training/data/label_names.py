"""The names of a classification's labels: how many rows each has, and which of them look like a mistake."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

WARNING = "warning: "
FEW = 5  # training rows; of fewer, a label is learnt by heart or not at all
_SHOWN = 8
# A comma stands in prose, too: it counts only where what it separates is found again.
_SEPARATORS = {"|": True, ";": True, ",": False}
_BRACKETS = re.compile(r"[\s\[\](){}'\"]+")


def folded(name: str) -> str:
    """A name without what a reader overlooks: case, spaces, invisible characters, Unicode's several forms.

    Example:
        >>> folded(" Positive\\u00a0") == folded("positive"), folded("ﬁne") == folded("FINE")
        (True, True)
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        c for c in unicodedata.normalize("NFKC", plain) if not c.isspace() and unicodedata.category(c) != "Cf"
    )


def label_notes(labels: Sequence[str], counts: Mapping[str, np.ndarray]) -> list[str]:
    """How many training rows each label has, and what may be a mistake in them.

    Args:
        labels: The names, in the order of the counts.
        counts: Of each split, how many rows each label has; `"train"` among them.

    Example:
        >>> labels, counts = ["maybe", "no", "yes"], {"train": np.array([1, 9, 8]), "dev": np.array([0, 2, 3])}
        >>> for note in label_notes(labels, counts):
        ...     print(note)
        labels: 'no' 9, 'yes' 8, 'maybe' 1
        warning: 1 of 3 labels has fewer than 5 training rows: 'maybe' 1
        warning: dev has no row of 1 of 3 labels: 'maybe'. Its scores say nothing of them.
    """
    train = counts["train"]
    order = sorted(range(len(labels)), key=lambda place: (-train[place], place))
    notes = [f"labels: {shown([f'{labels[place]!r} {train[place]:,}' for place in order], most=12)}"]
    if alike := _alike(labels):
        notes.append(
            f"{WARNING}labels that differ only in case, spaces or Unicode form are learnt as different ones: "
            f"{shown([' and '.join(map(repr, names)) for names in alike])}. Spell them alike if they mean the same."
        )
    for separator in _SEPARATORS:
        if several := _several(labels, separator):
            verb = "labels hold" if len(several) > 1 else "label holds"
            notes.append(
                f"{WARNING}{len(several):,} {verb} `{separator}` ({shown(several, most=3, quoted=True)}), as several "
                "labels of one row would. Each such text is learnt as one label of its own: give each row one label, "
                "or train once for each."
            )
    rare = [f"{labels[place]!r} {train[place]:,}" for place in order if train[place] < FEW]
    if rare:
        notes.append(
            f"{WARNING}{len(rare):,} of {len(labels):,} labels {'have' if len(rare) > 1 else 'has'} fewer than {FEW} "
            f"training rows: {shown(rare)}"
        )
    for split, found in counts.items():
        if absent := [labels[place] for place in range(len(labels)) if not found[place]]:
            notes.append(
                f"{WARNING}{split} has no row of {len(absent):,} of {len(labels):,} labels: "
                f"{shown(absent, quoted=True)}. Its scores say nothing of them."
            )
    return notes


def shown(names: Sequence[str], *, most: int = _SHOWN, quoted: bool = False) -> str:
    """The first of many names, and how many more there are."""
    first = [repr(name) if quoted else name for name in names[:most]]
    return ", ".join(first) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _alike(labels: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[folded(label)].append(label)
    return [names for names in groups.values() if len(names) > 1]


def _several(labels: Sequence[str], separator: str) -> list[str]:
    """The labels that look like several, joined by the separator."""
    parts = {label: [_BRACKETS.sub("", part) for part in label.split(separator)] for label in labels}
    joined = [label for label, split in parts.items() if len(split) > 1 and all(split)]
    if _SEPARATORS[separator]:
        return joined
    uses: dict[str, int] = defaultdict(int)
    for split in parts.values():
        for part in set(split):
            uses[part] += 1
    return [label for label in joined if any(uses[part] > 1 for part in parts[label])]
