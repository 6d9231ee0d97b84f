"""DistilBERT in Flax NNX: BERT's encoder with half the layers, no token types, no pooler, and a different head.

Sanh et al., "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", 2019, arXiv:1910.01108.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..checkpoint.tensor_names import TensorNames
from ..family import Family, encoder_architectures
from ..model_config import ModelConfig
from ..nn.attention import AttentionForm
from ..nn.encoder import Embeddings, Encoder
from ..nn.heads import DenseHead, Pooling, pool
from ..nn.layers import ACTIVATIONS
from ..nn.rematerialization import Remat


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(ModelConfig):
    """Sizes and settings of a DistilBERT, named as in Hugging Face's `config.json`.

    `sinusoidal_pos_embds` says how the table of positions was initialized. It is read from the checkpoint in any case.

    Raises:
        ValueError: A size isn't a positive integer, the heads don't divide the width, the activation is unknown, or a
            dropout rate is outside [0, 1).

    **Deviations.** The sinusoidal table of the first versions was never trained; here, as in transformers 5, it is a
    parameter like any other, and full fine-tuning trains it.
    """

    model_type: ClassVar[str] = "distilbert"

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    max_position_embeddings: int
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    sinusoidal_pos_embds: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("dim", "n_heads")
        self._check_choice("activation", ACTIVATIONS)
        for name in ("dropout", "attention_dropout", "seq_classif_dropout"):
            self._check_rate(name)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    def with_dropout(self, rate: float) -> Self:
        return dataclasses.replace(self, dropout=rate, attention_dropout=rate, seq_classif_dropout=rate)

    # The names that the encoder reads, see `EncoderConfig`.

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def intermediate_size(self) -> int:
        return self.hidden_dim

    @property
    def hidden_act(self) -> str:
        return self.activation

    @property
    def hidden_dropout_prob(self) -> float:
        return self.dropout

    @property
    def attention_probs_dropout_prob(self) -> float:
        return self.attention_dropout

    @property
    def attention_output_dropout_prob(self) -> float:
        return 0.0

    @property
    def layer_norm_eps(self) -> float:
        return 1e-12


class DistilBert(nnx.Module):
    """An encoder, with a head of two layers if `outputs` is given.

    transformers names the head's layers `pre_classifier` and `classifier`. Here both are below `classifier`: a base
    has neither, so `also_train=("classifier",)` must train them together.

    Args:
        config: Sizes and settings.
        pooling: Input of the head: the `"first"` token's last hidden state, as in transformers'
            `DistilBertForSequenceClassification`, or the `"mean"` of the hidden states over the tokens that aren't
            padding.
        outputs, dtype, remat, attention, rngs: See `Bert`.
    """

    def __init__(
        self,
        config: DistilBertConfig,
        *,
        pooling: Pooling,
        outputs: int | None,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.pooling: Pooling = pooling
        self.embeddings = Embeddings(config, token_types=None, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, remat=remat, attention=attention, rngs=rngs)
        self.classifier = (
            DenseHead(
                config.dim,
                outputs,
                activation=jax.nn.relu,
                input_dropout=0.0,
                dropout=config.seq_classif_dropout,
                deviation=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
            )
            if outputs
            else None
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None,
        token_types: Int[Array, "batch time"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch time d"] | Float[Array, "batch outputs"]:
        """Computes hidden states, or logits if there is a head; arguments as in `Bert`.

        `token_types` are ignored. They are accepted because the tokenizer, BERT's, returns them.
        """
        del token_types
        x = self.embeddings(input_ids, jnp.arange(input_ids.shape[1]), None, key)
        x = self.encoder(x, mask, key)
        return x if self.classifier is None else self.classifier(pool(x, mask, self.pooling), key)


DISTILBERT = Family(
    config=DistilBertConfig,
    module=DistilBert,
    names=TensorNames(
        modules={
            "embeddings/word": "embeddings.word_embeddings",
            "embeddings/position": "embeddings.position_embeddings",
            "embeddings/norm": "embeddings.LayerNorm",
            "encoder/layers/{}/attention/query": "transformer.layer.{}.attention.q_lin",
            "encoder/layers/{}/attention/key": "transformer.layer.{}.attention.k_lin",
            "encoder/layers/{}/attention/value": "transformer.layer.{}.attention.v_lin",
            "encoder/layers/{}/attention/output": "transformer.layer.{}.attention.out_lin",
            "encoder/layers/{}/attention/norm": "transformer.layer.{}.sa_layer_norm",
            "encoder/layers/{}/mlp/up": "transformer.layer.{}.ffn.lin1",
            "encoder/layers/{}/mlp/down": "transformer.layer.{}.ffn.lin2",
            "encoder/layers/{}/mlp/norm": "transformer.layer.{}.output_layer_norm",
            "classifier/dense": "pre_classifier",
            "classifier/output": "classifier",
        },
        prefix="distilbert.",
        outside=("classifier",),
        unused=r"vocab_(transform|layer_norm|projector)\..*",
    ),
    architectures=encoder_architectures("DistilBert"),
    sizes={
        "embeddings.word_embeddings.weight": ("vocab_size", "dim"),
        "embeddings.position_embeddings.weight": ("max_position_embeddings", "dim"),
        "transformer.layer.0.ffn.lin1.weight": ("hidden_dim", "dim"),
    },
    layers="n_layers",
    heads=("classifier",),
    logits="classifier/output",
)
