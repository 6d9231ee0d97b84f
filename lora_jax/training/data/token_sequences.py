"""Token sequences for a language model, with the tokens to be predicted marked; packing and batching of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .batching import BatchPlan
from .packing import first_fit

_MOST_TOKENS = 2048  # in an evaluation batch, since each token has a logit for every entry of the vocabulary


class TokenBatch(NamedTuple):
    """One batch, on the host; a pytree of `(size, length)` arrays.

    Attributes:
        input_ids: int32.
        segments: int32; number of the text that a token belongs to, from 1 in each sequence; 0 for padding.
        targets: int32; the next token.
        weights: float32; 1 if the next token is to be predicted. A copy that fills the batch has none.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Arguments of the model's apply. Padding needs no mask, since it is a segment of its own."""
        return {"input_ids": self.input_ids, "segments": self.segments}

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding and filling."""
        return int((self.segments[self.weights.any(axis=1)] > 0).sum())


class SingleTextBatch(TokenBatch):
    """Rows of one text each, padded at their ends: none of its tokens looks at padding, so the model needs no segments.

    Attention then knows without looking at numbers what each token attends to, which a fused kernel needs to be fast.
    """

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"input_ids": self.input_ids}


class TokenSequences(NamedTuple):
    """Token ids of many sequences, end to end; `Sequences` of `batching`.

    Attributes:
        ids: int32 `(tokens,)`.
        targets: bool `(tokens,)`; whether a token is to be predicted from those before it.
        segments: int32 `(tokens,)`; number of the text that a token belongs to, from 1 in each sequence.
        offsets: int64 `(rows + 1,)`; row `i` is `ids[offsets[i]:offsets[i + 1]]`.
        texts: Number of texts.
        truncated: Number of texts that were longer than `max_length`.
        dropped: Number of truncated texts that kept no token to be predicted and are left out.
        max_length: Most tokens of a sequence.
    """

    ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    offsets: np.ndarray
    texts: int
    truncated: int
    dropped: int
    max_length: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def largest_batch(self) -> int:
        """Most sequences in an evaluation batch."""
        return max(1, _MOST_TOKENS // int(self.lengths.max()))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.targets, self.segments, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def notes(self, split: str) -> list[str]:
        """Notes on truncated and dropped texts."""
        notes = []
        if self.truncated:
            notes.append(f"{split}: {self.truncated:,} of {self.texts:,} texts truncated to {self.max_length} tokens")
        if self.dropped:
            notes.append(
                f"{split}: {self.dropped:,} of {self.texts:,} texts left out: every token to be predicted lies "
                f"beyond the first {self.max_length}"
            )
        return notes

    def describe(self) -> str:
        packed = "" if self.num_sequences >= self.texts - self.dropped else f" of {self.texts - self.dropped:,} texts"
        return f"{self.num_sequences:,} sequences{packed}"

    def batch(self, plan: BatchPlan, size: int) -> TokenBatch:
        """The sequences of a plan, padded to its length, with copies of weight 0 to fill the batch."""
        shape = (size, plan.length)
        ids, segments, targets = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for i, index in enumerate(np.resize(plan.indices, size)):
            start, end = self.offsets[index], self.offsets[index + 1]
            ids[i, : end - start] = self.ids[start:end]
            segments[i, : end - start] = self.segments[start:end]
            targets[i, : end - start - 1] = self.ids[start + 1 : end]
            if i < len(plan.indices):
                weights[i, : end - start - 1] = self.targets[start + 1 : end]
        kind = TokenBatch if self.segments.max(initial=0) > 1 else SingleTextBatch
        return kind(ids, segments, targets, weights)

    def packed(self, *, seed: int) -> TokenSequences:
        """Sequences of several texts each, by first-fit over a shuffle. No text is split."""
        order = np.random.default_rng((seed, 1)).permutation(self.num_sequences)
        groups = [order[group] for group in first_fit(self.lengths[order].tolist(), self.max_length)]
        bounds = self.offsets.tolist()
        places = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for group in groups for i in group])
        segments = [np.repeat(np.arange(1, len(group) + 1, dtype=np.int32), self.lengths[group]) for group in groups]
        return self._replace(
            ids=self.ids[places],
            targets=self.targets[places],
            segments=np.concatenate(segments),
            offsets=np.concatenate([[0], np.cumsum([len(own) for own in segments])]).astype(np.int64),
        )


def make_sequences(texts: Sequence[tuple[np.ndarray, np.ndarray]], max_length: int, *, chunk: bool) -> TokenSequences:
    """One sequence per text, or several if it is cut into chunks.

    Args:
        texts: Ids and targets of each text.
        max_length: Most tokens of a sequence.
        chunk: Whether a longer text is cut into chunks, each of which begins with the last token of the one before so
            that every token is predicted once. Otherwise it is truncated.
    """
    sequences: list[tuple[np.ndarray, np.ndarray]] = []
    truncated = dropped = 0
    for ids, targets in texts:
        if chunk:
            starts = range(0, max(len(ids) - 1, 1), max_length - 1)
            parts = [(ids[start : start + max_length], targets[start : start + max_length]) for start in starts]
        else:
            truncated += len(ids) > max_length
            parts = [(ids[:max_length], targets[:max_length])]
        # The first token of a sequence has nothing before it.
        kept = [(part, flags) for part, flags in parts if flags[1:].any()]
        dropped += not kept
        sequences += kept
    return TokenSequences(
        ids=np.concatenate([ids for ids, _ in sequences]) if sequences else np.zeros(0, np.int32),
        targets=np.concatenate([_without_first(flags) for _, flags in sequences]) if sequences else np.zeros(0, bool),
        segments=np.ones(sum(len(ids) for ids, _ in sequences), np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in sequences])]).astype(np.int64),
        texts=len(texts),
        truncated=truncated,
        dropped=dropped,
        max_length=max_length,
    )


def _without_first(targets: np.ndarray) -> np.ndarray:
    targets = targets.astype(bool)
    targets[:1] = False
    return targets
