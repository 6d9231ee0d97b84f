"""`generate`: generates tokens with a decoder and a key-value cache, in one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..errors import ArgumentError
from ..paths import require_key
from ..weights import is_traced
from .model import Apply, Model
from .nn.cache import Cache
from .sampling import forbid_repeats, keep_probable

# Takes the place of -∞ in sums of log-probabilities.
_NEVER = -1e9


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
        tokens: The new tokens without the prompt; `pad_token_id` after the end of a sequence.
        lengths: Number of new tokens in each sequence, including its end-of-text token.
    """

    tokens: Int[Array, "batch max_new_tokens"]
    lengths: Int[Array, " batch"]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of `generate`, on which the compiled program depends."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int | None
    ends: tuple[int, ...]
    padding: int


def generate(
    model: Model | Apply,
    params: PyTree,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Generated:
    """Continues each prompt by greedy decoding, sampling or beam search.

    The prompts are run at once, then one token at a time in a `lax.while_loop`, with keys and values in a cache of
    `time + max_new_tokens` slots. It stops early when every sequence has ended. The program is compiled once for each
    function, shape of the prompts and set of options.

    Greedy decoding and beam search give the same tokens as transformers' `generate` with the same weights.

    Args:
        model: A decoder from `load(..., task="causal-lm")`, or its apply function. Adapted weights need
            `adapted = lj.adapt(model.apply)`; make it once, since each new function is compiled anew. It may also be
            your own function, if it takes a decoder's arguments, see `Model`, and returns logits and a `Cache`.
        params: Parameters of the base, adapted or merged.
        input_ids: The prompts, `(batch, time)` integers.
        attention_mask: `(batch, time)`, 0 or false at padding, on the left or on the right; `None` for no padding.
            Positions count tokens only, so padding doesn't change the result.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Divisor of the logits before sampling; with 0, the most probable token is taken.
        top_k: Number of most probable tokens to sample from; `None` for all.
        top_p: Probability mass to sample from, after `top_k`: the fewest most probable tokens whose probabilities sum
            to at least `top_p`; `None` for all.
        num_beams: Number of beams. With more than 1, beam search maximizes `log p / length ** length_penalty`.
        length_penalty: Exponent of the length in the score of a beam; values above 0 favour longer sequences.
        no_repeat_ngram_size: Length of the n-grams that may occur only once in a sequence, prompt included; `None`
            allows repetition.
        eos_token_id: Token or tokens that end a sequence; `None` for none.
        pad_token_id: Token that fills a sequence after its end; the first of `eos_token_id` if `None`.
        key: Random key, required for sampling.

    Returns:
        `Generated(tokens, lengths)`.

    Raises:
        ValueError: An option is out of range or has no effect (`top_k` without a temperature, a temperature without a
            `key`, beams with a temperature), or a prompt has no tokens.

    Example:
        >>> from lora_jax.models.model import skeleton
        >>> config = lj.models.Gpt2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> apply, shapes = skeleton(config, task="causal-lm")
        >>> params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
        >>> generate(apply, params, jnp.array([[1, 2, 3]]), max_new_tokens=4).tokens.shape
        (1, 4)

    **Deviations.** In beam search, transformers fills a sequence after its end with the end-of-text token if the
    padding token is 0; here it is always padding. Without a mask, transformers takes padding tokens in a prompt for
    padding; here every token counts. For `no_repeat_ngram_size`, transformers counts padding as tokens; here it
    doesn't count. Beam search behaves as with transformers' `early_stopping=False`.
    """
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    options = _Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        ends=ends,
        padding=(ends[0] if ends else 0) if pad_token_id is None else pad_token_id,
    )
    _check_options(options, key)
    prompts, mask = _check_prompts(input_ids, attention_mask)
    apply = model.apply if isinstance(model, Model) else model
    return _run(apply, options, params, prompts, mask, key)


