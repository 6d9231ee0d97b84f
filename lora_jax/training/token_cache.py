"""Token ids on disk, by content: the same texts are tokenized once, whichever run needs them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_jax import files

from .data import Examples
from .encoding import Encoded, encode

if TYPE_CHECKING:
    import tokenizers

# Below so many characters tokenizing takes less than about a tenth of a second, and nothing is written.
_LEAST = 200_000
_VERSION = 1  # of what `encode` does and the file holds


def cache_folder() -> Path:
    """`$LORA_JAX_CACHE`, or `lora_jax` in the user's cache folder."""
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def encode_cached(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> Encoded:
    """As `encode`; the result of many texts is kept in `cache_folder()` and found again by a hash.

    The hash covers the texts, the tokenizer and `max_length`: a change of any of them is another entry. A file that
    cannot be read, or a folder that cannot be written, changes nothing but the time.
    """
    if sum(map(len, examples.texts)) + sum(map(len, examples.pairs or ())) < _LEAST:
        return encode(examples, tokenizer, max_length)
    # What an earlier call left set is no part of the tokenizer's content; `encode` sets both.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    path = cache_folder() / "tokens" / f"{_digest(examples, tokenizer, max_length)}.safetensors"
    if (found := _read(path)) is not None and found.rows == len(examples.texts):
        return found
    encoded = encode(examples, tokenizer, max_length)
    with contextlib.suppress(OSError, files.FileError):
        _write(path, encoded)
    return encoded


def _digest(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> str:
    digest = hashlib.sha256(f"{_VERSION} {max_length} {examples.pairs is None}\0".encode())
    digest.update(tokenizer.to_str().encode())
    for texts in (examples.texts, examples.pairs or ()):
        for text in texts:
            # Lengths, so that no two lists of texts join to the same bytes.
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read(path: Path) -> Encoded | None:
    try:
        held = files.read_safetensors(path)
        truncated, max_length = (int(number) for number in held["numbers"])
        encoded = Encoded(held["ids"], held["types"], held["offsets"], truncated, max_length)
    except (files.FileError, KeyError, ValueError):
        return None
    return encoded if encoded.offsets[-1] == len(encoded.ids) == len(encoded.types) else None


def _write(path: Path, encoded: Encoded) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.array([encoded.truncated, encoded.max_length])
    arrays = {"ids": encoded.ids, "types": encoded.types, "offsets": encoded.offsets, "numbers": numbers}
    files.write_safetensors(path, arrays)
