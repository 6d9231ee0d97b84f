"""The basic parts of the bundled models: linear layers, embedding tables, norms, attention and dropout.

Every linear layer is one dot with an `(in, out)` kernel, every embedding a lookup in a `(rows, d)` table, and no other
operation uses a weight, so `lora_jax.adapt` keeps all weights factored.

`dtype` is the dtype of the parameters and of the computation. Parameters are cast to it where they are used, so trained
leaves may be float32 in a bfloat16 model. Norms and softmax are computed in float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lora_jax.paths import path_key

Activation = Callable[[jax.Array], jax.Array]

_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

# Named as in Hugging Face configurations.
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
    """`x W + b`, or `x W` without a `bias`; `W` starts normal with standard deviation `deviation`."""
    init = nnx.initializers.normal(deviation)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Table(nnx.Embed):
    """An embedding table that starts normal with standard deviation `deviation`; an invalid index gives NaN."""

    def __init__(
        self, rows: int, features: int, *, deviation: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.normal(deviation)
        super().__init__(rows, features, embedding_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Int[Array, "*batch"], out_sharding: object = None) -> Float[Array, "*batch d"]:
        if self.num_embeddings > 1:
            return super().__call__(inputs, out_sharding)
        # Flax broadcasts a table of one row, whatever the index, and `adapt` wouldn't recognize that as a lookup.
        return jnp.take(self.embedding[...].astype(self.dtype), inputs, axis=0)


class Norm(nnx.LayerNorm):
    """Layer normalization, computed in float32 or wider, returned in `dtype`."""

    def __init__(self, features: int, *, epsilon: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=wide(dtype),
            param_dtype=dtype,
            use_fast_variance=False,  # E[x²] - E[x]² cancels if features are far from zero, like BERT's outliers
            rngs=rngs,
        )
        self.out_dtype = dtype

    def __call__(self, x: Float[Array, "*batch d"], *, mask: Array | None = None) -> Float[Array, "*batch d"]:
        return super().__call__(x, mask=mask).astype(self.out_dtype)


class RMSNorm(nnx.RMSNorm):
    """`x / √mean(x²) · scale`, computed in float32 or wider, returned in `dtype`."""

    def __init__(self, features: int, *, epsilon: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(features, epsilon=epsilon, dtype=wide(dtype), param_dtype=dtype, rngs=rngs)
        self.out_dtype = dtype

    def __call__(self, x: Float[Array, "*batch d"], mask: Array | None = None) -> Float[Array, "*batch d"]:
        return super().__call__(x, mask=mask).astype(self.out_dtype)


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Zeroes each element with probability `rate` and scales the others to keep the mean; the identity without a key.

    **Deviations.** `rate` is rounded to a multiple of 1/256 (0.1 becomes 0.1016), because one random byte decides each
    element. With Threefry on two CPU cores this takes 1.7 ms instead of 10.4 ms with 32-bit numbers (32 × 12 × 64 × 64
    elements), with which dropout would be a third of a training step.
    """
    dropped = min(max(1, round(rate * 256)), 255) if rate > 0 else 0
    if key is None or dropped == 0:
        return x
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(numbers >= dropped, x * (256 / (256 - dropped)), jnp.zeros_like(x))


def masked_mean(x: Float[Array, "batch time d"], mask: Bool[Array, "batch time"] | None) -> Float[Array, "batch d"]:
    """The mean over the tokens that aren't padding."""
    sums = wide(x.dtype)
    if mask is None:
        return x.mean(axis=1, dtype=sums).astype(x.dtype)
    weights = mask[:, :, None].astype(sums)
    return ((x.astype(sums) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)).astype(x.dtype)


def key_for(key: PRNGKeyArray | None, name: str) -> PRNGKeyArray | None:
    """The dropout key at `name`; `None` without a `key`."""
    return None if key is None else path_key(key, name)


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype for sums: `dtype`, or float32 if that is wider."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
