"""`Cache`: the keys and values of the tokens that a decoder has seen, so that the next token costs only itself."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Cache(NamedTuple):
    """Keys and values in places that are taken beforehand, one a token: slots.

    A model's apply function makes one from a number of slots, fills it, and gives it back with its result:

        logits, cache = apply(params, prompt, mask, cache=64)
        logits, cache = apply(params, next_token, cache=cache)

    It is a pytree of arrays whose shapes stay the same, so it may be carried through `lax.while_loop`. With more
    tokens than slots the last ones would be written over: a caller counts. Outside `jit`, apply checks.

    Attributes:
        keys, values: `(layers, batch, heads, slots, h)`, the heads being those of keys and values.
        mask: `(batch, slots)` booleans, false at padding and at slots that are free.
        used: how many slots are taken, an int32 scalar; the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    used: jax.Array

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def with_tokens(self, mask: jax.Array | None, time: int) -> Cache:
        """With `time` more tokens in the mask; `used` stays, as the layers write from there."""
        new = jnp.ones((self.mask.shape[0], time), bool) if mask is None else mask
        return self._replace(mask=lax.dynamic_update_slice(self.mask, new, (jnp.int32(0), self.used)))

    def write(self, layer: jax.Array | int, key: jax.Array, value: jax.Array) -> Cache:
        """With a layer's `(batch, heads, time, h)` of the new tokens."""
        zero = jnp.int32(0)
        start = (jnp.asarray(layer, jnp.int32), zero, zero, self.used, zero)
        return self._replace(
            keys=lax.dynamic_update_slice(self.keys, key[None].astype(self.keys.dtype), start),
            values=lax.dynamic_update_slice(self.values, value[None].astype(self.values.dtype), start),
        )

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values, `(batch, heads, slots, h)`."""
        return (
            lax.dynamic_index_in_dim(self.keys, layer, keepdims=False),
            lax.dynamic_index_in_dim(self.values, layer, keepdims=False),
        )

    def rows(self, indices: jax.Array) -> Cache:
        """The rows of the batch at `indices`, which may repeat."""
        return self._replace(keys=self.keys[:, indices], values=self.values[:, indices], mask=self.mask[indices])


def empty_cache(sizes: tuple[int, int, int], *, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> Cache:
    """A cache without tokens.

    Args:
        sizes: layers, heads of keys and values, `h`.
        batch, slots: rows, and tokens that a row may have, padding included.
        dtype: of keys and values.

    Example:
        >>> cache = empty_cache((2, 4, 8), batch=3, slots=16, dtype=jnp.float32)
        >>> cache.keys.shape, cache.slots, int(cache.used)
        ((2, 3, 4, 16, 8), 16, 0)
    """
    layers, heads, width = sizes
    shape = (layers, batch, heads, slots, width)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32)
    )
