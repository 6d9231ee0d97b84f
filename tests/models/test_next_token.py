"""No run of tokens comes twice: against its definition, token by token."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.sampling import forbid_repeats
from tests.models.test_decoders import IDS, tiny


def expected(tokens: list[int], size: int, vocabulary: int) -> list[bool]:
    """Which tokens may follow."""
    last = tokens[len(tokens) - size + 1 :]
    seen = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
    return [len(tokens) < size - 1 or [*last, token] not in seen for token in range(vocabulary)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_against_the_definition(size: int):
    rng = np.random.default_rng(size)
    for count in range(1, 14):
        tokens = rng.integers(0, 3, (4, 14))
        padding = rng.integers(0, min(count, 5), 4)
        known = np.arange(14) >= padding[:, None]
        scores = jnp.zeros((4, 3))
        found = forbid_repeats(scores, jnp.asarray(tokens), jnp.asarray(known), count, size=size)
        wanted = [expected(row[pad:count].tolist(), size, 3) for row, pad in zip(tokens, padding, strict=True)]
        assert np.isfinite(found).tolist() == wanted, (size, count)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_rows_have_no_run_twice(beams: int):
    apply, params = tiny("gpt2", seed=3)
    apply = apply.__wrapped__
    mask = np.array([[1] * 9, [0] * 3 + [1] * 6])
    options: dict[str, Any] = {"max_new_tokens": 24, "num_beams": beams}
    plain = models.generate(apply, params, IDS, mask, **options).tokens
    found = models.generate(apply, params, IDS, mask, **options, no_repeat_ngram_size=2).tokens
    for row, start in ((0, 0), (1, 3)):
        tokens = [*IDS[row, start:].tolist(), *np.asarray(found[row]).tolist()]
        pairs = list(itertools.pairwise(tokens[8 - start :]))
        before = set(itertools.pairwise(tokens[: 9 - start]))
        assert len(set(pairs)) == len(pairs)
        assert not before & set(pairs)
    assert (plain != found).any()
    with pytest.raises(ValueError, match=r"`no_repeat_ngram_size` must be an integer of at least 1, got 0"):
        models.generate(apply, params, IDS, max_new_tokens=2, no_repeat_ngram_size=0)
