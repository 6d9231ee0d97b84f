"""Texts to tokens: special tokens, pairs, and what is cut."""

from __future__ import annotations

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.training.data import Examples
from lora_jax.training.encoding import encode


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
