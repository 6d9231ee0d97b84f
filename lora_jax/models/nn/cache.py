"""`Cache`: the keys and values of the tokens so far, so that a decoder runs only the new ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
    """Keys and values in preallocated slots, one per token.

    A model's apply function creates a cache from a number of slots, fills it, and returns it with its result:

        logits, cache = apply(params, prompt, mask, cache=64)
        logits, cache = apply(params, next_token, cache=cache)

    It is a pytree of arrays with constant shapes, so `lax.while_loop` can carry it. More tokens than slots would
    overwrite the last ones. Outside `jit`, the apply function checks this; inside, the caller must.

    Attributes:
        keys, values: Keys and values, with the heads of keys and values.
        mask: False at padding and in free slots.
        used: Number of used slots, an int32 scalar; the same for all sequences.
    """

    keys: Float[Array, "layers batch heads slots h"]
    values: Float[Array, "layers batch heads slots h"]
    mask: Bool[Array, "batch slots"]
    used: Int[Array, ""]

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def with_tokens(self, mask: Bool[Array, "batch time"] | None, time: int) -> Cache:
        """A copy with `time` more tokens in its mask; `used` is unchanged, because the layers write from there."""
        new = jnp.ones((self.mask.shape[0], time), bool) if mask is None else mask
        return self._replace(mask=lax.dynamic_update_slice(self.mask, new, (jnp.int32(0), self.used)))

    def write(
        self,
        layer: Int[Array, ""] | int,
        key: Float[Array, "batch heads time h"],
        value: Float[Array, "batch heads time h"],
    ) -> Cache:
        """A copy with one layer's keys and values of the new tokens."""
        zero = jnp.int32(0)
        start = (jnp.asarray(layer, jnp.int32), zero, zero, self.used, zero)
        return self._replace(
            keys=lax.dynamic_update_slice(self.keys, key[None].astype(self.keys.dtype), start),
            values=lax.dynamic_update_slice(self.values, value[None].astype(self.values.dtype), start),
        )

    def read(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "batch heads slots h"], Float[Array, "batch heads slots h"]]:
        """One layer's keys and values."""
        return (
            lax.dynamic_index_in_dim(self.keys, layer, keepdims=False),
            lax.dynamic_index_in_dim(self.values, layer, keepdims=False),
        )

    def rows(self, indices: Int[Array, " rows"]) -> Cache:
        """A cache with the sequences at `indices` of the batch, which may repeat."""
        return self._replace(keys=self.keys[:, indices], values=self.values[:, indices], mask=self.mask[indices])


def empty_cache(sizes: tuple[int, int, int], *, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """Makes a cache without tokens.

    Args:
        sizes: Numbers of layers, of heads of keys and values, and of features per head.
        batch: Number of sequences.
        slots: Maximum number of tokens in a sequence, including padding.
        dtype: Dtype of keys and values.

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
