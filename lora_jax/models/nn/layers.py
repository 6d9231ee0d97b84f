"""What the bundled models are made of: linear layers, tables, norms, attention, dropout.

Every linear layer is one dot with an `(in, out)` kernel, every embedding a lookup in a `(rows, d)` table, and nothing
else touches a weight, so that `lora_jax.adapt` keeps them factored.

`dtype` is that of the parameters and of the computation. Parameters are cast to it where they are used, so trained
leaves may be float32 in a bfloat16 model. Norms and softmax are computed in float32 at least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.paths import path_key

Activation = Callable[[jax.Array], jax.Array]

_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

# By their names in Hugging Face configs.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _exact_gelu,
    "gelu_python": _exact_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def linear(
    inputs: int,
    outputs: int,
    *,
    deviation: float,
    dtype: jax.typing.DTypeLike,
    bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """`x W + b`, or `x W` without a `bias`; `W` starts normal with `deviation`."""
    init = nnx.initializers.normal(deviation)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Table(nnx.Embed):
    """A lookup of rows, which start normal with `deviation`; an index outside them gives NaN."""

    def __init__(
        self, rows: int, features: int, *, deviation: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.normal(deviation)
        super().__init__(rows, features, embedding_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.num_embeddings > 1:
            return super().__call__(inputs)
        # Flax broadcasts the row of a table that has one, whatever the index; and that is no lookup, to `adapt` either.
        return jnp.take(self.embedding[...].astype(self.dtype), inputs, axis=0)


class Norm(nnx.LayerNorm):
    """Layer normalization, computed in float32 at least, returned in `dtype`."""

    def __init__(self, features: int, *, epsilon: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=wide(dtype),
            param_dtype=dtype,
            use_fast_variance=False,  # E[x²] - E[x]² cancels where a feature is far from zero, as in BERT's outliers
            rngs=rngs,
        )
        self.out_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.out_dtype)


class RMSNorm(nnx.RMSNorm):
    """`x / √mean(x²) · scale`, computed in float32 at least, returned in `dtype`."""

    def __init__(self, features: int, *, epsilon: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(features, epsilon=epsilon, dtype=wide(dtype), param_dtype=dtype, rngs=rngs)
        self.out_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.out_dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the others to keep the mean; nothing without a key.

    **Deviations.** `rate` is rounded to a multiple of 1/256 (0.1 to 0.1016), because one random byte decides an
    element. With Threefry on two CPU cores this takes 1.7 ms where 32-bit numbers take 10.4 ms (32 × 12 × 64 × 64
    elements), and dropout would otherwise be a third of a training step.
    """
    dropped = min(max(1, round(rate * 256)), 255) if rate > 0 else 0
    if key is None or dropped == 0:
        return x
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(numbers >= dropped, x * (256 / (256 - dropped)), jnp.zeros_like(x))


def masked_mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean over the tokens that aren't padding: `(batch, time, d)` to `(batch, d)`."""
    sums = wide(x.dtype)
    if mask is None:
        return x.mean(axis=1, dtype=sums).astype(x.dtype)
    weights = mask[:, :, None].astype(sums)
    return ((x.astype(sums) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)).astype(x.dtype)


def key_for(key: jax.Array | None, name: str) -> jax.Array | None:
    """The key of the dropout at `name`; `None` if there is none."""
    return None if key is None else path_key(key, name)


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that sums are kept in: `dtype`, and float32 at least."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
