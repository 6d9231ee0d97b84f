"""The shipped messages: complete, balanced, one split each, and written one by one."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from lora_jax.data import path

SPLITS = {"train": 4, "dev": 1, "test": 1}  # messages for each pair of label and topic
LABELS = {"question", "request", "complaint", "praise", "report", "thanks", "apology", "offer"}
TOPICS = {
    "delivery", "billing", "app", "rooms", "leave", "food",
    "hardware", "travel", "training", "building", "account", "hiring",
}  # fmt: skip

# Results are measured on these bytes: changing a message changes every figure that was published with it.
SHA256 = {
    "train": "ded5e30d07b43945e68da3a04899563807bd4b8aadbdacddaf170d5548f51315",
    "dev": "2ac086842b6804b418aa9aa51027bd4928a1f083b1965fb976dbb297ff205145",
    "test": "20892e543aef74bb3f9df6f4b2d81e54e44675a17d17ecdafd10d728c58f7571",
}

# The set itself reaches 0.33, 0.25 and (5, 2, 1); filled-in templates go far beyond.
MAX_SHARED_WORDS = 0.4
MAX_SHARED_TRIGRAMS = 1 / 3
MAX_SAME_OPENING = {2: 5, 3: 2, 4: 1}  # opening of so many words: so many messages of one label
MAX_SAME_FOUR_WORDS = 3


class Message(NamedTuple):
    text: str
    label: str
    topic: str


def read(split: str) -> list[Message]:
    header, *lines = path(split).read_text(encoding="utf-8").splitlines()
    assert header == "text\tlabel\ttopic"
    return [Message(*line.split("\t")) for line in lines]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[\w']+", text.lower()))


def runs(tokens: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}


def repetitions(messages: Sequence[Message]) -> dict[str, list[object]]:
    """What makes a set look copied or filled in, by kind; empty for messages written one by one."""
    found: dict[str, list[object]] = defaultdict(list)
    tokens = [words(message.text) for message in messages]
    indexed = [(message.text, set(token), runs(token, 3)) for message, token in zip(messages, tokens, strict=True)]
    for (text, vocabulary, trigrams), (other, other_vocabulary, other_trigrams) in itertools.combinations(indexed, 2):
        if len(vocabulary & other_vocabulary) > MAX_SHARED_WORDS * len(vocabulary | other_vocabulary):
            found["shared words"].append((text, other))
        if len(trigrams & other_trigrams) > MAX_SHARED_TRIGRAMS * min(len(trigrams), len(other_trigrams)):
            found["shared trigrams"].append((text, other))
    for length, most in MAX_SAME_OPENING.items():
        openings = Counter((message.label, token[:length]) for message, token in zip(messages, tokens, strict=True))
        found["same opening"] += [opening for opening, count in openings.items() if count > most]
    four_words = Counter(itertools.chain.from_iterable(runs(token, 4) for token in tokens))
    found["same four words"] += [run for run, count in four_words.items() if count > MAX_SAME_FOUR_WORDS]
    return {kind: cases for kind, cases in found.items() if cases}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Message]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def messages(splits: dict[str, list[Message]]) -> list[Message]:
    return list(itertools.chain.from_iterable(splits.values()))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'dev', 'test', not 'validation'"):
        path("validation")


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_is_fixed(split: str):
    assert hashlib.sha256(path(split).read_bytes()).hexdigest() == SHA256[split]


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_text_label_and_topic_without_quoting(split: str):
    content = path(split).read_bytes().decode("utf-8")
    assert content.endswith("\n")
    for line in content.removesuffix("\n").split("\n"):
        text, label, topic = line.split("\t")
        assert text == " ".join(text.split()), f"stray white space in {text!r}"
        assert '"' not in text, f"a reader that knows quoting would misread {text!r}"
        assert (label, topic) == ("label", "topic") or (label in LABELS and topic in TOPICS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_speaks_of_every_topic_equally_often(split: str, splits: dict[str, list[Message]]):
    # A uniform table: knowing the topic leaves every label as likely as before.
    cells = Counter((message.label, message.topic) for message in splits[split])
    assert cells == {(label, topic): SPLITS[split] for label in LABELS for topic in TOPICS}


def test_no_message_is_in_two_splits(splits: dict[str, list[Message]]):
    texts = {split: {words(message.text) for message in rows} for split, rows in splits.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other]
    assert sum(map(len, texts.values())) == 576


def test_messages_are_short_and_their_lengths_vary(messages: list[Message]):
    lengths = [len(message.text.split()) for message in messages]
    assert min(lengths) >= 4
    assert max(lengths) <= 40
    assert len(set(lengths)) > 15
    by_label = {label: [len(m.text.split()) for m in messages if m.label == label] for label in LABELS}
    means = [sum(lengths) / len(lengths) for lengths in by_label.values()]
    assert max(means) < 1.5 * min(means), "the length would give the label away"


def test_messages_name_no_address_and_no_telephone_number(messages: list[Message]):
    for message in messages:
        assert not re.search(r"@|https?:|www\.|\d[\d -]{6,}\d", message.text), message.text


@pytest.mark.parametrize(
    ("label", "cue"),
    [("question", r"\?"), ("request", r"\bplease|\bpls"), ("thanks", "thank"), ("apology", "sorry|apolog")],
)
def test_the_usual_cue_is_neither_needed_nor_enough(label: str, cue: str, messages: list[Message]):
    marked = Counter(message.label for message in messages if re.search(cue, message.text.lower()))
    assert marked[label] <= 0.8 * 72
    assert len(marked) >= 4, f"{cue!r} occurs under {sorted(marked)} only"


def test_no_word_gives_a_label_away(messages: list[Message]):
    # F1 of "has this word, so has this label".
    containing: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for message in messages:
        vocabulary = set(words(message.text))
        containing.update(vocabulary)
        together.update((word, message.label) for word in vocabulary)
    scores = {pair: 2 * count / (72 + containing[pair[0]]) for pair, count in together.items()}
    best = max(scores, key=scores.__getitem__)
    assert scores[best] < 0.5, best


def test_messages_are_written_one_by_one(messages: list[Message]):
    assert repetitions(messages) == {}


def test_templates_would_be_found():
    things = ("order", "invoice", "badge", "lunch", "laptop", "ticket")
    places = ("the front desk", "our Leeds office", "room nine")
    templates = {
        "question": "Can you tell me when my {thing} will reach {place}?",
        "complaint": "I am very unhappy that my {thing} never arrived at {place}.",
        "thanks": "Thank you so much for bringing my {thing} to {place} today.",
    }
    filled = [
        Message(template.format(thing=thing, place=place), label, "delivery")
        for label, template in templates.items()
        for thing, place in itertools.product(things, places)
    ]
    assert set(repetitions(filled)) == {"shared words", "shared trigrams", "same opening", "same four words"}


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("shared words", lambda text: text.upper().replace(" ", "  ")),
        ("shared words", lambda text: " ".join(reversed(text.split()))),
        ("shared trigrams", lambda text: f"{text} Besides, nobody here has heard about it from anyone else until now."),
        ("same opening", lambda text: " ".join(text.split()[:4]) + " something else entirely happened last night."),
    ],
)
def test_one_edited_copy_would_be_found(kind, edit, messages: list[Message]):
    original = next(message for message in messages if message.text.startswith("The boiler was serviced"))
    copy = original._replace(text=edit(original.text))
    assert kind in repetitions([*messages, copy])


def test_the_description_names_every_label_and_topic():
    description = path("train").with_name("SOURCE.md").read_text(encoding="utf-8")
    assert all(f"| {label} |" in description for label in LABELS)
    assert all(f"`{topic}`" in description for topic in TOPICS)
    assert "Apache-2.0" in description
