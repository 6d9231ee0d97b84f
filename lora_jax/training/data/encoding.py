"""Tokenizes labelled texts in bulk, and counts those that are truncated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_jax.models.checkpoint.tokenizer import refused_if_it_breaks_off

from ..examples import Examples

if TYPE_CHECKING:
    import tokenizers

_CHARACTERS = 32  # characters read for each token that may be kept; English has some five per token
_MOST_CHARACTERS = 1 << 20


class Encoded(NamedTuple):
    """Token ids of many texts, end to end.

    Attributes:
        ids: int32 `(tokens,)`.
        types: int32 `(tokens,)`; 1 in the second text of a pair.
        offsets: int64 `(rows + 1,)`; row `i` is `ids[offsets[i]:offsets[i + 1]]`.
        truncated: Number of sequences that were longer than `max_length`.
        max_length: Most tokens of a sequence.
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
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    def fingerprint(self) -> str:
        """A hash: a run only resumes on the data that it began with."""
        digest = hashlib.sha256()
        for array in (self.ids, self.types, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def encode(examples: Examples, tokenizer: tokenizers.Tokenizer, max_length: int) -> Encoded:
    """Tokenizes texts or pairs with special tokens. If a pair exceeds `max_length`, the longer text is cut first."""
    texts = examples.texts if examples.pairs is None else list(zip(examples.texts, examples.pairs, strict=True))
    beginnings = encode_beginnings(texts, tokenizer, max_length)
    encodings = [beginning.encoding for beginning in beginnings]
    lengths = [len(encoding.ids) for encoding in encodings]
    return Encoded(
        ids=_joined([encoding.ids for encoding in encodings]),
        types=_joined([encoding.type_ids for encoding in encodings]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        truncated=sum(beginning.is_cut for beginning in beginnings),
        max_length=max_length,
    )


class Beginning(NamedTuple):
    """The tokens that a text (or a pair) begins with, and whether there were more."""

    encoding: tokenizers.Encoding
    is_cut: bool


@refused_if_it_breaks_off("the base")
def encode_beginnings(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    tokenizer: tokenizers.Tokenizer,
    max_length: int,
    *,
    add_special_tokens: bool = True,
) -> list[Beginning]:
    """The result of `encode_batch` with truncation to `max_length` tokens, at a cost that doesn't grow with the texts.

    The first `_CHARACTERS` per token of a text are read. Up to `_MOST_CHARACTERS` are read if the kept tokens don't end
    in the first half of these (a word of thousands of characters), and for pairs, whose longer text is cut first.

    Args:
        texts: Texts, or pairs of them.
        tokenizer: Tokenizer, whose own truncation and padding are switched off.
        max_length: Most tokens to keep, special tokens included.
        add_special_tokens: Whether the tokenizer adds its special tokens.
    """
    # A tokenizer's file may ask for padding to a fixed length; batches are padded later, and less.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    limit = _CHARACTERS * max_length
    parts = [(text,) if isinstance(text, str) else text for text in texts]
    inputs = [_input([part[:limit] for part in each]) for each in parts]
    encodings = tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)
    beginnings = [Beginning(encoding, bool(encoding.overflowing)) for encoding in encodings]
    for place, each in enumerate(parts):
        longest = max(map(len, each))
        if longest <= limit:
            continue
        encoding = encodings[place]
        if len(each) > 1 or not _is_settled(encoding, limit):
            cut = _input(_cut(each, tokenizer, max_length))
            (encoding,) = tokenizer.encode_batch([cut], add_special_tokens=add_special_tokens)
        beginnings[place] = Beginning(encoding, bool(encoding.overflowing) or longest > _MOST_CHARACTERS)
    tokenizer.no_truncation()
    return beginnings


def _cut(parts: tuple[str, ...], tokenizer: tokenizers.Tokenizer, max_length: int) -> list[str]:
    """The beginning of a text, or of each text of a pair, with more than `max_length` tokens if there are more.

    The longer text of a pair stays the longer one, so that it is still the one to be cut.
    """
    tokenizer.no_truncation()
    encodings = [tokenizer.encode(part[:_MOST_CHARACTERS], add_special_tokens=False) for part in parts]
    tokenizer.enable_truncation(max_length)
    counts = [len(encoding.ids) for encoding in encodings]
    longer = 0 if counts[0] > counts[-1] else len(parts) - 1
    kept = [(3 if place == longer else 2) * max_length for place in range(len(parts))]
    return [
        part[: max(end for _, end in encoding.offsets[:most])] if count > most else part[:_MOST_CHARACTERS]
        for part, encoding, count, most in zip(parts, encodings, counts, kept, strict=True)
    ]


def _input(parts: list[str]) -> str | tuple[str, ...]:
    return tuple(parts) if len(parts) > 1 else parts[0]


def end_of(encoding: tokenizers.Encoding) -> int:
    """Where the tokens of a single text end in it, in characters."""
    return max((end for _, end in encoding.offsets), default=0)


def _is_settled(encoding: tokenizers.Encoding, limit: int) -> bool:
    """Whether the first `limit` characters of a text determine its tokens: a cut only changes the tokens next to it."""
    end = end_of(encoding)
    return end <= limit // 2 and any(end_of(other) > end for other in encoding.overflowing)


def padding_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The id for padding. It is masked everywhere, so any known id will do."""
    for token in ("[PAD]", "<pad>"):
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    return 0


def _joined(ids: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(each, np.int32) for each in ids])
