"""A cache of token ids on disk, keyed by content: texts are tokenized once for all runs."""

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
from .token_sequences import TokenSequences

if TYPE_CHECKING:
    import tokenizers

_LEAST = 200_000  # characters; fewer are tokenized in a tenth of a second and aren't cached
_VERSION = 1  # raised when `encode` gives other tokens or the file's format changes

Tokens = TypeVar("Tokens", Encoded, TokenSequences)


def cache_folder() -> Path:
    """`$LORA_JAX_CACHE`, or `lora_jax` in the user's cache folder."""
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def encode_cached(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> Encoded:
    """`encode`, with the result for many texts cached; see `cached`."""
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
    """The result of `make`, cached in `cache_folder()` if there are many texts.

    The key is a hash of the texts, the tokenizer and the settings. If the cache can't be read or written, the only loss
    is time.

    Args:
        kind: Type of the result, a named tuple of arrays and numbers with `offsets` into the arrays.
        texts, tokenizer: Texts and tokenizer that the tokens come from.
        settings: Everything else that the result depends on.
        make: Computes the result.
    """
    if sum(map(len, texts)) < _LEAST:
        return make()
    # Truncation and padding set by an earlier call must not change the key.
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
        # With the lengths, no two lists of texts give the same bytes.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read(path: Path, kind: type[Tokens]) -> Tokens | None:
    try:
        held = files.read_safetensors(path)
        if files.read_metadata(path).get(files.CHECKSUM) != _checksum(path, held):
            return None
        fields: dict[str, Any] = {name: int(value) if value.ndim == 0 else value for name, value in held.items()}
        tokens = kind(**fields)
        lengths = {len(value) for name, value in held.items() if value.ndim and name != "offsets"}
        return tokens if lengths == {int(tokens.offsets[-1])} else None
    except (files.FileError, KeyError, ValueError, TypeError, IndexError, OverflowError):
        return None


def _write(path: Path, tokens: Encoded | TokenSequences) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in tokens._asdict().items()}
    files.write_safetensors(path, arrays, {files.CHECKSUM: _checksum(path, arrays)})


def _checksum(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """A checksum of an entry's content and key."""
    return f"{path.stem} {files.array_checksum(arrays)}"
