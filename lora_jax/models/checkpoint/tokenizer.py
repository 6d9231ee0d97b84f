"""Loads the tokenizer of a base model and its special tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from lora_jax.files import FileError, parse_json, read_bytes, read_json, read_text, within_folder
from lora_jax.text import clipped

from .hub import find_base

_PROGRAM = Path(__file__).with_name("tokenizer_trial.py")
_LARGEST = 2**28  # bytes of a file; the largest known vocabularies take about 35 MB
_LARGEST_TEMPLATE = 2**20
# Limits of a trial, fixed and per byte of the file. The largest known vocabularies, of about 35 MB, take 3 s and
# 0.8 GB.
_SECONDS, _SECONDS_PER_BYTE = 10.0, 1e-6
_MEMORY, _MEMORY_PER_BYTE = 2**30, 40
_LONGEST = 200  # characters of an inserted text
_LONGEST_WORD = 1_000  # characters of a word that is looked up: the time grows with their square

# Parts whose time and memory are proportional to the text, whatever their settings.
_PLAIN = frozenset(
    (
        *("BPE", "Unigram", "WordLevel", "WordPiece", "Sequence"),
        *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip", "StripAccents"),
        *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"),
        *("Whitespace", "WhitespaceSplit", "BertProcessing", "RobertaProcessing", "TemplateProcessing"),
        *("BPEDecoder", "ByteFallback", "Fuse"),
    )
)
# The patterns by which GPT-2, Llama 3 and Qwen split; none of them backtracks.
_EXPRESSIONS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)
_PASSED: set[str] = set()  # digests of files that have passed their trial in this process


def load_tokenizer(source: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads a base model's `tokenizer.json`.

    A file made of known parts, such as those of BERT, GPT-2, Llama 3 and Qwen, is loaded directly. A file with a
    regular expression of its own, a compiled character table or an unknown part is first loaded in another process,
    with limits on time and memory, which tokenizes texts that are hard for such expressions. This takes a fraction of a
    second, once. It is a trial, not a proof: an expression may still be slow for a text made to exploit it.

    Args:
        source: Folder, hub name or alias, as for `lora_jax.models.load`.

    Returns:
        The tokenizer, without the padding and truncation set in the file: batching decides those. (The default base's
        file pads every text to 128 tokens.)

    Raises:
        FileError: There is no such model, or its `tokenizer.json` can't be read, doesn't pass its trial, or has ids
            beyond the rows of the embeddings, by `vocab_size` in `config.json`.
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
                f"{path} can't be read by `tokenizers` {tokenizers.__version__}: {clipped(error)}"
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
    _check_ids(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Checks that each token has a row in the embeddings; a lookup outside them would turn the whole text to NaN."""
    rows = _vocabulary_size(folder)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if rows is None or max(ids.values(), default=0) < rows:
        return
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    some = ", ".join(f"{token!r:.40} {number:,}" for number, token in beyond[:3])
    raise FileError(
        f"{folder}: tokenizer.json has ids up to {beyond[-1][0]:,}, but the embeddings have {rows:,} rows "
        f"(`vocab_size` in config.json): no row for {len(beyond):,} tokens ({some}{', …' if len(beyond) > 3 else ''}). "
        "Use the tokenizer that belongs to the model; if tokens were added, save the model with its embeddings "
        "resized (`model.resize_token_embeddings(len(tokenizer))` in transformers)."
    )


def _vocabulary_size(folder: Path) -> int | None:
    size = _read_object(folder / "config.json").get("vocab_size")
    return size if type(size) is int else None