def _check_options(options: _Options, key: PRNGKeyArray | None) -> None:
    for name, number in (("max_new_tokens", options.max_new_tokens), ("num_beams", options.num_beams)):
        if type(number) is not int or number < 1:
            raise ArgumentError(f"`{name}` must be an integer of at least 1, got {number!r}.")
    for name in ("temperature", "length_penalty"):
        number = getattr(options, name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ArgumentError(f"`{name}` must be a number, got {number!r}.")
    if options.temperature < 0:
        raise ArgumentError(f"`temperature` must be 0 or more, got {options.temperature}.")
    ngram = options.no_repeat_ngram_size
    if ngram is not None and (type(ngram) is not int or ngram < 1):
        raise ArgumentError(f"`no_repeat_ngram_size` must be an integer of at least 1, got {ngram!r}.")
    if options.top_k is not None and (type(options.top_k) is not int or options.top_k < 1):
        raise ArgumentError(f"`top_k` must be an integer of at least 1, got {options.top_k!r}.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ArgumentError(f"`top_p` must be above 0 and at most 1, got {options.top_p!r}.")
    if options.temperature == 0:
        for name in ("top_k", "top_p"):
            if getattr(options, name) is not None:
                raise ArgumentError(f"`{name}` applies to sampling: pass a `temperature` above 0.")
    elif options.num_beams > 1:
        raise ArgumentError("`num_beams` (beam search) and `temperature` (sampling) can't be combined: omit one.")
    elif key is None:
        raise ArgumentError("`key` is required for sampling: pass `jax.random.key(seed)`.")
    else:
        require_key(key)
    if options.num_beams == 1 and options.length_penalty != 1.0:
        raise ArgumentError("`length_penalty` applies to beam search: pass `num_beams` above 1.")
    for token in (*options.ends, options.padding):
        if type(token) is not int or token < 0:
            raise ArgumentError(f"`eos_token_id` and `pad_token_id` must be tokens, 0 or more, got {token!r}.")


def _check_prompts(
    input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[Int[Array, "batch time"], Bool[Array, "batch time"]]:
    tokens = jnp.asarray(input_ids)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ArgumentError(f"`input_ids` must be (batch, time) integers, got {tokens.dtype} of shape {tokens.shape}.")
    mask = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    if mask.shape != tokens.shape:
        raise ArgumentError(f"`attention_mask` must have the shape of `input_ids`, {tokens.shape}, got {mask.shape}.")
    if not is_traced(mask) and not (some := np.asarray(mask.any(axis=1))).all():
        raise ArgumentError(f"`attention_mask` must leave a token in every row, got none in row {np.argmin(some)}.")
    return tokens.astype(jnp.int32), mask


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    apply: Apply,
    options: _Options,
    params: PyTree,
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    key: PRNGKeyArray | None,
) -> Generated:
    # Padding goes to the left, so that all prompts end in the same slot.
    order = jnp.argsort(mask, axis=1, stable=True)
    tokens, mask = (jnp.take_along_axis(array, order, axis=1) for array in (tokens, mask))
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    slots = tokens.shape[1] + options.max_new_tokens - 1  # the last token isn't run
    logits, cache = apply(params, tokens, mask, position_ids=positions, cache=slots, last_only=True)
    prompt = _Prompt(_wide(logits), cache, positions[:, -1], tokens, mask)

    def run(tokens: Array, step: Array, start: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits after `tokens`, the `step`-th new token of each sequence."""
        logits, cache = apply(
            params, tokens[:, None], position_ids=(start + step)[:, None], cache=cache, last_only=True
        )
        return _wide(logits), cache

    new = _beam_search(run, prompt, options) if options.num_beams > 1 else _sample(run, prompt, options, key)
    ended = _ends(new, options)
    lengths = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1).astype(jnp.int32) + 1, options.max_new_tokens)
    return Generated(new, lengths)


class _Prompt(NamedTuple):
    """The prompts, with padding on the left, and the state after running them."""

    logits: Float[Array, "batch vocabulary"]  # of the next token
    cache: Cache
    positions: Int[Array, " batch"]  # of the last token
    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]

    def allowed(
        self,
        scores: Float[Array, "rows vocabulary"],
        tokens: Int[Array, "rows max_new_tokens"],
        step: Int[Array, ""],
        options: _Options,
    ) -> Float[Array, "rows vocabulary"]:
        """Scores without the tokens that would repeat an n-gram; the rows of one prompt are adjacent."""
        if options.no_repeat_ngram_size is None:
            return scores
        copies = len(scores) // len(self.tokens)
        before, mask = (jnp.repeat(array, copies, axis=0) for array in (self.tokens, self.mask))
        return forbid_repeats(
            scores,
            jnp.concatenate([before, tokens], axis=1),
            jnp.pad(mask, ((0, 0), (0, tokens.shape[1])), constant_values=True),
            before.shape[1] + step,
            size=options.no_repeat_ngram_size,
        )


_Run = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]


def _wide(logits: Float[Array, "rows time vocabulary"]) -> Float[Array, "rows vocabulary"]:
    return logits[:, -1].astype(jnp.float32)


def _ends(tokens: Int[Array, "*shape"], options: _Options) -> Bool[Array, "*shape"]:
    return jnp.isin(tokens, jnp.array(options.ends, jnp.int32))


class _Sequences(NamedTuple):
    """The sequences generated so far, one for each prompt."""

    step: Int[Array, ""]  # number of new tokens
    tokens: Int[Array, "batch max_new_tokens"]
    last: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    cache: Cache


def _sample(
    run: _Run, prompt: _Prompt, options: _Options, key: PRNGKeyArray | None
) -> Int[Array, "batch max_new_tokens"]:
    def add(logits: Array, step: Array, tokens: Array, done: Array, cache: Cache) -> _Sequences:
        logits = prompt.allowed(logits, tokens, step, options)
        new = next_token(logits, options, None if key is None else jax.random.fold_in(key, step))
        new = jnp.where(done, options.padding, new)
        return _Sequences(step + 1, tokens.at[:, step].set(new), new, done | _ends(new, options), cache)

    def step(state: _Sequences) -> _Sequences:
        logits, cache = run(state.last, state.step, prompt.positions, state.cache)
        return add(logits, state.step, state.tokens, state.done, cache)

    def unfinished(state: _Sequences) -> Bool[Array, ""]:
        return (state.step < options.max_new_tokens) & ~state.done.all()

    batch = prompt.logits.shape[0]
    tokens = jnp.full((batch, options.max_new_tokens), options.padding, jnp.int32)
    first = add(prompt.logits, jnp.int32(0), tokens, jnp.zeros(batch, bool), prompt.cache)
    return jax.lax.while_loop(unfinished, step, first).tokens


def next_token(
    logits: Float[Array, "batch vocabulary"], options: _Options, key: PRNGKeyArray | None
) -> Int[Array, " batch"]:
    """The next token of each sequence: the most probable one, or a sample."""
    if options.temperature == 0 or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_probable(logits / options.temperature, top_k=options.top_k, top_p=options.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


class _Beams(NamedTuple):
    """For each prompt, the `k` beams that continue, and the best `k` sequences that ended."""

    step: Int[Array, ""]
    tokens: Int[Array, "batch k max_new_tokens"]
    scores: Float[Array, "batch k"]  # log-probabilities
    ended_tokens: Int[Array, "batch k max_new_tokens"]
    ended_scores: Float[Array, "batch k"]  # over length ** length_penalty
    ended: Bool[Array, "batch k"]  # whether there is an ended sequence at this index
    open: Bool[Array, " batch"]  # whether a beam that continues may still score higher
    all_ended: Bool[Array, ""]  # whether no beam of any prompt continues
    cache: Cache  # of the beams that continue


def _beam_search(run: _Run, prompt: _Prompt, options: _Options) -> Int[Array, "batch max_new_tokens"]:
    batch, vocabulary = prompt.logits.shape
    beams, most = options.num_beams, options.max_new_tokens
    # Enough candidates that `beams` of them continue even if the best continuation of every beam is its end.
    candidates = min(max(2, 1 + len(options.ends)) * beams, beams * vocabulary)
    start = jnp.repeat(prompt.positions, beams)

    def add(logits: Float[Array, "batch k vocabulary"], state: _Beams) -> _Beams:
        """Adds one token to the beams."""
        length = state.step + 1
        scores = jax.nn.log_softmax(logits).reshape(-1, vocabulary)
        scores = prompt.allowed(scores, state.tokens.reshape(-1, most), state.step, options)
        totals = state.scores[:, :, None] + scores.reshape(logits.shape)
        totals, indices = jax.lax.top_k(totals.reshape(batch, -1), candidates)
        parents, new = indices // vocabulary, (indices % vocabulary).astype(jnp.int32)
        tokens = _take(state.tokens, parents).at[:, :, state.step].set(new)
        ends = _ends(new, options) | (length == most)

        # Sequences that ended, if they are among the best `k` of all candidates.
        scores = totals / length.astype(jnp.float32) ** options.length_penalty
        counts = ends & (jnp.arange(candidates) < beams)[None] & state.open[:, None]
        ended_scores = jnp.concatenate([state.ended_scores, jnp.where(counts, scores, _NEVER)], axis=1)
        ended_scores, kept = jax.lax.top_k(ended_scores, beams)
        ended_tokens = _take(jnp.concatenate([state.ended_tokens, tokens], axis=1), kept)
        ended = _take(jnp.concatenate([state.ended, counts], axis=1), kept)

        # The best that continue.
        running, going = jax.lax.top_k(jnp.where(ends, totals + _NEVER, totals), beams)
        rows = (jnp.arange(batch)[:, None] * beams + _take(parents, going)).reshape(-1)
        best = running[:, 0] / length.astype(jnp.float32) ** options.length_penalty
        worst = jnp.where(ended.all(axis=1), ended_scores.min(axis=1), _NEVER)
        return _Beams(
            step=length,
            tokens=_take(tokens, going),
            scores=running,
            ended_tokens=ended_tokens,
            ended_scores=ended_scores,
            ended=ended,
            open=state.open & (best > worst),
            all_ended=ends.all(),
            cache=state.cache.rows(rows),
        )

    def step(state: _Beams) -> _Beams:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        logits, cache = run(last.reshape(-1), state.step, start, state.cache)
        return add(logits.reshape(batch, beams, vocabulary), state._replace(cache=cache))

    empty = jnp.full((batch, beams, most), options.padding, jnp.int32)
    nothing = jnp.full((batch, beams), _NEVER, jnp.float32)
    state = _Beams(
        step=jnp.int32(0),
        tokens=empty,
        scores=nothing.at[:, 0].set(0),  # all beams start alike, so only one counts
        ended_tokens=empty,
        ended_scores=nothing,
        ended=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        all_ended=jnp.zeros((), bool),
        cache=prompt.cache.rows(jnp.repeat(jnp.arange(batch), beams)),
    )
    state = add(jnp.repeat(prompt.logits[:, None], beams, axis=1), state)
    return jax.lax.while_loop(lambda state: state.open.any() & ~state.all_ended, step, state).ended_tokens[:, 0]


def _take(array: Shaped[Array, "batch k ..."], indices: Int[Array, "batch n"]) -> Shaped[Array, "batch n ..."]:
    """The entries of axis 1 at `indices`."""
    return jnp.take_along_axis(array, indices.reshape(*indices.shape, *(1,) * (array.ndim - 2)), axis=1)
