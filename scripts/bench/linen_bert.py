"""The bundled BERT in Flax Linen, with the bundled model's own parameter tree: for rivals that take Linen only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Embeddings(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, name="word")(ids)
        x += nn.Embed(c.type_vocab_size, c.hidden_size, name="token_type")(jnp.zeros_like(ids))
        x += nn.Embed(c.max_position_embeddings, c.hidden_size, name="position")(jnp.arange(ids.shape[1]))
        return nn.LayerNorm(epsilon=c.layer_norm_eps, use_fast_variance=False, name="norm")(x)


class Attention(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        batch, time, width = x.shape
        heads = c.num_attention_heads

        def split(name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x).reshape(batch, time, heads, width // heads).transpose(0, 2, 1, 3)

        q, k, v = split("query"), split("key"), split("value")
        probs = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) * (width // heads) ** -0.5)
        context = jnp.einsum("bnts,bnsh->bnth", probs, v).transpose(0, 2, 1, 3).reshape(batch, time, width)
        x = x + nn.Dense(width, name="output")(context)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, use_fast_variance=False, name="norm")(x)


class MLP(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        hidden = jax.nn.gelu(nn.Dense(c.intermediate_size, name="up")(x), approximate=False)
        x = x + nn.Dense(c.hidden_size, name="down")(hidden)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, use_fast_variance=False, name="norm")(x)


class Layer(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return MLP(self.config, name="mlp")(Attention(self.config, name="attention")(x))


class Layers(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=str(index))(x)
        return x


class Encoder(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Layers(self.config, name="layers")(x)


class Bert(nn.Module):
    """Logits `(batch, labels)` of the first token's pooler; no padding."""

    config: Any
    labels: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = Encoder(self.config, name="encoder")(Embeddings(self.config, name="embeddings")(ids))
        pooled = jnp.tanh(nn.Dense(self.config.hidden_size, name="pooler")(x[:, 0]))
        return nn.Dense(self.labels, name="classifier")(pooled)