def special_texts(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The spellings of a tokenizer's special tokens, which it recognizes anywhere in a text."""
    return tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


@contextlib.contextmanager
def refused_if_it_breaks_off(what: object) -> Iterator[None]:
    """A context for calls of a tokenizer that turns a panic in its Rust code, which is no `Exception`, into an error.

    Args:
        what: Name of the tokenizer for the message.

    Raises:
        FileError: The tokenizer panicked.
    """
    try:
        yield
    except BaseException as error:
        # Rust's `PanicException` can't be imported; the package's own errors are bare `Exception`s.
        if type(error).__module__ != "pyo3_runtime" and type(error) is not Exception:
            raise
        raise FileError(
            f"{what} has a tokenizer that fails ({clipped(error)}): its tables contradict each other. Download the "
            "model again, or use another."
        ) from None


def _try(path: Path, data: bytes, unknown: list[str], expressions: list[str]) -> None:
    """Raises `FileError` unless the tokenizer passes a trial in a process of its own."""
    if (digest := hashlib.sha256(data).hexdigest()) in _PASSED:
        return
    settings = {"memory": _MEMORY + _MEMORY_PER_BYTE * len(data), "expressions": expressions}
    seconds = _SECONDS + _SECONDS_PER_BYTE * len(data)
    # With -P, files beside the program can't shadow a library.
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
            f"{path} doesn't pass its trial, which tokenizes some texts within limits on time and memory: "
            f"{clipped(problem, 400)}. The trial was needed because of {', '.join(unknown[:4])}. Use a trusted model."
        )
    _PASSED.add(digest)


def _unknown_parts(content: object) -> list[str]:
    """Parts of a `tokenizer.json` that may take excessive time or memory, or panic."""
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


def _is_plain(part_type: object) -> bool:
    return isinstance(part_type, str) and part_type in _PLAIN


def _is_small(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LONGEST_WORD


def _is_whole(template: dict[str, object]) -> bool:
    """Whether the template describes each special token that it inserts."""
    described = template.get("special_tokens")
    used = (part.get("SpecialToken") for part in _objects(template))
    return isinstance(described, dict) and all(
        str(token.get("id")) in described for token in used if isinstance(token, dict)
    )


def _expressions(content: object) -> list[str]:
    expressions = (part.get("Regex") for part in _objects(content))
    return [expression for expression in expressions if isinstance(expression, str)]


def _objects(value: object) -> Iterator[dict[str, object]]:
    """Every object in JSON; not recursive, since untrusted JSON may be deeply nested."""
    left = [value]
    while left:
        entry = left.pop()
        if isinstance(entry, dict):
            yield entry
            left.extend(entry.values())
        elif isinstance(entry, list):
            left.extend(entry)


class SpecialTokens(NamedTuple):
    """The special tokens of a base.

    Attributes:
        texts: Spellings by name, `{"bos_token": "<s>", "eos_token": "</s>", …}`, as a chat template receives them.
        end: Id of the end-of-text token.
        stops: Ids that end a generated text, including `end`.
        chat_template: Jinja template; `None` if the base has none.
        added: Spellings of all special tokens that the tokenizer recognizes in a text, whether they have a name or not.
    """

    texts: dict[str, str]
    end: int
    stops: tuple[int, ...]
    chat_template: str | None
    added: tuple[str, ...] = ()


_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_special_tokens(source: str | os.PathLike[str]) -> SpecialTokens:
    """Reads a decoder's special tokens and chat template.

    The end-of-text token is `eos_token` in `tokenizer_config.json` (or `special_tokens_map.json`), otherwise the first
    `eos_token_id` in `generation_config.json` or `config.json`. Any of these ends a generated text. The template is
    `chat_template.jinja`, otherwise the (default) one in `tokenizer_config.json`.

    Args:
        source: Folder, hub name or alias, as for `lora_jax.models.load`.

    Raises:
        FileError: A file is malformed, or none names an end-of-text token.
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
                    raise FileError(f"{folder / file}: `eos_token_id` must be a token, got {clipped(number, 40)}.")
                stops.append(number)
    if not stops:
        raise FileError(
            f"{folder} has no end-of-text token: add `eos_token` to tokenizer_config.json or `eos_token_id` to "
            "config.json."
        )
    if (rows := _vocabulary_size(folder)) is not None and stops[0] >= rows:
        raise FileError(
            f"{folder}: `eos_token_id` must be less than `vocab_size` in config.json, {rows:,}, got {stops[0]:,}: use "
            "the id of the tokenizer's end-of-text token."
        )
    texts.setdefault("eos_token", tokenizer.id_to_token(stops[0]) or "")
    template = _chat_template(folder, settings)
    return SpecialTokens(texts, stops[0], tuple(dict.fromkeys(stops)), template, special_texts(tokenizer))


def _chat_template(folder: Path, settings: dict[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, max_bytes=_LARGEST_TEMPLATE)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} must be a JSON object, got {type(content).__name__}.")
    return content


def _text_of(token: object) -> str | None:
    """The spelling of a token, which is a string in the files or an object with one."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
