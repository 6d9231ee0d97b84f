"""Texts to token ids: once, in bulk, with what is cut off counted."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_jax.models.tokenizer import refused_if_it_breaks_off

from .data import Examples

if TYPE_CHECKING:
    import tokenizers


class Encoded(NamedTuple):
    """Token ids of many texts, end to end.

    Attributes:
        ids: int32 `(tokens,)`.
        types: int32 `(tokens,)`, 1 in the second text of a pair.
        offsets: int64 `(rows + 1,)`; row `i` is `ids[offsets[i]:offsets[i + 1]]`.
        truncated: how many rows were longer than `max_length` and lost their end.
        max_length: the most tokens of a row.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    truncated: int
    max_length: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def fingerprint(self) -> str:
        """A hash of the rows: a run resumes on the data that it began with, or not at all."""
        digest = hashlib.sha256()
        for array in (self.ids, self.types, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def encode(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> Encoded:
    """Tokenizes every row with its special tokens, cutting the longer text first where a row exceeds `max_length`."""
    # The tokenizer's file may pad every text to a fixed length: batches are padded later, and less.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    inputs = examples.texts if examples.pairs is None else list(zip(examples.texts, examples.pairs, strict=True))
    with refused_if_it_breaks_off("the base"):
        encodings = tokenizer.encode_batch(inputs)
    lengths = [len(encoding.ids) for encoding in encodings]
    return Encoded(
        ids=_joined([encoding.ids for encoding in encodings]),
        types=_joined([encoding.type_ids for encoding in encodings]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        truncated=sum(bool(encoding.overflowing) for encoding in encodings),
        max_length=max_length,
    )


def padding_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The id that rows are filled up with; masked everywhere, so any known one does."""
    for token in ("[PAD]", "<pad>"):
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    return 0


def _joined(rows: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.int32) for row in rows])
