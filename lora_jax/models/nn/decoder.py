"""What the decoders share: from tokens through layers to hidden states or logits, with a cache or without.

Pre-norm layers, causal attention. Shapes: `batch` sequences of `time` tokens, `d` features, `n` heads of `h` features.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..model_config import ModelConfig
from .attention import AttentionForm, Scope
from .cache import Cache
from .causal import runs
from .layers import Table, key_for
from .rematerialization import Remat, policy
from .rope import Rotation


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """What the configurations of the decoders share."""

    # Whether positions end with the table that holds them; rotary ones go on.
    bounded_positions: ClassVar[bool] = True
    tie_word_embeddings: bool = False

    @property
    @abc.abstractmethod
    def cache_sizes(self) -> tuple[int, int, int]:
        """Layers, heads of keys and values, features of a head."""


# `with_head(hidden, head, tied)`: what takes the place of the logits.
WithHead = Callable[[jax.Array, jax.Array, bool], Any]


class Context(NamedTuple):
    """What all layers see alike.

    Attributes:
        scope: Which slots each token attends to. Its window is that of some of the layers where `settings` say which.
        rotation: of queries and keys; `None` where positions are in the embeddings.
        attention: The form of the attention, see `attend`.
    """

    scope: Scope
    rotation: Rotation | None = None
    attention: AttentionForm = "auto"


class Place(NamedTuple):
    """What one layer has of its own.

    Attributes:
        number: of the layer; traced in a scan.
        setting: of a family: GPT-2's scale of the scores, whether a Qwen layer has the window; `None` where all layers
            are alike.
    """

    number: jax.Array | int
    setting: Any


class Decoder(nnx.Module):
    """Embeddings, layers, a norm, and logits where there is a head.

    A family says in `embed` and `context` how tokens and positions come in, and in `settings` where its layers differ.

    Attributes:
        embeddings: with a table `word`.
        layers: an `nnx.List`, or one module whose parameters have a leading axis of the layers: these are scanned.
        norm: after the last layer.
        lm_head: of an untied head; `None` for one that is tied to `word`, or for none.
        has_head: whether the result is logits.
        remat: what of a layer is kept for the backward pass, see `Encoder`.
        attention: The form of the attention, see `attend`.
    """

    embeddings: Any
    layers: Any
    norm: Any
    lm_head: nnx.Linear | None
    has_head: bool
    remat: Remat | None
    attention: AttentionForm

    def embed(self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        raise NotImplementedError

    def context(self, scope: Scope, positions: jax.Array) -> Context:
        """What the layers see.

        Args:
            scope: Which slots these tokens attend to, without a window.
            positions: `(batch or 1, time)`.
        """
        raise NotImplementedError

    def settings(self) -> np.ndarray | None:
        """`(layers,)`: what each layer has of its own; `None` where they are alike."""
        return None

    def __call__(
        self,
        input_ids: jax.Array,
        mask: jax.Array | None,
        positions: jax.Array | None,
        cache: Cache | None,
        key: jax.Array | None,
        *,
        segments: jax.Array | None = None,
        last_only: bool = False,
        with_head: WithHead | None = None,
    ) -> tuple[Any, Cache | None]:
        """Hidden states `(batch, time, d)` or logits `(batch, time, vocabulary)`, and the cache with these tokens.

        Args:
            input_ids: `(batch, time)` integers.
            mask: `(batch, time)` booleans, false where there is padding; `None` for no padding.
            positions: `(batch, time)` integers; `None` counts the slots, in each segment anew.
            cache: of the tokens before; `None` for none.
            key: of the dropout; `None` for none.
            segments: `(batch, time)` integers: each run of equal ones is a text of its own. `None` for one text a row;
                without a cache only.
            last_only: only of the last token, `(batch, 1, …)`.
            with_head: Called with the hidden states and the head in place of forming the logits; its result is the
                model's.
        """
        time = input_ids.shape[1]
        start: jax.Array | int = 0 if cache is None else cache.used
        places = (start + jnp.arange(time))[None]
        if segments is not None:
            segments, places = runs(segments)
        positions = places if positions is None else positions
        if cache is not None:
            cache = cache.with_tokens(mask, time)
            mask = cache.mask
        context = self.context(Scope(mask=mask, segments=segments, start=start), positions)
        x = self.embed(input_ids, positions, key)
        x, cache = run_layers(
            self.layers, x, context, cache, key_for(key, "layers"), settings=self.settings(), remat=self.remat
        )
        x = self.norm(x[:, -1:] if last_only else x)
        if self.has_head:
            word: Table = self.embeddings.word
            if with_head is not None:
                head = word.embedding if self.lm_head is None else self.lm_head.kernel
                x = with_head(x, head[...], self.lm_head is None)
            else:
                x = word.attend(x) if self.lm_head is None else self.lm_head(x)
        return x, None if cache is None else cache._replace(used=cache.used + jnp.int32(time))


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, *, scan: bool, rngs: nnx.Rngs) -> Any:
    """`count` layers as an `nnx.List`; or, to be scanned, as one whose parameters have a leading axis."""
    if scan:
        return nnx.split_rngs(splits=count)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
    return nnx.List([make(rngs) for _ in range(count)])


def run_layers(
    layers: Any,
    x: jax.Array,
    context: Context,
    cache: Cache | None,
    key: jax.Array | None,
    *,
    settings: np.ndarray | None,
    remat: Remat | None,
) -> tuple[jax.Array, Cache | None]:
    """Runs `x` through the layers, one after the other or in a scan; the same numbers either way.

    A layer is called with `(x, context, place, cache, key)` and returns `x` and the cache. In a scan the cache is
    carried, whole, and each layer writes its part in place: handed through slice by slice it would be copied at every
    token.
    """
    scanned = not isinstance(layers, nnx.List)

    def run(graph: Any, state: Any, place: Place, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        layer_key = None if key is None else jax.random.fold_in(key, place.number)
        return nnx.merge(graph, state)(x, context, place, cache, layer_key)

    if remat is not None:
        # A scan keeps what is computed twice apart by itself.
        run = jax.checkpoint(run, policy=policy(remat), prevent_cse=not scanned, static_argnums=0)
    if not scanned:
        for number, layer in enumerate(layers):
            place = Place(number, None if settings is None else settings[number])
            x, cache = run(*nnx.split(layer), place, x, cache)
        return x, cache
    graph, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    places = Place(jnp.arange(count, dtype=jnp.int32), None if settings is None else jnp.asarray(settings))

    def step(carry: tuple[jax.Array, Cache | None], member: tuple[Any, Place]) -> tuple[Any, None]:
        return run(graph, *member, *carry), None

    (x, cache), _ = jax.lax.scan(step, (x, cache), (state, places))
    return x, cache


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`(batch, time, n · h)` to `(batch, n, time, h)`."""
    batch, time, width = x.shape
    return x.reshape(batch, time, heads, width // heads).transpose(0, 2, 1, 3)


def join_heads(x: jax.Array) -> jax.Array:
    """The inverse of `split_heads`."""
    batch, heads, time, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, time, heads * width)


def remembered(
    cache: Cache | None, place: Place, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, Cache | None]:
    """The keys and values to attend to: these alone, or all of the cache, to which these are added."""
    if cache is None:
        return key, value, None
    cache = cache.write(place.number, key, value)
    return *cache.read(place.number), cache
