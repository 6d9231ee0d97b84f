"""Token ids on disk, by content: the same texts are tokenized once, whichever run needs them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_jax import files

from ..examples import Examples
from .encoding import Encoded, encode

if TYPE_CHECKING:
    import tokenizers

# Below so many characters tokenizing takes less than about a tenth of a second, and nothing is written.
_LEAST = 200_000
_VERSION = 1  # of what `encode` does and the file holds

Tokens = TypeVar("Tokens", bound=Any)


def cache_folder() -> Path:
    """`$LORA_JAX_CACHE`, or `lora_jax` in the user's cache folder."""
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def encode_cached(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> Encoded:
    """As `encode`; the result of many texts is kept, see `cached`."""
    return cached(
        kind=Encoded,
        texts=[*examples.texts, *(examples.pairs or ())],
        tokenizer=tokenizer,
        settings=f"{_VERSION} {max_length} {examples.pairs is None}"
        + (" escaped" if tokenizer.encode_special_tokens else ""),
        make=lambda: encode(examples, tokenizer, max_length),
    )


def cached(
    *,
    kind: type[Tokens],
    texts: Sequence[str],
    tokenizer: tokenizers.Tokenizer,
    settings: str,
    make: Callable[[], Tokens],
) -> Tokens:
    """What `make` gives of the texts; that of many texts is kept in `cache_folder()` and found again by a hash.

    The hash covers the texts, the tokenizer and the settings: a change of any of them is another entry. A file that
    cannot be read, or a folder that cannot be written, changes nothing but the time.

    Args:
        kind: a named tuple of arrays and numbers, with `offsets` into the others.
        texts, tokenizer: what tokens are made of.
        settings: all else that the result depends on.
        make: makes it.
    """
    if sum(map(len, texts)) < _LEAST:
        return make()
    # What an earlier call left set is no part of the tokenizer's content.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    path = cache_folder() / "tokens" / f"{_digest(texts, tokenizer, settings)}.safetensors"
    if (found := _read(path, kind)) is not None:
        return found
    made = make()
    with contextlib.suppress(OSError, files.FileError):
        _write(path, made)
    return made


def _digest(texts: Sequence[str], tokenizer: tokenizers.Tokenizer, settings: str) -> str:
    digest = hashlib.sha256(f"{settings}\0".encode())
    digest.update(tokenizer.to_str().encode())
    for text in texts:
        # Lengths, so that no two lists of texts join to the same bytes.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read(path: Path, kind: type[Tokens]) -> Tokens | None:
    try:
        held = files.read_safetensors(path)
        if files.read_metadata(path).get(files.CHECKSUM) != _checksum(path, held):
            return None
        fields = {name: int(value) if value.ndim == 0 else value for name, value in held.items()}
        tokens = kind(**fields)
        lengths = {len(value) for name, value in held.items() if value.ndim and name != "offsets"}
        return tokens if lengths == {int(tokens.offsets[-1])} else None
    except (files.FileError, KeyError, ValueError, TypeError, IndexError, OverflowError):
        return None


def _write(path: Path, tokens: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in tokens._asdict().items()}
    files.write_safetensors(path, arrays, {files.CHECKSUM: _checksum(path, arrays)})


def _checksum(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Of an entry's content, and of what it is the entry of."""
    return f"{path.stem} {files.array_checksum(arrays)}"
