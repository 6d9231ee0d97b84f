"""Held-out rows and slices: drawn by seed, in proportion, and written so that they are read again."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_jax.study.grid.splits import comparison_splits, take_rows, write_rows
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.sources import read_examples
from lora_jax.training.errors import ConfigError
from lora_jax.training.examples import Examples
from lora_jax.training.task import make_task

LABELS = ["a"] * 50 + ["b"] * 30 + ["c"] * 3 + ["d"]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(f"text {i}\t{label}\n" for i, label in enumerate(LABELS)))
    return TrainConfig(train=str(path), output="none")


def test_dev_is_held_out_in_proportion(config):
    splits = comparison_splits(config, dev_share=0.2, seed=0)
    train, dev = splits.examples["train"], splits.examples["dev"]
    assert sorted(train.texts + dev.texts) == sorted(f"text {i}" for i in range(len(LABELS)))
    # 16.8 rows of 84; the only row of a label stays where it can be learnt from.
    assert Counter(dev.labels) == {"a": 10, "b": 6, "c": 1}
    assert splits.held_out == 0.2
    assert "train" not in splits.sources


def test_draws_follow_their_seed(config):
    one, again, other = (comparison_splits(config, dev_share=0.2, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.fingerprints != other.fingerprints


def test_a_dev_split_that_is_given_is_taken(config):
    splits = comparison_splits(TrainConfig(train=config.train, dev=config.train, output="none"), dev_share=0.2, seed=0)
    assert splits.held_out is None
    assert splits.sources == {"train": config.train, "dev": config.train}
    assert len(splits.examples["train"]) == len(LABELS)


def test_a_slice_has_every_label_and_grows_by_adding_rows():
    examples = Examples("rows", [f"text {i}" for i in range(84)], [f"pair {i}" for i in range(84)], list(LABELS))
    task = make_task("classification", examples)
    small, large = (take_rows(examples, task, count, seed=3) for count in (12, 42))
    assert Counter(small.labels) == {"a": 6, "b": 4, "c": 1, "d": 1}
    assert len(large) == 42
    assert set(small.texts) <= set(large.texts)
    assert [text.split()[1] for text in small.texts] == [pair.split()[1] for pair in small.pairs or ()]
    assert take_rows(examples, task, 84, seed=3) == examples


def test_a_slice_of_numbers_is_plain():
    examples = Examples("rows", [f"text {i}" for i in range(84)], None, [i / 84 for i in range(84)])
    drawn = take_rows(examples, make_task("regression", examples), 10, seed=0)
    assert len(drawn) == 10
    assert [text.split()[1] for text in drawn.texts] == [str(round(84 * label)) for label in drawn.labels or ()]


@pytest.mark.parametrize("count", [3, 85])
def test_a_slice_that_cannot_be_is_refused(count):
    examples = Examples("rows.tsv", ["text"] * 84, None, list(LABELS))
    with pytest.raises(ConfigError, match=f"`train_rows` must be between 4 .*, got {count}"):
        take_rows(examples, make_task("classification", examples), count, seed=0)


def test_too_few_rows_to_hold_any_out(tmp_path):
    path = tmp_path / "two.tsv"
    path.write_text("text\tlabel\nx\ta\ny\tb\n")
    with pytest.raises(ConfigError, match=r"`dev` is missing, and .*two.tsv has too few examples \(2\)"):
        comparison_splits(TrainConfig(train=str(path), output="none"), dev_share=0.2, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_is_between_none_and_all(config, share):
    with pytest.raises(ConfigError, match="`dev_share`"):
        comparison_splits(config, dev_share=share, seed=0)


def test_drawn_rows_are_read_as_they_were(tmp_path):
    texts = ['tab\tand "quotes"', "line\nbreak", "ünïcode\u2028 …"]
    examples = Examples("rows", texts, ["x", "y", "z"], [0.5, 1.0, -2.0])
    config = TrainConfig(train="a", output="b", text="t", text_pair="p", label="l", task="regression")
    path = write_rows(examples, config, tmp_path / "rows.jsonl")
    again = read_examples(path, text="t", text_pair="p", label="l")
    assert again == Examples(path, *examples[1:])
