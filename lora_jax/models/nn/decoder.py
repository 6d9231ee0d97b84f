"""The decoder that all families share: from tokens to hidden states or logits, with or without a cache.

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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..model_config import ModelConfig
from .attention import AttentionForm, Scope
from .cache import Cache
from .causal import runs
from .layers import Table, key_for
from .rematerialization import Remat, policy
from .rope import Rotation


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Base of the decoders' configurations."""

    # Whether positions are limited by a table of embeddings, unlike rotary ones.
    bounded_positions: ClassVar[bool] = True
    tie_word_embeddings: bool = False

    @property
    @abc.abstractmethod
    def cache_sizes(self) -> tuple[int, int, int]:
        """Numbers of layers, of heads of keys and values, and of features per head."""


# `with_head(hidden, head, tied)`: what takes the place of the logits.
WithHead = Callable[[jax.Array, jax.Array, bool], Any]


class Context(NamedTuple):
    """Inputs that all layers share.

    Attributes:
        scope: Slots that each token attends to. If only some layers have its window, `settings` tells which.
        rotation: Rotation of queries and keys; `None` if the embeddings include the positions.
        attention: Form of the attention, see `attend`.
    """

    scope: Scope
    rotation: Rotation | None = None
    attention: AttentionForm = "auto"


class Place(NamedTuple):
    """Inputs that differ between layers.

    Attributes:
        number: Index of the layer; traced in a scan.
        setting: The layer's entry of `Decoder.settings`; `None` if all layers are alike.
    """

    number: Int[Array, ""] | int
    setting: Shaped[Array, ""] | None


class Decoder(nnx.Module):
    """Embeddings, layers, a norm, and logits if there is a head.

    A family defines in `embed` and `context` how tokens and positions enter, and in `settings` how its layers differ.

    Attributes:
        embeddings: Module with a table `word`.
        layers: An `nnx.List`, or one module whose parameters have a leading axis over the layers, to be scanned.
        norm: Norm after the last layer.
        lm_head: Untied head; `None` if the head is tied to `word` or there is none.
        has_head: Whether the result is logits.
        remat: Policy of rematerialization, see `Encoder`.
        attention: Form of the attention, see `attend`.
    """

    embeddings: Any  # the families' modules, of which only `word` is common
    layers: nnx.Module
    norm: nnx.LayerNorm | nnx.RMSNorm
    lm_head: nnx.Linear | None
    has_head: bool
    remat: Remat | None
    attention: AttentionForm

    def embed(
        self,
        input_ids: Int[Array, "batch time"],
        positions: Int[Array, "batch_or_1 time"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch time d"]:
        """Computes the input of the first layer."""
        raise NotImplementedError

    def context(self, scope: Scope, positions: Int[Array, "batch_or_1 time"]) -> Context:
        """Makes the inputs that the layers share.

        Args:
            scope: Slots that these tokens attend to, without a window.
            positions: Positions of the tokens; the leading axis is the batch, or 1.
        """
        raise NotImplementedError

    def settings(self) -> Shaped[np.ndarray, " layers"] | None:
        """One value per layer that the family defines; `None` if all layers are alike."""
        return None

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None,
        positions: Int[Array, "batch time"] | None,
        cache: Cache | None,
        key: PRNGKeyArray | None,
        *,
        segments: Int[Array, "batch time"] | None = None,
        last_only: bool = False,
        with_head: WithHead | None = None,
    ) -> tuple[Any, Cache | None]:
        """Computes hidden states or logits, and the cache with these tokens.

        Args:
            input_ids: Tokens.
            mask: False at padding; `None` for no padding.
            positions: Positions; `None` counts the slots, starting anew in each segment.
            cache: Cache of the preceding tokens; `None` for none.
            key: Dropout key; `None` for no dropout.
            segments: Segment numbers: each run of equal numbers is a sequence of its own. `None` for one sequence a
                row. Can't be combined with a cache.
            last_only: Whether to compute the result only for the last token of each row.
            with_head: Function that is called with the hidden states and the head in place of computing logits; its
                result is the model's.
        """
        time = input_ids.shape[1]
        start: jax.Array | int = 0 if cache is None else cache.used
        counted = (start + jnp.arange(time))[None]
        if segments is not None:
            segments, counted = runs(segments)
        positions = counted if positions is None else positions
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


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, *, scan: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `count` layers: an `nnx.List`, or, for a scan, one layer whose parameters have a leading axis."""
    if scan:
        return nnx.split_rngs(splits=count)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
    return nnx.List([make(rngs) for _ in range(count)])


def run_layers(
    layers: nnx.Module,
    x: Float[Array, "batch time d"],
    context: Context,
    cache: Cache | None,
    key: PRNGKeyArray | None,
    *,
    settings: Shaped[np.ndarray, " layers"] | None,
    remat: Remat | None,
) -> tuple[Float[Array, "batch time d"], Cache | None]:
    """Runs `x` through the layers, in a Python loop or in a scan; both give the same numbers.

    A layer is called with `(x, context, place, cache, key)` and returns `x` and the cache. The scan carries the whole
    cache, and each layer writes its part in place. Scanned over as slices, the cache would be copied at every token.
    """
    scanned = not isinstance(layers, nnx.List)

    def run(
        graph: nnx.GraphDef[Any], state: PyTree, place: Place, x: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        layer_key = None if key is None else jax.random.fold_in(key, place.number)
        return nnx.merge(graph, state)(x, context, place, cache, layer_key)

    if remat is not None:
        # A scan needs no protection against common-subexpression elimination.
        run = jax.checkpoint(run, policy=policy(remat), prevent_cse=not scanned, static_argnums=0)
    if not scanned:
        for number, layer in enumerate(layers):
            place = Place(number, None if settings is None else jnp.asarray(settings[number]))
            x, cache = run(*nnx.split(layer), place, x, cache)
        return x, cache
    graph, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    places = Place(jnp.arange(count, dtype=jnp.int32), None if settings is None else jnp.asarray(settings))

    def step(
        carry: tuple[Array, Cache | None], member: tuple[PyTree, Place]
    ) -> tuple[tuple[Array, Cache | None], None]:
        return run(graph, *member, *carry), None

    (x, cache), _ = jax.lax.scan(step, (x, cache), (state, places))
    return x, cache


def split_heads(x: Float[Array, "batch time d"], heads: int) -> Float[Array, "batch n time h"]:
    """Splits the features into heads."""
    batch, time, width = x.shape
    return x.reshape(batch, time, heads, width // heads).transpose(0, 2, 1, 3)


def join_heads(x: Float[Array, "batch n time h"]) -> Float[Array, "batch time d"]:
    """The inverse of `split_heads`."""
    batch, heads, time, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, time, heads * width)


def remembered(
    cache: Cache | None, place: Place, key: Float[Array, "batch n time h"], value: Float[Array, "batch n time h"]
) -> tuple[Float[Array, "batch n slots h"], Float[Array, "batch n slots h"], Cache | None]:
    """The keys and values to attend to: the given ones, or the whole cache after they are added to it."""
    if cache is None:
        return key, value, None
    cache = cache.write(place.number, key, value)
    return *cache.read(place.number), cache
