"""Texts are tokenized once; whatever is wrong with the cache costs time and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lora_jax import files
from lora_jax.training.data import token_cache
from lora_jax.training.data.token_cache import cache_folder, encode_cached
from lora_jax.training.examples import Examples


def tokenizer(words="a b c"):
    made = Tokenizer(WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(words.split(), 1)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return made


def examples(texts=("a b", "c a b b"), pairs=None):
    return Examples("made here", list(texts), pairs)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "_LEAST", 0)
    return tmp_path / "tokens"


@pytest.fixture
def calls(monkeypatch):
    counted = []
    plain = token_cache.encode
    monkeypatch.setattr(token_cache, "encode", lambda *args: counted.append(1) or plain(*args))
    return counted


def assert_equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.asarray(mine).dtype == np.asarray(theirs).dtype


def test_the_second_time_nothing_is_tokenized(folder, calls):
    used = tokenizer()
    first = encode_cached(examples(), used, 3)
    second, third = encode_cached(examples(), used, 3), encode_cached(examples(), tokenizer(), 3)
    assert len(calls) == 1
    assert_equal(third, first)
    assert_equal(first, second)
    assert first.truncated == 1
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: (examples(("a b", "c a b c")), tokenizer(), 3),
        lambda: (examples(("a bc", " a b b")), tokenizer(), 3),  # the same text, cut elsewhere
        lambda: (examples(pairs=["a", "b"]), tokenizer(), 3),
        lambda: (examples(), tokenizer("b a c"), 3),
        lambda: (examples(), tokenizer(), 2),
    ],
    ids=["text", "cut", "pairs", "tokenizer", "length"],
)
def test_whatever_changes_the_ids_is_another_entry(other, calls):
    encode_cached(examples(), tokenizer(), 3)
    changed = encode_cached(*other())
    assert len(calls) == 2
    assert_equal(changed, token_cache.encode(*other()))


@pytest.mark.parametrize("harm", [lambda data: data[:40], lambda data: b"", lambda data: b"something else" * 9])
def test_a_broken_entry_is_made_anew(harm, folder, calls):
    first = encode_cached(examples(), tokenizer(), 3)
    (entry,) = folder.iterdir()
    entry.write_bytes(harm(entry.read_bytes()))
    assert_equal(encode_cached(examples(), tokenizer(), 3), first)
    encode_cached(examples(), tokenizer(), 3)
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, calls):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("LORA_JAX_CACHE", str(blocked))
    encode_cached(examples(), tokenizer(), 3)
    encode_cached(examples(), tokenizer(), 3)
    assert len(calls) == 2


def test_few_texts_are_not_written(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("LORA_JAX_CACHE", str(folder))
    encode_cached(examples(), tokenizer(), 3)
    assert not folder.exists()


def test_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lora_jax"


def test_a_changed_entry_is_made_anew(folder, calls):
    """One whose tokens are those of no text, or of another entry, would be learnt from without a word."""
    first = encode_cached(examples(), tokenizer(), 3)
    other = encode_cached(examples(("b b", "a c")), tokenizer(), 3)
    assert not np.array_equal(first.ids, other.ids)
    entry, second = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    held = files.read_safetensors(entry)
    held["ids"] = held["ids"].copy()
    held["ids"][0] += 1
    files.write_safetensors(entry, held, files.read_metadata(entry))
    assert_equal(encode_cached(examples(), tokenizer(), 3), first)
    assert len(calls) == 3
    entry.write_bytes(second.read_bytes())
    assert_equal(encode_cached(examples(), tokenizer(), 3), first)
    assert len(calls) == 4
