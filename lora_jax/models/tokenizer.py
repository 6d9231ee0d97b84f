"""The tokenizer of a base model, and its special tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from ..files import FileError, read_json, within_folder
from .hub import find_base


def load_tokenizer(source: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads `tokenizer.json` of a base model.

    Args:
        source: as for `lora_jax.models.load`.

    Returns:
        The tokenizer, without the padding and the truncation that the file may hold: batching decides those. (The
        default base's file pads every text to 128 tokens.)

    Raises:
        FileError: no such model, or it has no readable `tokenizer.json`.
    """
    path = within_folder(find_base(source), "tokenizer.json")
    if not path.is_file():
        raise FileError(
            f"{path} doesn't exist. Write it with transformers: "
            "`AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)`."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises a bare `Exception`
        raise FileError(
            f"{path} is no tokenizer that `tokenizers` {tokenizers.__version__} can read: {error}"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class SpecialTokens(NamedTuple):
    """What a base's folder says of its special tokens.

    Attributes:
        texts: `{"bos_token": "<s>", "eos_token": "</s>", …}`, as a chat template sees them.
        end: the id of the end-of-text.
        stops: ids that end a generated text, `end` among them.
        chat_template: in Jinja; `None` where the base has none.
    """

    texts: dict[str, str]
    end: int
    stops: tuple[int, ...]
    chat_template: str | None


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
        stops += [number for number in (ids if isinstance(ids, list) else [ids]) if type(number) is int]
    if not stops:
        raise FileError(
            f"{folder} names no end-of-text: neither `eos_token` in tokenizer_config.json nor `eos_token_id` in "
            "config.json. Add one."
        )
    texts.setdefault("eos_token", tokenizer.id_to_token(stops[0]) or "")
    return SpecialTokens(texts, stops[0], tuple(dict.fromkeys(stops)), _chat_template(folder, settings))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path} can't be read as text: {error}") from error
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
