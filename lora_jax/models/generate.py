"""`generate`: text from a decoder, token by token, with a key-value cache, in one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..paths import require_key
from ..weights import is_traced
from .model import Model
from .nn.cache import Cache
from .sampling import forbid_repeats, keep_probable

# Stands for -∞ in sums of log-probabilities.
_NEVER = -1e9


class Generated(NamedTuple):
    """New tokens.

    Attributes:
        tokens: `(batch, max_new_tokens)`, without the prompt; after the end of a text `pad_token_id`.
        lengths: `(batch,)`: tokens of each row, its end-of-text included.
    """

    tokens: jax.Array
    lengths: jax.Array


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the compiled program depends on, checked."""

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
    model: Model | Callable[..., Any],
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
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
    key: jax.Array | None = None,
) -> Generated:
    """Continues each row of tokens: the most probable token each time, sampling, or beam search.

    The prompts are run at once, then one token at a time in a `lax.while_loop`, with keys and values in a cache of
    `time + max_new_tokens` slots; it ends early when every row has. The program is compiled once for each function,
    shape of the prompts and set of options.

    Greedy and beam search give the tokens of transformers' `generate` on the same weights.

    Args:
        model: a decoder from `load(..., task="causal-lm")`; or its apply function, which is what adapted weights need:
            `adapted = lj.adapt(model.apply)`, made once, since another function is compiled anew. A function of your
            own may stand here that is called as a decoder's apply is, see `Model`, and gives logits and a `Cache`.
        params: the base's, adapted or merged.
        input_ids: `(batch, time)` integers, the prompts.
        attention_mask: `(batch, time)`, 0 or false at padding, on the left or on the right; `None` for no padding.
            Positions count tokens, so padding changes no result.
        max_new_tokens: the most to add to a row.
        temperature: 0 takes the most probable token. Otherwise logits are divided by it, and tokens are drawn.
        top_k: draws from the `k` most probable tokens only.
        top_p: draws from the fewest most probable tokens whose probabilities sum to `p` or more, after `top_k`.
        num_beams: more than 1 searches for the row of the highest `log p / length ** length_penalty`, keeping so many
            beginnings at each step.
        length_penalty: see `num_beams`; above 0 favours longer rows.
        no_repeat_ngram_size: no run of so many tokens comes twice in a row, prompt included; `None` for any.
        eos_token_id: the token, or tokens, that end a text; `None` for none.
        pad_token_id: what fills a row after its end; the first of `eos_token_id` if `None`.
        key: of the drawing.

    Returns:
        `Generated(tokens, lengths)`.

    Raises:
        ValueError: an option out of its range or without effect (`top_k` without a temperature, a temperature without
            a `key`, beams with a temperature), or a prompt without tokens.

    Example:
        >>> from lora_jax.models.model import skeleton
        >>> config = lj.models.Gpt2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> apply, shapes = skeleton(config, task="causal-lm")
        >>> params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
        >>> generate(apply, params, jnp.array([[1, 2, 3]]), max_new_tokens=4).tokens.shape
        (1, 4)

    **Deviations.** transformers fills a row after its end with the end-of-text if the token of padding is 0, in beam
    search; here with padding always. It takes tokens of padding in a prompt for padding where no mask is given; here
    every token counts. For `no_repeat_ngram_size` it counts padding as tokens; here it is none. Beams are searched as
    with its `early_stopping=False`.
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
    input_ids, mask = _check_prompts(input_ids, attention_mask)
    apply = model.apply if isinstance(model, Model) else model
    return _run(apply, options, params, input_ids, mask, key)


def _check_options(options: _Options, key: jax.Array | None) -> None:
    for name, number in (("max_new_tokens", options.max_new_tokens), ("num_beams", options.num_beams)):
        if type(number) is not int or number < 1:
            raise ArgumentError(f"`{name}` must be an integer of at least 1, not {number!r}.")
    for name in ("temperature", "length_penalty"):
        number = getattr(options, name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ArgumentError(f"`{name}` must be a number, not {number!r}.")
    if options.temperature < 0:
        raise ArgumentError(f"`temperature` must be 0 (the most probable token) or more, not {options.temperature}.")
    ngram = options.no_repeat_ngram_size
    if ngram is not None and (type(ngram) is not int or ngram < 1):
        raise ArgumentError(f"`no_repeat_ngram_size` must be an integer of at least 1, not {ngram!r}.")
    if options.top_k is not None and (type(options.top_k) is not int or options.top_k < 1):
        raise ArgumentError(f"`top_k` must be an integer of at least 1, not {options.top_k!r}.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ArgumentError(f"`top_p` must be above 0 and at most 1, not {options.top_p!r}.")
    if options.temperature == 0:
        for name in ("top_k", "top_p"):
            if getattr(options, name) is not None:
                raise ArgumentError(f"`{name}` is for drawing tokens: pass a `temperature` above 0.")
    elif options.num_beams > 1:
        raise ArgumentError("`num_beams` searches and `temperature` draws: leave one of them out.")
    elif key is None:
        raise ArgumentError("`key` is needed to draw tokens: pass `jax.random.key(seed)`.")
    else:
        require_key(key)
    if options.num_beams == 1 and options.length_penalty != 1.0:
        raise ArgumentError("`length_penalty` is for beam search: pass `num_beams` above 1.")
    for token in (*options.ends, options.padding):
        if type(token) is not int or token < 0:
            raise ArgumentError(f"`eos_token_id` and `pad_token_id` must be tokens, 0 or more, not {token!r}.")


def _check_prompts(input_ids: Any, attention_mask: Any) -> tuple[jax.Array, jax.Array]:
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not input_ids.size or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ArgumentError(
            f"`input_ids` must be (batch, time) integers, not {input_ids.dtype} of shape {input_ids.shape}."
        )
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    if mask.shape != input_ids.shape:
        raise ArgumentError(f"`attention_mask` has shape {mask.shape}, and `input_ids` has {input_ids.shape}.")
    if not is_traced(mask) and not (some := np.asarray(mask.any(axis=1))).all():
        raise ArgumentError(f"`attention_mask` leaves no token in row {int(np.argmin(some))}: begin with one at least.")
    return input_ids.astype(jnp.int32), mask


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    apply: Callable[..., Any],
    options: _Options,
    params: Any,
    input_ids: jax.Array,
    mask: jax.Array,
    key: jax.Array | None,
) -> Generated:
    # Padding goes to the left, so that all rows end, and go on, in the same slot.
    order = jnp.argsort(mask, axis=1, stable=True)
    input_ids, mask = (jnp.take_along_axis(array, order, axis=1) for array in (input_ids, mask))
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    slots = input_ids.shape[1] + options.max_new_tokens - 1  # the last token isn't run
    logits, cache = apply(params, input_ids, mask, position_ids=positions, cache=slots, last_only=True)
    prompt = _Prompt(_wide(logits), cache, positions[:, -1], input_ids, mask)

    def run(tokens: jax.Array, step: jax.Array, start: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits after `tokens`, the `step`-th of each row."""
        logits, cache = apply(
            params, tokens[:, None], position_ids=(start + step)[:, None], cache=cache, last_only=True
        )
        return _wide(logits), cache

    tokens = _search(run, prompt, options) if options.num_beams > 1 else _follow(run, prompt, options, key)
    ended = _ends(tokens, options)
    lengths = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1).astype(jnp.int32) + 1, options.max_new_tokens)
    return Generated(tokens, lengths)


