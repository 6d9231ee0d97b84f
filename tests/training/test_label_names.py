"""Labels are counted, and what may be a mistake in them is told."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.training.data.label_names import folded, label_notes


def notes(counts: dict[str, int], **others: list[int]) -> list[str]:
    arrays = {"train": list(counts.values()), **others}
    return label_notes(list(counts), {split: np.array(own) for split, own in arrays.items()})


def test_counts_are_those_of_training_most_frequent_first():
    assert notes({"a": 5, "b": 7}, dev=[1, 1]) == ["labels: 'b' 7, 'a' 5"]
    many = {f"l{number}": 9 for number in range(40)}
    assert notes(many)[0].endswith("'l11' 9 and 28 more")


@pytest.mark.parametrize(
    "names",
    [
        ("positive", "Positive"),
        ("positive", " positive "),
        ("new york", "newyork"),
        ("caf\u00e9", "cafe\u0301"),  # one letter, or two that are drawn as one
        ("fine", "\ufb01ne"),  # a ligature
        ("no", "no\u200b"),  # a space of no width
        ("strasse", "stra\u00dfe"),
    ],
)
def test_labels_that_look_alike_are_told(names):
    first, second = names
    (_, warning) = notes({first: 9, "other": 9, second: 9})
    assert warning.startswith("warning: labels that differ only in case, spaces or Unicode form")
    assert f"{first!r} and {second!r}" in warning
    assert folded(first) == folded(second)


def test_three_spellings_are_one_group():
    (_, warning) = notes({"Positive": 9, " positive ": 9, "positive": 9})
    assert "'Positive' and ' positive ' and 'positive'." in warning


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        (("a|b", "c"), "1 label holds `|` ('a|b')"),
        (("a;b", "b;c", "c"), "2 labels hold `;` ('a;b', 'b;c')"),
        (("a,b", "b", "c"), "1 label holds `,` ('a,b')"),
        (("['a', 'b']", "['b']"), "1 label holds `,`"),
        (("yes, please", "no, thanks"), None),  # prose
        (("|", "a|"), None),
        (("and/or", "n/a"), None),
    ],
)
def test_several_labels_in_one_are_told(labels, warned):
    found = notes(dict.fromkeys(labels, 9))[1:]
    assert len(found) == (warned is not None)
    assert warned is None or found[0].startswith(f"warning: {warned}")


def test_a_column_of_tag_lists_is_forty_labels_and_one_warning():
    tags = [f"t{number}" for number in range(9)]
    joined = {f"{one}|{other}": 9 for one in tags for other in tags if one < other}
    (_, warning) = notes(joined)
    assert "36 labels hold `|` ('t0|t1', 't0|t2', 't0|t3' and 33 more)" in warning


def test_rare_and_absent_labels_are_told():
    found = notes({"a": 9, "b": 4, "c": 1}, dev=[3, 0, 1], test=[1, 1, 0])
    assert found[1:] == [
        "warning: 2 of 3 labels have fewer than 5 training examples: 'b' 4, 'c' 1",
        "warning: dev has no examples of 1 of 3 labels: 'b'. Its scores say nothing about them.",
        "warning: test has no examples of 1 of 3 labels: 'c'. Its scores say nothing about them.",
    ]
