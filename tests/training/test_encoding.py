"""Texts to tokens: special tokens, pairs, and what is cut."""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

import lora_jax as lj
from lora_jax.files import FileError
from lora_jax.training.data.encoding import encode, encode_beginnings
from lora_jax.training.data.special_text import encode_texts
from lora_jax.training.examples import Examples
from tests.tiny_bert import WORDS
from tests.tiny_encoders import byte_level


@pytest.fixture
def tokenizer(base):
    tokenizer = lj.models.load_tokenizer(base)
    tokenizer.enable_padding(length=20)  # as some tokenizer files ask for
    return tokenizer


def test_rows_end_to_end(tokenizer):
    encoded = encode(Examples("x", ["good film", "bad"]), tokenizer, 16)
    cls, sep, good, film, bad = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "good", "film", "bad"))
    np.testing.assert_array_equal(encoded.ids, [cls, good, film, sep, cls, bad, sep])
    np.testing.assert_array_equal(encoded.lengths, [4, 3])
    assert encoded.truncated == 0


def test_pairs_have_two_types(tokenizer):
    encoded = encode(Examples("x", ["good film"], ["bad"]), tokenizer, 16)
    np.testing.assert_array_equal(encoded.types, [0, 0, 0, 0, 1, 1])


def test_long_texts_are_cut_and_counted(tokenizer):
    encoded = encode(Examples("x", ["good " * 30, "bad", "very " * 6]), tokenizer, 8)
    np.testing.assert_array_equal(encoded.lengths, [8, 3, 8])
    assert encoded.ids[7] == tokenizer.token_to_id("[SEP]")
    assert encoded.truncated == 1


def test_fingerprint_is_of_the_rows(tokenizer):
    first, again, other = (
        encode(Examples("x", [text]), tokenizer, 8).fingerprint() for text in ("good", "good", "bad")
    )
    assert first == again
    assert first != other


# ---------------------------------------------------------------------------------------------------------- long texts


def long_text(rng: random.Random, most: int) -> str:
    bits = ("good", "bad film", "x" * 40, " " * 100, "\n", "é", "漢字", "😀 ", "the ", "poor", "a-b", "1234567")
    return "a" + "".join(rng.choice(bits) + rng.choice((" ", "")) for _ in range(rng.choice((1, 5, most))))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_text_that_is_cut_early_has_the_tokens_that_it_would_have(pairs, tokenizer):
    """Against the tokenizer's own truncation, which reads all of a text."""
    rng = random.Random(0)
    for each in (tokenizer, byte_level(WORDS)):
        for length in (12, 17):
            # Of pairs few: the tokenizer's own truncation gives every two ends that are cut off an encoding.
            texts = [long_text(rng, 40 if pairs else 120) for _ in range(24)]
            inputs = list(zip(texts[::2], texts[1::2], strict=True)) if pairs else texts
            found = encode_beginnings(inputs, each, length)
            each.no_padding()
            each.enable_truncation(length)
            expected = each.encode_batch(inputs)
            assert [b.encoding.ids for b in found] == [encoding.ids for encoding in expected]
            assert [b.encoding.type_ids for b in found] == [encoding.type_ids for encoding in expected]
            assert [b.is_cut for b in found] == [bool(encoding.overflowing) for encoding in expected]


def test_a_word_that_the_cut_would_change_is_read_on():
    """A word of 150 letters is unknown; its first 84, where reading would end, are 84 known pieces."""
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2}
    each = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    each.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    (found,) = encode_beginnings([("b" * 99 + " ") * 3 + "a" * 150 + " a" * 500], each, 12)
    assert found.encoding.ids == [0] * 4 + [1] * 8


def test_megabytes_are_cut_before_they_are_tokenized(tokenizer):
    read = []

    class Counting:
        """The tokenizer, and how many characters it is given."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch(self, inputs, **options):
            read.append(sum(map(len, inputs)))
            return tokenizer.encode_batch(inputs, **options)

        def encode(self, text, **options):
            read.append(len(text))
            return tokenizer.encode(text, **options)

    texts = ["good " * 10_000_000, "bad", "x" * 30_000_000, "bad " + " " * 30_000_000 + "good"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoded = encode(Examples("x", texts), Counting(), 128)  # pyright: ignore[reportArgumentType]
    assert sum(read) < 8_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB
    # A word of a megabyte, or as much blank space, is where reading ends: told as a cut.
    assert encoded.truncated == 3
    assert encoded.lengths.tolist() == [128, 3, 3, 3]
    np.testing.assert_array_equal(encoded.ids[:128], encode(Examples("x", ["good " * 200]), tokenizer, 128).ids)


@pytest.mark.parametrize(
    "how", [lambda rows, made: encode(rows, made, 16), lambda rows, made: encode_texts(made, rows.texts)]
)
def test_a_tokenizer_that_breaks_off_is_refused(how, tmp_path):
    from tests.models import test_tokenizer

    nobody = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}]}
    nobody |= {"pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    made = lj.models.load_tokenizer(
        test_tokenizer.write(tmp_path, {**test_tokenizer.WORD_PIECE, "post_processor": nobody})
    )
    with pytest.raises(FileError, match=r"the base has a tokenizer that fails"):
        how(Examples("x", ["good film"]), made)