class _Prompt(NamedTuple):
    """What is known when the prompts have been run: logits of the next token, the cache, the last position, tokens."""

    logits: jax.Array
    cache: Cache
    positions: jax.Array
    tokens: jax.Array  # (batch, time), padding on the left
    mask: jax.Array

    def allowed(self, scores: jax.Array, tokens: jax.Array, step: jax.Array, options: _Options) -> jax.Array:
        """Scores `(rows, vocabulary)` without the tokens that would repeat; the rows of a prompt lie together."""
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


_Run = Callable[[jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


def _wide(logits: jax.Array) -> jax.Array:
    return logits[:, -1].astype(jnp.float32)


def _ends(tokens: jax.Array, options: _Options) -> jax.Array:
    return jnp.isin(tokens, jnp.array(options.ends, jnp.int32))


# ------------------------------------------------------------------------------------------- one beginning for each row


class _Row(NamedTuple):
    step: jax.Array  # how many tokens there are
    tokens: jax.Array  # (batch, max_new_tokens)
    last: jax.Array  # (batch,)
    done: jax.Array  # (batch,)
    cache: Cache


def _follow(run: _Run, prompt: _Prompt, options: _Options, key: jax.Array | None) -> jax.Array:
    def add(logits: jax.Array, step: jax.Array, tokens: jax.Array, done: jax.Array, cache: Cache) -> _Row:
        logits = prompt.allowed(logits, tokens, step, options)
        chosen = choose(logits, options, None if key is None else jax.random.fold_in(key, step))
        chosen = jnp.where(done, options.padding, chosen)
        return _Row(step + 1, tokens.at[:, step].set(chosen), chosen, done | _ends(chosen, options), cache)

    def step(row: _Row) -> _Row:
        logits, cache = run(row.last, row.step, prompt.positions, row.cache)
        return add(logits, row.step, row.tokens, row.done, cache)

    def going_on(row: _Row) -> jax.Array:
        return (row.step < options.max_new_tokens) & ~row.done.all()

    batch = prompt.logits.shape[0]
    tokens = jnp.full((batch, options.max_new_tokens), options.padding, jnp.int32)
    first = add(prompt.logits, jnp.int32(0), tokens, jnp.zeros(batch, bool), prompt.cache)
    return jax.lax.while_loop(going_on, step, first).tokens


def choose(logits: jax.Array, options: _Options, key: jax.Array | None) -> jax.Array:
    """The next token of each row of logits `(batch, vocabulary)`."""
    if options.temperature == 0 or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_probable(logits / options.temperature, top_k=options.top_k, top_p=options.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------- several, as beam search


class _Beams(NamedTuple):
    """`k` beginnings a row that go on, and the `k` best of those that ended, by score."""

    step: jax.Array
    tokens: jax.Array  # (batch, k, max_new_tokens)
    scores: jax.Array  # (batch, k): log-probabilities
    ended_tokens: jax.Array  # (batch, k, max_new_tokens)
    ended_scores: jax.Array  # (batch, k): over length ** length_penalty
    ended: jax.Array  # (batch, k): whether this place is filled
    open: jax.Array  # (batch,): whether one that goes on may still be better
    all_ended: jax.Array  # whether nothing goes on, in any row
    cache: Cache  # of the beginnings that go on


def _search(run: _Run, prompt: _Prompt, options: _Options) -> jax.Array:
    batch, vocabulary = prompt.logits.shape
    beams, most = options.num_beams, options.max_new_tokens
    # Of these candidates `beams` go on at least, even if every beam's best continuations are to end.
    candidates = min(max(2, 1 + len(options.ends)) * beams, beams * vocabulary)
    start = jnp.repeat(prompt.positions, beams)

    def add(logits: jax.Array, state: _Beams) -> _Beams:
        """With one more token, from logits `(batch, k, vocabulary)`."""
        length = state.step + 1
        scores = jax.nn.log_softmax(logits).reshape(-1, vocabulary)
        scores = prompt.allowed(scores, state.tokens.reshape(-1, most), state.step, options)
        totals = state.scores[:, :, None] + scores.reshape(logits.shape)
        totals, places = jax.lax.top_k(totals.reshape(batch, -1), candidates)
        parents, chosen = places // vocabulary, (places % vocabulary).astype(jnp.int32)
        tokens = _pick(state.tokens, parents).at[:, :, state.step].set(chosen)
        ends = _ends(chosen, options) | (length == most)

        # Those that ended, if they are among the best `k` of all candidates.
        scores = totals / length.astype(jnp.float32) ** options.length_penalty
        counts = ends & (jnp.arange(candidates) < beams) & state.open[:, None]
        ended_scores = jnp.concatenate([state.ended_scores, jnp.where(counts, scores, _NEVER)], axis=1)
        ended_scores, kept = jax.lax.top_k(ended_scores, beams)
        ended_tokens = _pick(jnp.concatenate([state.ended_tokens, tokens], axis=1), kept)
        ended = _pick(jnp.concatenate([state.ended, counts], axis=1), kept)

        # The best that go on.
        running, going = jax.lax.top_k(jnp.where(ends, totals + _NEVER, totals), beams)
        rows = (jnp.arange(batch)[:, None] * beams + _pick(parents, going)).reshape(-1)
        best = running[:, 0] / length.astype(jnp.float32) ** options.length_penalty
        worst = jnp.where(ended.all(axis=1), ended_scores.min(axis=1), _NEVER)
        return _Beams(
            step=length,
            tokens=_pick(tokens, going),
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
        scores=nothing.at[:, 0].set(0),  # the beams begin alike: one of them is enough
        ended_tokens=empty,
        ended_scores=nothing,
        ended=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        all_ended=jnp.zeros((), bool),
        cache=prompt.cache.rows(jnp.repeat(jnp.arange(batch), beams)),
    )
    state = add(jnp.repeat(prompt.logits[:, None], beams, axis=1), state)
    return jax.lax.while_loop(lambda state: state.open.any() & ~state.all_ended, step, state).ended_tokens[:, 0]


def _pick(array: jax.Array, places: jax.Array) -> jax.Array:
    """The members of axis 1 at `(batch, n)` places."""
    return jnp.take_along_axis(array, places.reshape(*places.shape, *(1,) * (array.ndim - 2)), axis=1)
