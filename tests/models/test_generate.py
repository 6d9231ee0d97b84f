"""`generate`: greedy, drawn and searched, against plain loops over the full forward; equality to transformers is in
tests/parity."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.generate import keep_probable
from lora_jax.models.model import skeleton
from tests.models.test_decoders import random_params, shaken, tiny
from tests.tiny_decoders import VOCABULARY

PROMPTS = np.random.default_rng(5).integers(0, VOCABULARY, (3, 6))
LEFT = np.array([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]])
both_forms = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def apply_of(family: str, *, scan: bool = True) -> tuple[Any, Any]:
    """The plain apply function: `generate` compiles it itself, sooner if layers are scanned."""
    jitted, params = tiny(family, scan=scan)
    return jitted.__wrapped__, params


def greedy(apply: Any, params: Any, prompt: np.ndarray, count: int, ends: tuple[int, ...] = ()) -> list[int]:
    """The most probable token each time, by the full forward of one row without padding."""
    row, new = list(prompt), []
    full = jax.jit(apply)
    while len(new) < count and not (new and new[-1] in ends):
        # One shape for all lengths: what comes after a token doesn't change it.
        padded = np.array([row + [0] * (len(prompt) + count - len(row))])
        new.append(int(np.argmax(np.asarray(full(params, padded))[0, len(row) - 1])))
        row.append(new[-1])
    return new


# --------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2"])
@both_forms
def test_greedy_is_a_loop_over_the_full_forward(family: str, scan: bool):
    """Rows of 6, 4 and 1 tokens, past the windows of Mistral (5) and Qwen2 (4)."""
    apply, params = apply_of(family, scan=scan)
    found = models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=8)
    expected = [greedy(apply, params, row[mask > 0], 8) for row, mask in zip(PROMPTS, LEFT, strict=True)]
    assert found.tokens.tolist() == expected
    assert found.lengths.tolist() == [8, 8, 8]
    assert len({tuple(row) for row in expected}) == 3


def test_padding_on_the_right_is_padding_on_the_left():
    apply, params = apply_of("gpt2")
    left = models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=5).tokens
    moved = np.stack([np.roll(row, mask.sum() - 6) for row, mask in zip(PROMPTS, LEFT, strict=True)])
    right = models.generate(apply, params, moved, LEFT[:, ::-1], max_new_tokens=5).tokens
    np.testing.assert_array_equal(left, right)


def test_a_row_ends_with_its_end_of_text():
    apply, params = apply_of("llama")
    plain = np.asarray(models.generate(apply, params, PROMPTS, max_new_tokens=8).tokens)
    end = int(plain[0, 3])
    lengths = [list(row).index(end) + 1 if end in row else 8 for row in plain]
    found = models.generate(apply, params, PROMPTS, max_new_tokens=8, eos_token_id=end, pad_token_id=96)
    assert found.lengths.tolist() == lengths
    assert lengths[0] <= 4
    for row, expected, length in zip(np.asarray(found.tokens), plain, lengths, strict=True):
        assert row[:length].tolist() == expected[:length].tolist()
        assert set(row[length:].tolist()) <= {96}
    several = models.generate(apply, params, PROMPTS, max_new_tokens=8, eos_token_id=[end, int(plain[1, 0])])
    assert several.lengths.tolist()[1] == 1
    assert several.tokens[1].tolist() == [plain[1, 0]] + [end] * 7  # the first of them is the padding


def test_it_stops_when_every_row_has_ended():
    apply, params = apply_of("llama")
    steps: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return apply(*args, **kwargs)

    plain = np.asarray(models.generate(apply, params, PROMPTS[:1], max_new_tokens=6).tokens)
    end = int(plain[0, 1])
    models.generate(counted, params, PROMPTS[:1], max_new_tokens=30, eos_token_id=end)
    jax.effects_barrier()
    assert len(steps) == list(plain[0]).index(end) + 1


def test_one_new_token_needs_no_second_run():
    apply, params = apply_of("gpt2")
    found = models.generate(apply, params, PROMPTS, max_new_tokens=1)
    np.testing.assert_array_equal(found.tokens[:, 0], np.argmax(apply(params, PROMPTS)[:, -1], axis=-1))


def test_a_model_may_stand_for_its_function():
    apply, params = apply_of("gpt2")
    config = models.Gpt2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = models.Model(apply=apply, params=params, config=config, names={}, task="causal-lm", pooling="first")
    a, b = (models.generate(first, params, PROMPTS, max_new_tokens=3).tokens for first in (model, apply))
    np.testing.assert_array_equal(a, b)


def test_it_is_compiled_once():
    apply, params = apply_of("llama")
    traced: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return apply(*args, **kwargs)

    models.generate(counted, params, PROMPTS, max_new_tokens=3)
    before = len(traced)
    models.generate(counted, jax.tree.map(lambda x: x * 2, params), PROMPTS + 1, max_new_tokens=3)
    assert len(traced) == before


# -------------------------------------------------------------------------------------------------------------- adapted


@pytest.mark.parametrize(("scan", "beams"), [(False, 1), (True, 3)])
def test_adapted_base_and_merged_weights_go_through_one_function(scan: bool, beams: int):
    apply, base = apply_of("llama", scan=scan)
    method = lj.LoRA(rank=2, alpha=4, targets="all-linear")
    uses = lj.trace_weights(apply, base, PROMPTS)
    params = shaken(lj.attach(base, method, key=jax.random.key(0), uses=uses), method)
    adapted = lj.adapt(apply, on_materialize="error")

    def run(apply: Any, params: Any) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams}
        return models.generate(apply, params, PROMPTS, LEFT, **options).tokens.tolist()

    expected = run(apply, lj.merge_params(params))
    assert run(adapted, params) == expected
    assert run(adapted, base) == run(apply, base) != expected

    def whole(params: Any) -> Any:
        return models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=6, num_beams=beams).tokens

    assert lj.adapt(whole, on_materialize="error")(params).tolist() == expected


# ---------------------------------------------------------------------------------------------------------------- drawn


def test_drawing_is_a_function_of_the_key():
    apply, params = apply_of("gpt2")

    def draw(seed: int, **options: Any) -> list[list[int]]:
        key = jax.random.key(seed)
        return models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=5, key=key, **options).tokens.tolist()

    first = draw(0, temperature=5.0)
    assert draw(0, temperature=5.0) == first
    assert draw(1, temperature=5.0) != first
    plain = models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=5).tokens.tolist()
    assert draw(0, temperature=5.0, top_k=1) == plain
    assert draw(0, temperature=5.0, top_p=1e-6) == plain
    assert draw(0, temperature=1e-4) == plain != first


def test_tokens_are_drawn_with_their_probabilities():
    """500 rows of one prompt; every step draws anew."""
    apply, params = apply_of("llama")
    rows = np.repeat(PROMPTS[:1], 500, axis=0)
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 4, "key": jax.random.key(3)}
    tokens = np.asarray(models.generate(apply, params, rows, max_new_tokens=2, **options).tokens)
    logits = np.asarray(apply(params, PROMPTS[:1]))[0, -1] / 1.5
    best = np.argsort(logits)[-4:]
    expected = np.exp(logits[best]) / np.exp(logits[best]).sum()
    assert set(tokens[:, 0]) <= set(best)
    counts = np.array([(tokens[:, 0] == token).mean() for token in best])
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected * (1 - expected) / 500).max()
    assert len(set(tokens[:, 1])) > 4


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float):
    logits = np.random.default_rng(0).normal(0, 2, (5, 20)).astype(np.float32)
    kept = np.isfinite(keep_probable(jnp.asarray(logits), top_k=None, top_p=top_p))
    for row, mask in zip(logits, kept, strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-probs)
        count = int(np.searchsorted(np.cumsum(probs[order]), top_p - 1e-6)) + 1
        assert set(np.flatnonzero(mask)) == set(order[: min(count, 20)])


def test_top_k_comes_before_top_p():
    """Of (0.4, 0.3, 0.3) the best two are 0.57 and 0.43, so half is reached by the first."""
    logits = jnp.log(jnp.array([[0.4, 0.31, 0.29]]))
    assert jnp.isfinite(keep_probable(logits, top_k=2, top_p=0.5)).tolist() == [[True, False, False]]
    assert jnp.isfinite(keep_probable(logits, top_k=None, top_p=0.5)).tolist() == [[True, True, False]]
    assert jnp.isfinite(keep_probable(logits, top_k=9, top_p=None)).all()


# ------------------------------------------------------------------------------------------------------------- searched


def all_rows(apply: Any, params: Any, prompt: np.ndarray, length: int, vocabulary: int) -> dict[tuple[int, ...], float]:
    """The log-probability of every continuation of a length."""
    rows = list(itertools.product(range(vocabulary), repeat=length))
    ids = np.array([[*prompt, *row] for row in rows])
    logs = np.asarray(jax.nn.log_softmax(jax.jit(apply)(params, ids)))[:, len(prompt) - 1 : -1]
    return {row: sum(logs[i, t, token] for t, token in enumerate(row)) for i, row in enumerate(rows)}


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_row(length_penalty: float):
    """With as many beams as there are beginnings nothing is lost: the best of all rows that end, by hand."""
    config = models.Gpt2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False)
    apply, shapes = skeleton(config, task="causal-lm")
    prompt, end, most = np.array([1, 3]), 4, 4
    bests = set()
    for seed in range(6):
        params = random_params(shapes, seed=seed)
        # Rows should change from place to place.
        params["norm"]["bias"] *= 0
        params["embeddings"]["position"]["embedding"] *= 4
        scores: dict[tuple[int, ...], float] = {}
        for length in range(1, most + 1):
            for row, total in all_rows(apply, params, prompt, length, 5).items():
                if end not in row[:-1] and (row[-1] == end or length == most):
                    scores[row] = total / length**length_penalty
        best = max(scores, key=lambda row: scores[row])
        options: dict[str, Any] = {
            "num_beams": 64,
            "length_penalty": length_penalty,
            "eos_token_id": end,
            "pad_token_id": 0,
        }
        found = models.generate(apply, params, prompt[None], max_new_tokens=most, **options)
        assert tuple(found.tokens[0, : int(found.lengths[0])].tolist()) == best
        assert set(found.tokens[0, int(found.lengths[0]) :].tolist()) <= {0}
        bests.add(best)
    assert len(bests) > 3


def test_beams_of_padded_rows_are_those_of_the_rows_alone():
    apply, params = apply_of("qwen3")
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "eos_token_id": 11}
    together = models.generate(apply, params, PROMPTS, LEFT, **options)
    for number in (1, 2):
        alone = models.generate(apply, params, PROMPTS[number : number + 1, LEFT[number] > 0], **options)
        assert together.tokens[number].tolist() == alone.tokens[0].tolist()
        assert int(together.lengths[number]) == int(alone.lengths[0])
    plain = models.generate(apply, params, PROMPTS, LEFT, max_new_tokens=6, eos_token_id=11)
    assert together.tokens.tolist() != plain.tokens.tolist()


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` must be an integer of at least 1, got 0"),
        ({"num_beams": 1.5}, r"`num_beams` must be an integer of at least 1, got 1.5"),
        ({"temperature": -1.0}, r"`temperature` must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, r"`temperature` must be a number, got nan"),
        ({"temperature": 1.0}, r"`key` is required for sampling: pass `jax.random.key\(seed\)`"),
        ({"top_k": 3}, r"`top_k` applies to sampling: pass a `temperature` above 0"),
        ({"top_p": 0.5}, r"`top_p` applies to sampling"),
        ({"top_k": 0, "temperature": 1.0}, r"`top_k` must be an integer of at least 1, got 0"),
        ({"top_p": 1.5, "temperature": 1.0}, r"`top_p` must be above 0 and at most 1, got 1.5"),
        ({"num_beams": 2, "temperature": 1.0}, r"`num_beams` .* and `temperature` .* can't be combined"),
        ({"length_penalty": 2.0}, r"`length_penalty` applies to beam search: pass `num_beams` above 1"),
        ({"eos_token_id": -1}, r"`eos_token_id` and `pad_token_id` must be tokens, 0 or more, got -1"),
        ({"eos_token_id": [1, None]}, r"`eos_token_id` and `pad_token_id` must be tokens"),
        (
            {"attention_mask": np.ones((3, 5))},
            r"`attention_mask` must have the shape of `input_ids`, \(3, 6\), got \(3, 5\)",
        ),
        (
            {"attention_mask": np.array([[1] * 6, [0] * 6, [1] * 6])},
            r"`attention_mask` must leave a token in every row, got none in row 1",
        ),
        ({"max_new_tokens": 44}, r"`cache` must have at most 48 slots, the model's positions, .*got 49"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    apply, params = apply_of("gpt2")
    with pytest.raises(ValueError, match=message):
        models.generate(apply, params, PROMPTS, **{"max_new_tokens": 4, **options})


def test_a_seed_is_no_key():
    apply, params = apply_of("gpt2")
    with pytest.raises(TypeError, match="`key` must be one random key, such as"):
        models.generate(apply, params, PROMPTS, max_new_tokens=4, temperature=1.0, key=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`dropout_key` must be one random key"):
        apply(params, PROMPTS, dropout_key=0)


@pytest.mark.parametrize("ids", [np.ones(3, int), np.ones((2, 3)), np.ones((2, 0), int)])
def test_bad_prompts_are_refused(ids: np.ndarray):
    apply, params = apply_of("gpt2")
    with pytest.raises(ValueError, match=r"`input_ids` must be \(batch, time\) integers, got"):
        models.generate(apply, params, ids, max_new_tokens=2)
