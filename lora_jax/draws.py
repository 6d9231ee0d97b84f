"""Random numbers that are computed again from a seed wherever they are needed, and never stored.

A saved adapter means what it does by them, so they must not depend on JAX's version or settings, as those of
`jax.random` may: they come from the Threefry cipher itself, whose output its paper fixes.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def leaf_seed(seed: int, path: str) -> int:
    """The 32-bit seed of the leaf at `path`."""
    digest = hashlib.blake2s(f"{seed}/{path}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def random_bits(seed: jax.typing.ArrayLike, shape: Sequence[int], *, stream: jax.typing.ArrayLike = 0) -> jax.Array:
    """Uniform 32-bit words of the given shape; another `stream` of one seed is independent of it."""
    from jax.extend.random import threefry_2x32  # on first use: it brings Pallas along

    counts = lax.iota(jnp.uint32, math.prod(shape))
    words = threefry_2x32((jnp.asarray(seed, jnp.uint32), jnp.asarray(stream, jnp.uint32)), counts)
    return words.reshape(tuple(shape))


def spread_places(seed: jax.typing.ArrayLike, count: int, total: int) -> jax.Array:
    """`count` different numbers below `total`, ascending: one at random out of each of `count` equal parts.

    Every number has the same chance, `count / total`, up to the rounding of the parts' sizes.

    Example:
        >>> places = spread_places(7, 4, 12)
        >>> [int(place) // 3 for place in places]
        [0, 1, 2, 3]
    """
    width, rest = divmod(total, count)
    part = lax.iota(jnp.uint32, count)
    start = part * jnp.uint32(width) + jnp.minimum(part, jnp.uint32(rest))
    size = jnp.uint32(width) + (part < jnp.uint32(rest)).astype(jnp.uint32)
    return start + random_bits(seed, (count,)) % size


def permutation(seed: jax.typing.ArrayLike, size: int, *, stream: jax.typing.ArrayLike) -> jax.Array:
    """The numbers below `size` in random order."""
    return jnp.argsort(random_bits(seed, (size,), stream=stream))


def signs_and_normals(
    seed: jax.typing.ArrayLike, shape: Sequence[int], *, stream: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """A random sign and a standard normal number in each place, float32, from one word: its last bit, its first 23."""
    words = random_bits(seed, shape, stream=stream)
    signs = 1 - 2 * (words & jnp.uint32(1)).astype(jnp.float32)
    # Within (-1, 1): with a bit more, half a unit would be rounded away, and the largest word's normal be infinite.
    uniform = ((words >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-22) - 1
    return signs, jnp.float32(math.sqrt(2)) * lax.erf_inv(uniform)
