"""Notes on the labels of a classification: how many examples each has, and which names look like a mistake."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_jax.text import listed

WARNING = "warning: "
FEW = 5  # examples; a label with fewer is memorized or not learned at all
_SHOWN = 8
# Whether a separator alone is suspicious. A comma is common in prose: it counts only if other labels share a part.
_SEPARATORS = {"|": True, ";": True, ",": False}
_BRACKETS = re.compile(r"[\s\[\](){}'\"]+")


def folded(name: str) -> str:
    """A name without what a reader overlooks: case, spaces, invisible characters and the Unicode form.

    Example:
        >>> folded(" Positive\\u00a0") == folded("positive"), folded("ﬁne") == folded("FINE")
        (True, True)
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        c for c in unicodedata.normalize("NFKC", plain) if not c.isspace() and unicodedata.category(c) != "Cf"
    )


def label_notes(labels: Sequence[str], counts: Mapping[str, np.ndarray]) -> list[str]:
    """How many training examples each label has, and what may be a mistake.

    Args:
        labels: Label names, in the order of the counts.
        counts: Number of examples of each label, for each split; `"train"` is required.

    Example:
        >>> labels, counts = ["maybe", "no", "yes"], {"train": np.array([1, 9, 8]), "dev": np.array([0, 2, 3])}
        >>> for note in label_notes(labels, counts):
        ...     print(note)
        labels: 'no' 9, 'yes' 8, 'maybe' 1
        warning: 1 of 3 labels has fewer than 5 training examples: 'maybe' 1
        warning: dev has no examples of 1 of 3 labels: 'maybe'. Its scores say nothing about them.
    """
    train = counts["train"]
    order = sorted(range(len(labels)), key=lambda index: (-train[index], index))
    with_counts = [f"{labels[index]!r} {train[index]:,}" for index in order]
    notes = [f"labels: {listed(with_counts, 12)}"]
    if alike := _alike(labels):
        notes.append(
            f"{WARNING}labels that differ only in case, spaces or Unicode form are learned as different labels: "
            f"{listed([' and '.join(map(repr, names)) for names in alike], _SHOWN)}. Use one spelling if they "
            "mean the same."
        )
    for separator in _SEPARATORS:
        if several := _several(labels, separator):
            verb = "labels hold" if len(several) > 1 else "label holds"
            notes.append(
                f"{WARNING}{len(several):,} {verb} `{separator}` ({listed(several, 3, form='{!r}')}), which "
                "may join several labels. Each combination is learned as a label of its own: give each row one label, "
                "or train one model per label."
            )
    rare = [shown for index, shown in zip(order, with_counts, strict=True) if train[index] < FEW]
    if rare:
        notes.append(
            f"{WARNING}{len(rare):,} of {len(labels):,} labels {'have' if len(rare) > 1 else 'has'} fewer than {FEW} "
            f"training examples: {listed(rare, _SHOWN)}"
        )
    for split, found in counts.items():
        if absent := [label for label, count in zip(labels, found, strict=True) if not count]:
            notes.append(
                f"{WARNING}{split} has no examples of {len(absent):,} of {len(labels):,} labels: "
                f"{listed(absent, _SHOWN, form='{!r}')}. Its scores say nothing about them."
            )
    return notes


def _alike(labels: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[folded(label)].append(label)
    return [names for names in groups.values() if len(names) > 1]


def _several(labels: Sequence[str], separator: str) -> list[str]:
    """The labels that look like several labels joined by the separator."""
    parts = {label: [_BRACKETS.sub("", part) for part in label.split(separator)] for label in labels}
    joined = [label for label, split in parts.items() if len(split) > 1 and all(split)]
    if _SEPARATORS[separator]:
        return joined
    uses: dict[str, int] = defaultdict(int)
    for split in parts.values():
        for part in set(split):
            uses[part] += 1
    return [label for label in joined if any(uses[part] > 1 for part in parts[label])]
