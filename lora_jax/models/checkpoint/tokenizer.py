"""The tokenizer of a base model, and its special tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from lora_jax.files import FileError, parse_json, read_bytes, read_json, read_text, within_folder
from lora_jax.text import clipped

from .hub import find_base

_PROGRAM = Path(__file__).with_name("tokenizer_trial.py")
_LARGEST = 2**28  # bytes of a file; the largest vocabularies known take some 35 MB
_LARGEST_TEMPLATE = 2**20
# Of a trial: what it may take of the time and the memory, and what more for each byte of the file. The largest
# vocabularies known, of some 35 MB, take 3 s and 0.8 GB.
_SECONDS, _SECONDS_PER_BYTE = 10.0, 1e-6
_MEMORY, _MEMORY_PER_BYTE = 2**30, 40
_LONGEST = 200  # characters of a text that is put in
_LONGEST_WORD = 1_000  # characters of a word that is looked up: the time grows with their square

# What takes time and memory in proportion to the text, whatever the file says.
_PLAIN = frozenset(
    (
        *("BPE", "Unigram", "WordLevel", "WordPiece", "Sequence"),
        *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip", "StripAccents"),
        *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"),
        *("Whitespace", "WhitespaceSplit", "BertProcessing", "RobertaProcessing", "TemplateProcessing"),
        *("BPEDecoder", "ByteFallback", "Fuse"),
    )
)
# How GPT-2, Llama 3 and Qwen split; each of these expressions ends where it began or goes forward.
_EXPRESSIONS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)
_PASSED: set[str] = set()  # digests of what has passed its trial: once a process is enough


def load_tokenizer(source: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads `tokenizer.json` of a base model.

    A file of plain parts, such as those of BERT, GPT-2, Llama 3 and Qwen, is loaded at once. One with a regular
    expression of its own, a compiled table of characters or a part that isn't known here is first loaded in a process
    with a limit of time and memory, where it has to split texts that are hard for such expressions; that takes a
    fraction of a second, once. It is a trial and no proof: an expression may still take long for a text that it was
    made for.

    Args:
        source: as for `lora_jax.models.load`.

    Returns:
        The tokenizer, without the padding and the truncation that the file may hold: batching decides those. (The
        default base's file pads every text to 128 tokens.)

    Raises:
        FileError: no such model, it has no readable `tokenizer.json`, one that doesn't pass its trial, or one whose ids
            reach beyond the rows of the embeddings, by `vocab_size` in `config.json`.
    """
    folder = find_base(source)
    path = within_folder(folder, "tokenizer.json")
    if not path.exists():
        raise FileError(
            f"{path} doesn't exist. Write it with transformers: "
            "`AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)`."
        )
    data = read_bytes(path, max_bytes=_LARGEST)
    content = parse_json(data, f"{path}: the file")
    if unknown := _unknown_parts(content):
        _try(path, data, unknown, _expressions(content))
    with refused_if_it_breaks_off(path):
        try:
            tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:
            raise FileError(
                f"{path} is no tokenizer that `tokenizers` {tokenizers.__version__} can read: {clipped(error)}"
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
    _check_ids(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """A token without a row in the embeddings would be looked up all the same, and make NaN of a whole text."""
    rows = _vocabulary_size(folder)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if rows is None or max(ids.values(), default=0) < rows:
        return
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    some = ", ".join(f"{token!r:.40} {number:,}" for number, token in beyond[:3])
    raise FileError(
        f"{folder}: the ids of tokenizer.json reach {beyond[-1][0]:,}, and the embeddings have {rows:,} rows "
        f"(`vocab_size` in config.json): no row for {len(beyond):,} tokens ({some}{', …' if len(beyond) > 3 else ''}). "
        "Take the tokenizer that belongs to the model; for tokens that were added, save the model with its embeddings "
        "resized (`model.resize_token_embeddings(len(tokenizer))` in transformers)."
    )


def _vocabulary_size(folder: Path) -> int | None:
    size = _read_object(folder / "config.json").get("vocab_size")
    return size if type(size) is int else None


def special_texts(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """How a tokenizer's special tokens are spelled: it takes these for control tokens wherever a text has them."""
    return tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


@contextlib.contextmanager
def refused_if_it_breaks_off(what: object) -> Iterator[None]:
    """Around calls of a tokenizer: what it breaks off with is no `Exception`, and would end a command unexplained.

    Args:
        what: the tokenizer, for the message.

    Raises:
        FileError: the tokenizer broke off.
    """
    try:
        yield
    except BaseException as error:
        # Rust's `PanicException` can't be imported; what the package raises of its own is a bare `Exception`.
        if type(error).__module__ != "pyo3_runtime" and type(error) is not Exception:
            raise
        raise FileError(
            f"{what} has a tokenizer that breaks off ({clipped(error)}): its tables contradict each other. Fetch the "
            "model again, or use another."
        ) from None


def _try(path: Path, data: bytes, unknown: list[str], expressions: list[str]) -> None:
    """Raises `FileError` unless the tokenizer passes a trial in a process of its own."""
    if (digest := hashlib.sha256(data).hexdigest()) in _PASSED:
        return
    settings = {"memory": _MEMORY + _MEMORY_PER_BYTE * len(data), "expressions": expressions}
    seconds = _SECONDS + _SECONDS_PER_BYTE * len(data)
    # -P: what lies beside the program can't stand in for a library.
    command = [sys.executable, "-P", str(_PROGRAM)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        output, _ = process.communicate(json.dumps(settings).encode() + b"\n" + data, timeout=seconds)
        problem = json.loads(output or b'{"error": "it took too much memory, or ended the process"}').get("error")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        problem = f"it didn't end within {seconds:.0f} s"
    if problem is not None:
        raise FileError(
            f"{path} doesn't pass its trial, in which it has to split some texts within limits of time and memory: "
            f"{clipped(problem, 400)}. It was tried because of {', '.join(unknown[:4])}. Use a model that you trust."
        )
    _PASSED.add(digest)


def _unknown_parts(content: Any) -> list[str]:
    """What of a `tokenizer.json` may take more than its share of time or memory, or break off."""
    if not isinstance(content, dict):
        return []
    unknown: dict[str, None] = {}
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for part in _objects(content.get(name)):
            if "type" in part and not _is_plain(part["type"]):
                unknown[f"`{clipped(part['type'], 40)}`"] = None
            if "Regex" in part and not (isinstance(part["Regex"], str) and part["Regex"] in _EXPRESSIONS):
                unknown["a regular expression of its own"] = None
            if any(isinstance(value, str) and len(value) > _LONGEST for key, value in part.items() if key != "Regex"):
                unknown["a long text"] = None
            if part.get("type") == "TemplateProcessing" and not _is_whole(part):
                unknown["an incomplete template"] = None
    model = content.get("model")
    if isinstance(model, dict):
        if not _is_plain(model.get("type", "BPE")):
            unknown[f"`{clipped(model['type'], 40)}`"] = None
        if not _is_small(model.get("max_input_chars_per_word", 100)):
            unknown["`max_input_chars_per_word`"] = None
    return list(unknown)


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _PLAIN


def _is_small(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LONGEST_WORD


def _is_whole(template: dict[str, Any]) -> bool:
    """Whether each special token that a template puts in is one that it describes."""
    described = template.get("special_tokens")
    used = [part["SpecialToken"] for part in _objects(template) if isinstance(part.get("SpecialToken"), dict)]
    return isinstance(described, dict) and all(str(token.get("id")) in described for token in used)


def _expressions(content: Any) -> list[str]:
    return [part["Regex"] for part in _objects(content) if isinstance(part.get("Regex"), str)]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in JSON; not recursive, since what comes from elsewhere may be deep."""
    left = [value]
    while left:
        entry = left.pop()
        if isinstance(entry, dict):
            yield entry
            left.extend(entry.values())
        elif isinstance(entry, list):
            left.extend(entry)


class SpecialTokens(NamedTuple):
    """What a base's folder says of its special tokens.

    Attributes:
        texts: `{"bos_token": "<s>", "eos_token": "</s>", …}`, as a chat template sees them.
        end: the id of the end-of-text.
        stops: ids that end a generated text, `end` among them.
        chat_template: in Jinja; `None` where the base has none.
        added: How all special tokens are spelled that the tokenizer finds in a text, named ones or not.
    """

    texts: dict[str, str]
    end: int
    stops: tuple[int, ...]
    chat_template: str | None
    added: tuple[str, ...] = ()


_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_special_tokens(source: str | os.PathLike[str]) -> SpecialTokens:
    """Reads the special tokens of a decoder's folder, and its chat template.

    The end-of-text is `eos_token` in `tokenizer_config.json` (or `special_tokens_map.json`), else the first
    `eos_token_id` in `generation_config.json` or `config.json`. A generated text ends with any of these. The template
    is `chat_template.jinja`, else the (default) one in `tokenizer_config.json`.

    Args:
        source: as for `lora_jax.models.load`.

    Raises:
        FileError: a malformed file, or no end-of-text at all.
    """
    folder = find_base(source)
    tokenizer = load_tokenizer(source)
    settings = _read_object(folder / "tokenizer_config.json")
    named = _read_object(folder / "special_tokens_map.json") | settings
    texts = {name: text for name in _NAMES if (text := _text_of(named.get(name))) is not None}

    stops: list[int] = []
    if (end := tokenizer.token_to_id(texts.get("eos_token", ""))) is not None:
        stops.append(end)
    for file in ("generation_config.json", "config.json"):
        ids = _read_object(folder / file).get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            if type(number) is int:
                if not 0 <= number < 2**31:
                    raise FileError(f"{folder / file}: `eos_token_id` can't be {clipped(number, 40)}.")
                stops.append(number)
    if not stops:
        raise FileError(
            f"{folder} names no end-of-text: neither `eos_token` in tokenizer_config.json nor `eos_token_id` in "
            "config.json. Add one."
        )
    if (rows := _vocabulary_size(folder)) is not None and stops[0] >= rows:
        raise FileError(
            f"{folder}: `eos_token_id` is {stops[0]:,}, and the embeddings have {rows:,} rows (`vocab_size` in "
            "config.json). Name the end-of-text that the tokenizer has."
        )
    texts.setdefault("eos_token", tokenizer.id_to_token(stops[0]) or "")
    template = _chat_template(folder, settings)
    return SpecialTokens(texts, stops[0], tuple(dict.fromkeys(stops)), template, special_texts(tokenizer))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, max_bytes=_LARGEST_TEMPLATE)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} must be a JSON object, and is a {type(content).__name__}.")
    return content


def _text_of(token: Any) -> str | None:
    """A token as it stands in the files: a text, or an object that holds one."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
