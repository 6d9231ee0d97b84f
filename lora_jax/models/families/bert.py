"""BERT in Flax NNX: embeddings, encoder layers, pooler, head.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805. Post-norm, learned absolute positions, exact gelu. Shapes: `batch` sequences of `time` tokens, `d`
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import ArgumentError

from ..checkpoint.name_table import NameTable
from ..family import Family, encoder_architectures
from ..model_config import ModelConfig
from ..nn.attention import AttentionForm
from ..nn.encoder import Embeddings, Encoder
from ..nn.heads import Pooling
from ..nn.layers import ACTIVATIONS, dropout, key_for, linear, masked_mean
from ..nn.rematerialization import Remat


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """The sizes and settings of a BERT, under their names in Hugging Face's `config.json`.

    Raises:
        ValueError: a size that is no positive integer, heads that don't divide the width, an unknown activation, a
            dropout rate outside [0, 1).
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
    def _check_variant(cls, config: Mapping[str, Any]) -> None:
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ArgumentError(f"`position_embedding_type` is {positions!r:.50}, and only 'absolute' is implemented.")
        for name in ("is_decoder", "add_cross_attention"):
            if config.get(name):
                raise ArgumentError(f"`{name}` is true, and only encoders are implemented.")


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
        attention: The form of the attention, see `attend`.
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
        self, input_ids: jax.Array, mask: jax.Array | None, token_types: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Hidden states `(batch, time, d)`, or logits `(batch, outputs)`.

        Args:
            input_ids: `(batch, time)` integers.
            mask: `(batch, time)` booleans, false where there is padding; `None` for no padding.
            token_types: `(batch, time)` integers; `None` for zeros.
            key: of the dropout; `None` for none.
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
    names=NameTable(
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
