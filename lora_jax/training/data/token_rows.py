"""Rows of tokens for a language model: which of them are to be predicted, and which texts share a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .batching import BatchPlan
from .packing import first_fit

# Of a batch in evaluation: each has as many logits as the vocabulary.
_MOST_TOKENS = 2048


class TokenBatch(NamedTuple):
    """One batch, on the host; a pytree of `(size, length)` arrays.

    Attributes:
        input_ids: int32.
        segments: int32: the text that a token belongs to, from 1 on in each row; 0 at padding.
        targets: int32: the token that follows.
        weights: float32: 1 where that one is to be predicted. A row that only fills the batch up has none.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What the model's apply takes. Padding needs no mask: it is a segment of its own."""
        return {"input_ids": self.input_ids, "segments": self.segments}

    @property
    def tokens(self) -> int:
        """Of the batch's own rows, without padding."""
        return int((self.segments[self.weights.any(axis=1)] > 0).sum())


class SingleTextBatch(TokenBatch):
    """Rows of one text each, padded at their ends: none of its tokens looks at padding, so the model needs no segments.

    Attention then knows without looking at numbers what each token attends to, which a fused kernel needs to be fast.
    """

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"input_ids": self.input_ids}


class TokenRows(NamedTuple):
    """Rows of token ids, end to end.

    Attributes:
        ids: int32 `(tokens,)`.
        targets: bool `(tokens,)`: whether the token is to be predicted from those before it.
        segments: int32 `(tokens,)`: the text that it belongs to, from 1 on in each row.
        offsets: int64 `(rows + 1,)`; row `i` is `ids[offsets[i]:offsets[i + 1]]`.
        texts: how many there were.
        truncated: how many lost their end, being longer than `max_length`.
        dropped: how many of these lost all that was to be predicted, and are left out.
        max_length: the most tokens of a row.
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
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def largest_batch(self) -> int:
        """Rows that are evaluated at once."""
        return max(1, _MOST_TOKENS // int(self.lengths.max()))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.targets, self.segments, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def notes(self, split: str) -> list[str]:
        """What was lost, in words."""
        notes = []
        if self.truncated:
            notes.append(f"{split}: {self.truncated:,} of {self.texts:,} texts cut at {self.max_length} tokens")
        if self.dropped:
            notes.append(
                f"{split}: {self.dropped:,} of {self.texts:,} texts left out: all that was to be predicted lay "
                f"beyond {self.max_length} tokens"
            )
        return notes

    def describe(self) -> str:
        packed = "" if self.rows >= self.texts - self.dropped else f" of {self.texts - self.dropped:,} texts"
        return f"{self.rows:,} rows{packed}"

    def batch(self, plan: BatchPlan, size: int) -> TokenBatch:
        """The rows of a plan, padded to its length, and copies of weight 0 to fill the batch up."""
        shape = (size, plan.length)
        ids, segments, targets = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for i, row in enumerate(np.resize(plan.rows, size)):
            start, end = self.offsets[row], self.offsets[row + 1]
            ids[i, : end - start] = self.ids[start:end]
            segments[i, : end - start] = self.segments[start:end]
            targets[i, : end - start - 1] = self.ids[start + 1 : end]
            if i < len(plan.rows):
                weights[i, : end - start - 1] = self.targets[start + 1 : end]
        kind = TokenBatch if self.segments.max(initial=0) > 1 else SingleTextBatch
        return kind(ids, segments, targets, weights)

    def packed(self, *, seed: int) -> TokenRows:
        """Rows of several texts, by first-fit over a shuffle; no text is split."""
        order = np.random.default_rng((seed, 1)).permutation(self.rows)
        rows = [order[row] for row in first_fit(self.lengths[order].tolist(), self.max_length)]
        bounds = self.offsets.tolist()
        places = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for row in rows for i in row])
        segments = [np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), self.lengths[row]) for row in rows]
        return self._replace(
            ids=self.ids[places],
            targets=self.targets[places],
            segments=np.concatenate(segments),
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in segments])]).astype(np.int64),
        )


def make_rows(texts: Sequence[tuple[np.ndarray, np.ndarray]], max_length: int, *, chunk: bool) -> TokenRows:
    """One row a text, or more where it is cut into chunks.

    Args:
        texts: ids and targets of each.
        max_length: the most tokens of a row.
        chunk: whether a longer text goes on in rows of its own, each beginning with the last token of the one before,
            so that every token is predicted once; otherwise its end is cut off.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    truncated = dropped = 0
    for ids, targets in texts:
        if chunk:
            starts = range(0, max(len(ids) - 1, 1), max_length - 1)
            parts = [(ids[start : start + max_length], targets[start : start + max_length]) for start in starts]
        else:
            truncated += len(ids) > max_length
            parts = [(ids[:max_length], targets[:max_length])]
        # The first token of a row has nothing before it.
        kept = [(part, flags) for part, flags in parts if flags[1:].any()]
        dropped += not kept
        rows += kept
    return TokenRows(
        ids=np.concatenate([ids for ids, _ in rows]) if rows else np.zeros(0, np.int32),
        targets=np.concatenate([_without_first(flags) for _, flags in rows]) if rows else np.zeros(0, bool),
        segments=np.ones(sum(len(ids) for ids, _ in rows), np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64),
        texts=len(texts),
        truncated=truncated,
        dropped=dropped,
        max_length=max_length,
    )


def _without_first(targets: np.ndarray) -> np.ndarray:
    targets = targets.astype(bool)
    targets[:1] = False
    return targets
