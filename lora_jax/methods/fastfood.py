"""The Fastfood transform: a random projection that is computed from a seed and takes no memory of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from ..draws import permutation, signs_and_normals

# The Walsh-Hadamard matrix of 2^m rows is a Kronecker product of smaller ones. Multiplying by factors of 2^5 rows
# takes m / 5 passes over memory; butterflies take m.
_FACTOR = 5
_CHUNK = 2**19  # rows computed at once


def padded_length(dimension: int) -> int:
    """Number of rows and columns in a block of the transform: the next power of two from `dimension` on."""
    return 1 << (dimension - 1).bit_length()


@functools.partial(jax.jit, static_argnames="count")
def fastfood(vector: Float[Array, " d"], seed: UInt32[Array, ""], *, count: int) -> Float[Array, " count"]:
    """`V x` with a random matrix `V (count, d)` of blocks `H G Π H B`, in `O(count · log d)`.

    `L` is the next power of two from `d` on, `B` a diagonal of random signs, `H` the Walsh-Hadamard matrix `(L, L)` of
    entries ±1, `Π` a random permutation and `G` a diagonal of standard normal numbers; `x` is padded with zeros.
    `⌈count / L⌉` blocks are stacked, and the first `count` rows are taken. An entry of `V` has mean 0 and variance `L`.

    Everything is computed again from `seed` in the backward pass, where `Vᵀ` is applied. Both passes go through the
    rows in chunks, so that beside the result only one chunk is in memory.

    Args:
        vector: `x (d,)`, float32.
        seed: Seed of `B`, `G` and `Π`.
        count: Number of rows.

    Returns:
        `(count,)`, float32.

    Example:
        >>> fastfood(jnp.ones(3), jnp.uint32(0), count=10).shape
        (10,)

    Reference:
        Le, Sarlós, Smola, "Fastfood: Approximating Kernel Expansions in Loglinear Time", ICML 2013, equation 4.

    Deviations:
        `Π` is the same in all blocks, so that it moves whole rows in memory; each block has its own `B` and `G`. The
        diagonal `S`, which gives rows the lengths of a Gaussian kernel's, is left out, as in Li et al. (2018).
    """

    length = padded_length(vector.shape[0])
    blocks = -(-count // length)
    width = min(blocks, max(1, _CHUNK // length))

    @jax.checkpoint
    def chunk(filled: jax.Array, order: jax.Array, number: jax.Array) -> jax.Array:
        signs, normals = signs_and_normals(seed, (length, width), stream=1 + number)
        return hadamard(normals * hadamard(signs * filled[:, None])[order]).ravel()

    filled = jnp.pad(vector, (0, length - vector.shape[0]))
    order = permutation(seed, length, stream=0)
    numbers = lax.iota(jnp.uint32, -(-blocks // width))
    return lax.map(lambda number: chunk(filled, order, number), numbers).reshape(-1)[:count]


def hadamard(columns: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    """`H x` for each column, with the Walsh-Hadamard matrix `H` in Sylvester's order; `rows` is a power of two.

    Example:
        >>> hadamard(jnp.array([[1.0], [2.0]])).ravel().tolist()
        [3.0, -1.0]
    """
    rows, width = columns.shape
    done, left = 1, rows.bit_length() - 1
    while left:
        power = min(_FACTOR, left)
        size = 2**power
        split = columns.reshape(done, size, -1, width)
        columns = jnp.einsum("ij,djrw->dirw", _sylvester(power), split, precision=lax.Precision.HIGHEST)
        done, left = done * size, left - power
    return columns.reshape(rows, width)


def _sylvester(power: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
