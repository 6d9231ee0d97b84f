"""From hidden states to logits: pooling, and a head of two layers."""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .layers import Activation, dropout, key_for, linear, masked_mean

Pooling = Literal["first", "mean"]


def pool(
    x: Float[Array, "batch time d"], mask: Bool[Array, "batch time"] | None, pooling: Pooling
) -> Float[Array, "batch d"]:
    """The first token's hidden state, or the mean over the tokens that aren't padding."""
    return x[:, 0] if pooling == "first" else masked_mean(x, mask)


class DenseHead(nnx.Module):
    """`W₂ f(W₁ x + b₁) + b₂`, the head of RoBERTa and DistilBERT.

    Both layers start random and are below one module, `classifier`, so that they are trained together.

    Args:
        width: Number of features of the input and of the hidden layer.
        outputs: Number of logits.
        activation: Activation function `f`.
        input_dropout: Dropout rate of the input.
        dropout: Dropout rate of the hidden layer.
        deviation: Standard deviation of the initial weights.
        dtype: Dtype of the parameters and of the computation.
        rngs: Random streams for the initial values.
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

    def __call__(self, x: Float[Array, "batch d"], key: PRNGKeyArray | None) -> Float[Array, "batch outputs"]:
        x = dropout(x, self.input_dropout, key_for(key, "classifier/dense"))
        x = self.activation(self.dense(x))
        return self.output(dropout(x, self.dropout, key_for(key, "classifier/output")))
