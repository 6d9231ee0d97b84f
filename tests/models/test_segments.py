"""Texts that share a row don't see each other: as if each were alone, in values and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.models.test_decoders import IDS, tiny

# Longer than the windows of Mistral (5) and Qwen2 (4); no token occurs in two of the texts. The last two numbers are
# equal to the first's: it is the run that counts.
LENGTHS = (7, 2, 7, 2)
ROW = np.random.default_rng(5).permutation(97)[None, : sum(LENGTHS)]
SEGMENTS = np.repeat([4, 0, 9, 4], LENGTHS)[None]
BOUNDS = np.cumsum([0, *LENGTHS])
TEXTS = [slice(start, end) for start, end in itertools.pairwise(BOUNDS)]


# With and without windows and learned positions; in both forms.
@pytest.mark.parametrize(
    ("family", "scan"), [("gpt2", False), ("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", False)]
)
def test_packed_is_each_text_alone(family: str, scan: bool):
    apply, params = tiny(family, scan=scan)
    packed = apply(params, ROW, segments=SEGMENTS)
    for text in TEXTS:
        np.testing.assert_allclose(packed[:, text], apply(params, ROW[:, text]), atol=2e-5)
    assert np.abs(np.asarray(packed - apply(params, ROW)))[:, LENGTHS[0] :].max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2"])
def test_no_gradient_crosses_a_border(family: str):
    """Exactly zero: of a text's hidden states, to the embeddings of every other text's tokens."""
    apply, params = tiny(family, task=None)
    weights = np.random.default_rng(1).normal(size=(1, ROW.shape[1], 16)).astype(np.float32)

    @jax.jit
    def grads(segments: Any, counts: Any) -> Any:
        return jax.grad(lambda p: (apply(p, ROW, segments=segments) * weights * counts[None, :, None]).sum())(params)

    def only(text: slice) -> np.ndarray:
        counts = np.zeros(ROW.shape[1], np.float32)
        counts[text] = 1
        return counts

    for number, text in enumerate(TEXTS):
        found = grads(SEGMENTS, only(text))["embeddings"]
        word = np.abs(np.asarray(found["word"]["embedding"]))[ROW[0]].max(-1)
        assert (word[text] > 0).all()
        assert (np.delete(word, np.r_[text]) == 0).all(), number
        if family == "gpt2":
            places = np.abs(np.asarray(found["position"]["embedding"])).max(-1)
            assert (places[: LENGTHS[number]] > 0).all()
            assert (places[LENGTHS[number] :] == 0).all()
    leaking = grads(np.zeros_like(SEGMENTS), only(TEXTS[-1]))["embeddings"]["word"]["embedding"]
    assert (np.abs(np.asarray(leaking))[ROW[0, TEXTS[-2]]].max(-1) > 0).any(), "without segments it crosses"


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_padding_within_and_after_segments_changes_nothing(family: str):
    apply, params = tiny(family)
    ids = np.array([[0, 0, 11, 12, 13, 21, 22, 0, 0]])
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3]])
    found = apply(params, ids, mask, segments=segments)
    np.testing.assert_allclose(found[:, 5:7], apply(params, ids[:, 5:7]), atol=2e-5)
    alone = apply(params, ids[:, :5], mask[:, :5])  # places are counted, padding too
    np.testing.assert_allclose(found[:, 2:5], alone[:, 2:], atol=2e-5)
    assert jnp.isfinite(found).all()


def test_positions_may_be_given():
    apply, params = tiny("gpt2")
    places = np.concatenate([np.arange(length) for length in LENGTHS])[None]
    given = apply(params, ROW, segments=SEGMENTS, position_ids=places)
    np.testing.assert_array_equal(given, apply(params, ROW, segments=SEGMENTS))
    assert np.abs(np.asarray(given - apply(params, ROW, segments=SEGMENTS, position_ids=places + 3))).max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2"])
def test_adapted_weights_stay_factored(family: str):
    apply, params = tiny(family)
    method = lj.LoRA(rank=2, alpha=4, targets="all-linear")
    adapted = lj.attach(params, method, key=jax.random.key(0))
    adapted = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 2 and 2 in leaf.shape else leaf, adapted)
    found = jax.jit(lj.adapt(apply, on_materialize="error"))(adapted, ROW, segments=SEGMENTS)
    np.testing.assert_allclose(found, apply(lj.merge_params(adapted), ROW, segments=SEGMENTS), atol=3e-5)
    assert np.abs(np.asarray(found - apply(params, ROW, segments=SEGMENTS))).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": SEGMENTS[:, :4]}, r"`segments` must have the shape of `input_ids`, \(2, 9\), got \(1, 4\)"),
        ({"segments": np.ones(IDS.shape)}, r"`segments` must be integers, got float"),
        ({"segments": np.ones(IDS.shape, int), "cache": 12}, r"`segments` and `cache` can't be combined"),
    ],
)
def test_refusals(options: dict[str, Any], message: str):
    apply, params = tiny("llama")
    options = {**options}
    cache = options.pop("cache", None)
    call = apply.__wrapped__  # a number of slots isn't traced
    with pytest.raises(ValueError, match=message):
        call(params, IDS, cache=cache, **options)
