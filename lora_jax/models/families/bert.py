"""BERT in Flax NNX: embeddings, encoder layers, pooler, head.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805. Post-norm, learned absolute positions, exact gelu. Shapes: `batch` sequences of `time` tokens, `d`
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lora_jax.errors import ArgumentError

from ..checkpoint.tensor_names import TensorNames
from ..family import Family, encoder_architectures
from ..model_config import ModelConfig
from ..nn.attention import AttentionForm
from ..nn.encoder import Embeddings, Encoder
from ..nn.heads import Pooling
from ..nn.layers import ACTIVATIONS, dropout, key_for, linear, masked_mean
from ..nn.rematerialization import Remat


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """Sizes and settings of a BERT, named as in Hugging Face's `config.json`.

    Raises:
        ValueError: A size isn't a positive integer, the heads don't divide the width, the activation is unknown, or a
            dropout rate is outside [0, 1).
    """

    model_type: ClassVar[str] = "bert"

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("hidden_size", "num_attention_heads")
        self._check_choice("hidden_act", ACTIVATIONS)
        self._check_rate("hidden_dropout_prob")
        self._check_rate("attention_probs_dropout_prob")
        if self.classifier_dropout is not None:
            self._check_rate("classifier_dropout")
        self._check_positive("layer_norm_eps")

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def attention_output_dropout_prob(self) -> float:
        return self.hidden_dropout_prob

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def with_dropout(self, rate: float) -> Self:
        return dataclasses.replace(
            self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=None
        )

    @classmethod
    def _check_variant(cls, config: Mapping[str, object]) -> None:
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ArgumentError(f"`position_embedding_type` must be 'absolute', got {positions!r:.50}.")
        for name in ("is_decoder", "add_cross_attention"):
            if config.get(name):
                raise ArgumentError(f"`{name}` must be false: only encoders are implemented.")


class Bert(nnx.Module):
    """An encoder, with a head if `outputs` is given.

    Args:
        config: Sizes and settings.
        pooling: Input of the head: `"first"` for `tanh(W x + b)` of the first token's last hidden state, as in the
            paper and in transformers' `BertForSequenceClassification`, or `"mean"` for the mean of the hidden states
            over the tokens that aren't padding. Has no effect without a head.
        outputs: Number of logits; `None` for hidden states.
        dtype: Dtype of the computation. Parameters are cast to it where they are used, so trained leaves may be float32
            in a bfloat16 model. Norms and softmax are computed in float32 or wider.
        remat: Policy that decides which values of a layer are kept for the backward pass; `None` keeps all of them.
        attention: Form of the attention, see `attend`.
        rngs: Random streams for the initial values.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        pooling: Pooling,
        outputs: int | None,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        width, deviation = config.hidden_size, config.initializer_range
        self.dropout = config.head_dropout
        self.embeddings = Embeddings(config, token_types=config.type_vocab_size, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, remat=remat, attention=attention, rngs=rngs)
        pooled = outputs and pooling == "first"
        self.pooler = linear(width, width, deviation=deviation, dtype=dtype, rngs=rngs) if pooled else None
        self.classifier = linear(width, outputs, deviation=deviation, dtype=dtype, rngs=rngs) if outputs else None

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None,
        token_types: Int[Array, "batch time"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch time d"] | Float[Array, "batch outputs"]:
        """Computes hidden states, or logits if there is a head.

        Args:
            input_ids: Tokens.
            mask: False at padding; `None` for no padding.
            token_types: Token types; `None` for zeros.
            key: Dropout key; `None` for no dropout.
        """
        x = self.embeddings(input_ids, jnp.arange(input_ids.shape[1]), token_types, key)
        x = self.encoder(x, mask, key)
        if self.classifier is None:
            return x
        pooled = masked_mean(x, mask) if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        return self.classifier(dropout(pooled, self.dropout, key_for(key, "classifier")))


ENCODER_MODULES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layers/{}/attention/query": "encoder.layer.{}.attention.self.query",
    "encoder/layers/{}/attention/key": "encoder.layer.{}.attention.self.key",
    "encoder/layers/{}/attention/value": "encoder.layer.{}.attention.self.value",
    "encoder/layers/{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "encoder/layers/{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
    "encoder/layers/{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "encoder/layers/{}/mlp/down": "encoder.layer.{}.output.dense",
    "encoder/layers/{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}

BERT = Family(
    config=BertConfig,
    module=Bert,
    names=TensorNames(
        modules={**ENCODER_MODULES, "classifier": "classifier"},
        prefix="bert.",
        outside=("classifier",),
        unused=r"cls\..*",
    ),
    architectures=encoder_architectures("Bert"),
    sizes={
        "embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
        "embeddings.position_embeddings.weight": ("max_position_embeddings", "hidden_size"),
        "embeddings.token_type_embeddings.weight": ("type_vocab_size", "hidden_size"),
        "encoder.layer.0.intermediate.dense.weight": ("intermediate_size", "hidden_size"),
    },
    layers="num_hidden_layers",
    heads=("pooler", "classifier"),
    logits="classifier",
)
