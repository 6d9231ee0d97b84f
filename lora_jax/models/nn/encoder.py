"""The encoder of BERT, RoBERTa and DistilBERT: embeddings, and layers of attention and MLP.

Post-norm, learned absolute positions. Shapes: `batch` sequences of `time` tokens, `d` features, `n` heads of
`h = d / n` features.
"""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .attention import AttentionForm, Scope, attend
from .insertion import InsertedAdapter, InsertedPrefix, adapted, with_prefix
from .layers import ACTIVATIONS, Norm, Table, dropout, key_for, linear
from .rematerialization import Remat, kept, policy


@runtime_checkable
class EncoderConfig(Protocol):
    """The configuration entries that the encoder reads, under BERT's names; other families have them as properties."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def hidden_dropout_prob(self) -> float: ...
    @property
    def attention_probs_dropout_prob(self) -> float: ...
    @property
    def attention_output_dropout_prob(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...


class Embeddings(nnx.Module):
    """Norm of the sum of the embeddings of a token, its position and, if there are `token_types`, its type."""

    def __init__(
        self, config: EncoderConfig, *, token_types: int | None, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ) -> None:
        table = functools.partial(
            Table, features=config.hidden_size, deviation=config.initializer_range, dtype=dtype, rngs=rngs
        )
        self.dropout = config.hidden_dropout_prob
        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.token_type = None if token_types is None else table(token_types)
        self.norm = Norm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        positions: Int[Array, "*batch time"],
        token_types: Int[Array, "batch time"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch time d"]:
        x = self.word(input_ids)
        if self.token_type is not None:
            x += self.token_type(jnp.zeros_like(input_ids) if token_types is None else token_types)
        return dropout(
            self.norm(x + self.position(jnp.atleast_2d(positions))), self.dropout, key_for(key, "embeddings")
        )


class Encoder(nnx.Module):
    """The stack of layers.

    Args:
        config: Sizes and settings.
        dtype: Dtype of the parameters and of the computation.
        remat: Policy that decides which values of a layer are kept for the backward pass; `None` keeps all of them.
        attention: Form of the attention, see `attend`.
        rngs: Random streams for the initial values.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.remat: Remat | None = remat
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, attention=attention, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(
        self, x: Float[Array, "batch time d"], mask: Bool[Array, "batch time"] | None, key: PRNGKeyArray | None
    ) -> Float[Array, "batch time d"]:
        run = Layer.__call__
        remat: Remat | None = self.remat
        if remat is not None:
            run = nnx.remat(run, policy=policy(remat))
        for index, layer in enumerate(self.layers):
            x = run(layer, x, mask, key_for(key, f"encoder/layers/{index}"))
        return x


class Layer(nnx.Module):
    def __init__(
        self, config: EncoderConfig, *, dtype: jax.typing.DTypeLike, attention: AttentionForm = "auto", rngs: nnx.Rngs
    ) -> None:
        self.attention = Attention(config, dtype=dtype, form=attention, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        return self.mlp(self.attention(x, mask, key), key)


class Attention(nnx.Module):
    def __init__(
        self, config: EncoderConfig, *, dtype: jax.typing.DTypeLike, form: AttentionForm = "auto", rngs: nnx.Rngs
    ) -> None:
        width = config.hidden_size
        square = functools.partial(linear, width, width, deviation=config.initializer_range, dtype=dtype, rngs=rngs)
        self.form: AttentionForm = form
        self.heads = config.num_attention_heads
        self.dropout = config.attention_output_dropout_prob
        self.probs_dropout = config.attention_probs_dropout_prob
        self.query = square()
        self.key = square()
        self.value = square()
        self.output = square()
        self.norm = Norm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.adapter: InsertedAdapter | None = None
        self.prefix: InsertedPrefix | None = None

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        batch, time, width = x.shape

        def heads(layer: nnx.Linear) -> jax.Array:
            return kept(layer(x)).reshape(batch, time, self.heads, width // self.heads).transpose(0, 2, 1, 3)

        probs_key = key_for(key, "attention/probs")
        k, v, length = with_prefix(self.prefix, heads(self.key), heads(self.value))
        context = attend(
            heads(self.query),
            k,
            v,
            Scope(mask=mask, causal=False, prefix=length),
            scale=(width // self.heads) ** -0.5,
            rate=self.probs_dropout,
            dropout_key=probs_key,
            attention=self.form,
        )
        context = context.transpose(0, 2, 1, 3).reshape(batch, time, width)
        y = dropout(kept(self.output(context)), self.dropout, key_for(key, "attention/output"))
        return self.norm(x + adapted(self.adapter, y))


class MLP(nnx.Module):
    def __init__(self, config: EncoderConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = config.hidden_dropout_prob
        self.up = linear(width, inner, deviation=config.initializer_range, dtype=dtype, rngs=rngs)
        self.down = linear(inner, width, deviation=config.initializer_range, dtype=dtype, rngs=rngs)
        self.norm = Norm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.adapter: InsertedAdapter | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        hidden = self.activation(kept(self.up(x)))
        y = dropout(kept(self.down(hidden)), self.dropout, key_for(key, "mlp/down"))
        return self.norm(x + adapted(self.adapter, y))
