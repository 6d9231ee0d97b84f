"""BERT in Flax NNX: embeddings, encoder layers, pooler, head.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805. Post-norm, learned absolute positions, exact gelu. Shapes: `batch` sequences of `time` tokens, `d`
features, `n` heads of `h = d / n` features.

Every linear layer is one dot with an `(in, out)` kernel, every embedding a lookup in a `(rows, d)` table, and nothing
else touches a weight, so that `lora_jax.adapt` keeps them factored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..paths import path_key

Pooling = Literal["first", "mean"]
# Names of `jax.checkpoint_policies`, by how much of a layer the backward pass computes again: all of it, what is no
# matmul, what is no matmul of a weight.
Remat = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]

_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

# By the names of `hidden_act` in Hugging Face configs.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
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


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes and settings of a BERT, under their names in Hugging Face's `config.json`.

    Raises:
        ValueError: a size that is no positive integer, heads that don't divide the width, an unknown activation, a
            dropout rate outside [0, 1).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or not 0 < size < 2**31:
                raise ValueError(f"`{name}` must be a positive integer, not {size!r:.50}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"`hidden_act` {self.hidden_act!r:.50} is unknown; known are {', '.join(ACTIVATIONS)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if not (_is_number(rate) and 0 <= rate < 1) and not (name == "classifier_dropout" and rate is None):
                raise ValueError(f"`{name}` must be a number from 0 to below 1, not {rate!r:.50}.")
        for name in ("layer_norm_eps", "initializer_range"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be a positive number, not {getattr(self, name)!r:.50}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Takes the content of a `config.json`; entries that change nothing computed here are left aside.

        Raises:
            ValueError: another kind of model, a missing size, or a variant of BERT that isn't implemented.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"a model's configuration must be a JSON object, not {type(config).__name__}.")
        if config.get("model_type") != "bert":
            raise ValueError(
                f"`model_type` is {config.get('model_type')!r:.50}, and only 'bert' can be loaded. Another model's own "
                "JAX function works with `lora_jax.attach` and `lora_jax.adapt` as it is."
            )
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"`position_embedding_type` is {positions!r:.50}, and only 'absolute' is implemented.")
        for name in ("is_decoder", "add_cross_attention"):
            if config.get(name):
                raise ValueError(f"`{name}` is true, and only encoders are implemented.")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in config]:
            raise ValueError(f"the configuration lacks {', '.join(f'`{name}`' for name in missing)}.")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


SIZES = tuple(field.name for field in fields(BertConfig) if field.default is MISSING)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Bert(nnx.Module):
    """The encoder, and a head of `outputs` logits unless `outputs` is `None`.

    Args:
        config: sizes and settings.
        pooling: `"first"`: `tanh(W x + b)` of the first token's last hidden state, as in the paper and in
            transformers' `BertForSequenceClassification`; `"mean"`: the mean of the hidden states over the tokens that
            aren't padding. Not used without a head.
        outputs: logits of the head; `None` for hidden states.
        dtype: of the computation. Parameters are cast to it where they are used, so trained leaves may be float32 in
            a bfloat16 model. Norms and softmax are computed in float32 at least.
        remat: what of a layer is kept for the backward pass, the rest being computed again; `None` keeps all.
        rngs: for the initial values.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        pooling: Pooling,
        outputs: int | None,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.pooling = pooling
        self.dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, remat=remat, rngs=rngs)
        width = config.hidden_size
        self.pooler = _linear(config, width, width, dtype, rngs) if outputs and pooling == "first" else None
        self.classifier = _linear(config, width, outputs, dtype, rngs) if outputs else None

    def __call__(
        self, input_ids: jax.Array, mask: jax.Array | None, token_types: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Hidden states `(batch, time, d)`, or logits `(batch, outputs)`.

        Args:
            input_ids: `(batch, time)` integers.
            mask: `(batch, time)` booleans, false where there is padding; `None` for no padding.
            token_types: `(batch, time)` integers; `None` for zeros.
            key: of the dropout; `None` for none.
        """
        x = self.embeddings(input_ids, token_types, _key(key, "embeddings"))
        x = self.encoder(x, mask, key)
        if self.classifier is None:
            return x
        pooled = _masked_mean(x, mask) if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        return self.classifier(dropout(pooled, self.dropout, _key(key, "classifier")))


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        table = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.dropout = config.hidden_dropout_prob
        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.token_type = table(config.type_vocab_size)
        self.norm = Norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, token_types: jax.Array | None, key: jax.Array | None) -> jax.Array:
        if token_types is None:
            token_types = jnp.zeros_like(input_ids)
        positions = jnp.arange(input_ids.shape[1])
        x = self.word(input_ids) + self.token_type(token_types) + self.position(positions)
        return dropout(self.norm(x), self.dropout, key)


class Encoder(nnx.Module):
    def __init__(
        self, config: BertConfig, *, dtype: jax.typing.DTypeLike, remat: Remat | None = None, rngs: nnx.Rngs
    ) -> None:
        self.remat = remat
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        run = Layer.__call__
        if self.remat is not None:
            run = nnx.remat(run, policy=getattr(jax.checkpoint_policies, self.remat))
        for index, layer in enumerate(self.layers):
            x = run(layer, x, mask, _key(key, f"encoder/layers/{index}"))
        return x


class Layer(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        return self.mlp(self.attention(x, mask, key), key)


class Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.hidden_dropout_prob
        self.probs_dropout = config.attention_probs_dropout_prob
        self.query = _linear(config, width, width, dtype, rngs)
        self.key = _linear(config, width, width, dtype, rngs)
        self.value = _linear(config, width, width, dtype, rngs)
        self.output = _linear(config, width, width, dtype, rngs)
        self.norm = Norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        batch, time, width = x.shape

        def heads(linear: nnx.Linear) -> jax.Array:
            return linear(x).reshape(batch, time, self.heads, width // self.heads).transpose(0, 2, 1, 3)

        probs_key = _key(key, "attention/probs")
        context = attend(heads(self.query), heads(self.key), heads(self.value), mask, self.probs_dropout, probs_key)
        context = context.transpose(0, 2, 1, 3).reshape(batch, time, width)
        return self.norm(x + dropout(self.output(context), self.dropout, _key(key, "attention/output")))


class MLP(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = config.hidden_dropout_prob
        self.up = _linear(config, config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down = _linear(config, config.intermediate_size, config.hidden_size, dtype, rngs)
        self.norm = Norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        hidden = self.activation(self.up(x))
        return self.norm(x + dropout(self.down(hidden), self.dropout, _key(key, "mlp/down")))


class Norm(nnx.LayerNorm):
    """Layer normalization, computed in float32 at least, returned in `dtype`."""

    def __init__(self, config: BertConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(
            config.hidden_size,
            epsilon=config.layer_norm_eps,
            dtype=wide(dtype),
            param_dtype=dtype,
            use_fast_variance=False,  # E[x²] - E[x]² cancels where a feature is far from zero, as in BERT's outliers
            rngs=rngs,
        )
        self.out_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.out_dtype)


def _linear(config: BertConfig, inputs: int, outputs: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """`softmax(q kᵀ / √h) v`, with dropout on the probabilities.

    Args:
        query, key, value: `(batch, n, time, h)`.
        mask: `(batch, time)`, false at keys that are padding. A row that is padding throughout attends to all of it
            alike: finite, and without meaning.
        rate: of the dropout.
        dropout_key: `None` for none.

    Returns:
        `(batch, n, time, h)`.

    **Deviations.** Not `jax.nn.dot_product_attention`, which has no dropout and was slower on two CPU cores: 25 against
    20 ms for value and gradient at 32 × 64 tokens, 12 heads of 32, float32.
    """
    scores = jnp.einsum("bnth,bnsh->bnts", query, key, preferred_element_type=wide(query.dtype))
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        # The smallest number rather than -inf: a row of nothing but padding would become 0 / 0.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    probs = dropout(jax.nn.softmax(scores).astype(value.dtype), rate, dropout_key)
    return jnp.einsum("bnts,bnsh->bnth", probs, value)


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


def _masked_mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    sums = wide(x.dtype)
    if mask is None:
        return x.mean(axis=1, dtype=sums).astype(x.dtype)
    weights = mask[:, :, None].astype(sums)
    return ((x.astype(sums) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)).astype(x.dtype)


def _key(key: jax.Array | None, name: str) -> jax.Array | None:
    return None if key is None else path_key(key, name)


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that sums are kept in: `dtype`, and float32 at least."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
