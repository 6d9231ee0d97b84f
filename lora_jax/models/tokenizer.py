"""The tokenizer of a base model."""

from __future__ import annotations

import os

import tokenizers

from ..files import FileError
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
    path = find_base(source) / "tokenizer.json"
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
