"""From hidden states to logits: what a head sees of a text, and the head of two layers."""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx

from .layers import Activation, dropout, key_for, linear, masked_mean

Pooling = Literal["first", "mean"]


def pool(x: jax.Array, mask: jax.Array | None, pooling: Pooling) -> jax.Array:
    """The first token's hidden state, or the mean over the tokens that aren't padding; `(batch, d)`."""
    return x[:, 0] if pooling == "first" else masked_mean(x, mask)


class DenseHead(nnx.Module):
    """`W₂ f(W₁ x + b₁) + b₂`, the head of RoBERTa and DistilBERT.

    Both layers start random and lie below one module, `classifier`: whoever trains the head trains both.

    Args:
        width: `d`, of what comes in and of what is between the layers.
        outputs: how many logits.
        activation: `f`.
        input_dropout: rate for `x`.
        dropout: rate for what is between the layers.
        deviation: of the initial weights.
        dtype: of parameters and computation.
        rngs: for the initial values.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        activation: Activation,
        input_dropout: float,
        dropout: float,
        deviation: float,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.input_dropout = input_dropout
        self.dropout = dropout
        self.dense = linear(width, width, deviation=deviation, dtype=dtype, rngs=rngs)
        self.output = linear(width, outputs, deviation=deviation, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = dropout(x, self.input_dropout, key_for(key, "classifier/dense"))
        x = self.activation(self.dense(x))
        return self.output(dropout(x, self.dropout, key_for(key, "classifier/output")))
