"""A stranger's tokenizer: loaded at once where it is of plain parts, tried where it can be stopped where it isn't."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lora_jax import models
from lora_jax.files import FileError
from lora_jax.models.checkpoint import tokenizer as module
from tests.tiny_bert import WORDS, vocabulary, word_piece
from tests.tiny_encoders import byte_level

WORD_PIECE = json.loads(word_piece(vocabulary(WORDS)).to_str())
BYTE_LEVEL = json.loads(byte_level(WORDS).to_str())
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def _nothing_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PASSED", set())
    monkeypatch.setattr(module, "_SECONDS", 5.0)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started."""
    started: list[Any] = []
    popen = subprocess.Popen

    def counted(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **options)

    monkeypatch.setattr(module.subprocess, "Popen", counted)
    return started


def write(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def model(base: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {**base, "model": {**base["model"], **entries}}


@pytest.mark.parametrize(
    "content",
    [
        WORD_PIECE,
        BYTE_LEVEL,
        {**BYTE_LEVEL, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(QWEN)]}},
        {**WORD_PIECE, "normalizer": {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}},
    ],
)
def test_plain_parts_are_loaded_at_once(tmp_path: Path, trials: list[Any], content: Any) -> None:
    assert models.load_tokenizer(write(tmp_path, content)).encode("the film").ids
    assert not trials


@pytest.mark.parametrize(
    "content",
    [
        {**BYTE_LEVEL, "pre_tokenizer": split(r"\w+|[^\w\s]+")},
        {**WORD_PIECE, "normalizer": {"type": "Nmt"}},
        {**WORD_PIECE, "pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": " "}},
    ],
)
def test_what_isnt_plain_is_tried_once(tmp_path: Path, trials: list[Any], content: Any) -> None:
    for _ in range(3):
        assert models.load_tokenizer(write(tmp_path, content)).encode("the film").ids
    assert len(trials) == 1
    models.load_tokenizer(write(tmp_path, json.dumps(content, indent=1)))  # another file
    assert len(trials) == 2


CHARSMAP = {"type": "Precompiled"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**WORD_PIECE, "pre_tokenizer": split("(a+)+$")}, r"retry-limit.*because of a regular expression of its own"),
        ({**WORD_PIECE, "pre_tokenizer": split("(x+x+)+y")}, r"retry-limit"),
        (
            {**WORD_PIECE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"(\s|\s\s)+z")]}},
            r"retry-limit",
        ),
        (
            {**WORD_PIECE, "normalizer": {"type": "Replace", "pattern": {"Regex": "( |  )+$"}, "content": "b"}},
            r"retry-limit",
        ),
        ({**WORD_PIECE, "pre_tokenizer": split("(" * 5_000 + ")" * 5_000)}, r"parse depth limit over"),
        ({**WORD_PIECE, "normalizer": CHARSMAP | {"precompiled_charsmap": "AAAA"}}, r"Cannot parse.*of `Precompiled`"),
        ({**WORD_PIECE, "normalizer": CHARSMAP | {"precompiled_charsmap": "BAAAAP////8A"}}, r"out of bounds"),
        (
            {**WORD_PIECE, "normalizer": CHARSMAP | {"precompiled_charsmap": "/" * 25 + "w=="}},
            r"took too much memory, or ended the process",
        ),
        (
            {
                **WORD_PIECE,
                "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 3_000_000},
            },
            r"took too much memory|didn't end within.*because of a long text",
        ),
        (
            {
                **WORD_PIECE,
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                },
            },
            r"no entry found.*an incomplete template",
        ),
        ({**WORD_PIECE, "pre_tokenizer": {"type": "FixedLength", "length": 0}}, r"chunk size must be non-zero"),
        ({**WORD_PIECE, "pre_tokenizer": {"type": ["Split"]}}, r"because of `\['Split'\]`"),
    ],
)
def test_a_bomb_is_refused_and_the_process_lives(tmp_path: Path, content: Any, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(FileError, match=rf"tokenizer\.json doesn't pass its trial.*({message})"):
        models.load_tokenizer(write(tmp_path, content))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model(BYTE_LEVEL, continuing_subword_prefix="#" * 10), r"tokenizer\.json has a tokenizer that fails"),
        ("[" * 100_000, r"tokenizer\.json: the file is JSON nested too deeply"),
        ('{"model": 1, "model": 2}', r"tokenizer\.json: the file has two entries named 'model'"),
        ('{"model": {"type": {}}}', r"tokenizer\.json"),
        ("[]", r"tokenizer\.json can't be read"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(FileError, match=message):
        models.load_tokenizer(write(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        model(WORD_PIECE, unk_token="[NONE]"),
        {
            **WORD_PIECE,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            },
        },
    ],
)
def test_what_only_a_text_shows_is_refused_when_it_shows(tmp_path: Path, content: Any) -> None:
    tokenizer = models.load_tokenizer(write(tmp_path, content))
    with (
        pytest.raises(FileError, match=r"the base has a tokenizer that fails \(.*\): its tables contradict"),
        module.refused_if_it_breaks_off("the base"),
    ):
        tokenizer.encode_batch(["日本"])


def test_a_pipe_in_its_place_is_refused(tmp_path: Path) -> None:
    import os

    write(tmp_path, WORD_PIECE)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FileError, match=r"tokenizer\.json is a pipe, and a regular file is expected"):
        models.load_tokenizer(tmp_path)
