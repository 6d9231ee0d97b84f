"""RoBERTa in Flax NNX: BERT's encoder with other positions and another head. XLM-RoBERTa is the same computation.

Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019, arXiv:1907.11692. Conneau et al.,
"Unsupervised Cross-lingual Representation Learning at Scale", 2019, arXiv:1911.02116.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import ArgumentError

from ..checkpoint.name_table import NameTable
from ..family import encoder_architectures
from ..nn.attention import AttentionForm
from ..nn.encoder import Embeddings, Encoder
from ..nn.heads import DenseHead, Pooling, pool
from ..nn.rematerialization import Remat
from .bert import BERT, ENCODER_MODULES, BertConfig


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """BERT's sizes and settings, and the token of padding, on which the positions depend.

    Raises:
        ValueError: as for BERT; a `pad_token_id` that is no token, or leaves no positions.
    """

    model_type: ClassVar[str] = "roberta"

    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise ArgumentError(
                f"`pad_token_id` must be a token, from 0 to {self.vocab_size - 1:,}, not {self.pad_token_id!r:.50}: "
                "positions are counted from it."
            )
        if self.max_length < 1:
            raise ArgumentError(
                f"`max_position_embeddings` ({self.max_position_embeddings}) must be more than `pad_token_id` + 1 "
                f"({self.pad_token_id + 1}), where the positions of tokens begin."
            )

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


class XlmRobertaConfig(RobertaConfig):
    """RoBERTa's, under the other name."""

    model_type: ClassVar[str] = "xlm-roberta"


class Roberta(nnx.Module):
    """The encoder, and a head of two layers with `outputs` logits unless `outputs` is `None`.

    Args:
        config: sizes and settings.
        pooling: what the head sees: the `"first"` token's last hidden state, as in transformers'
            `RobertaForSequenceClassification`; or the `"mean"` of the hidden states over the tokens that aren't
            padding. There is no pooler.
        outputs, dtype, remat, attention, rngs: see `Bert`.
    """

    def __init__(
        self,
        config: RobertaConfig,
        *,
        pooling: Pooling,
        outputs: int | None,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.pooling: Pooling = pooling
        self.padding = config.pad_token_id
        self.embeddings = Embeddings(config, token_types=config.type_vocab_size, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, remat=remat, attention=attention, rngs=rngs)
        self.classifier = (
            DenseHead(
                config.hidden_size,
                outputs,
                activation=jnp.tanh,
                input_dropout=config.head_dropout,
                dropout=config.head_dropout,
                deviation=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
            )
            if outputs
            else None
        )

    def __call__(
        self, input_ids: jax.Array, mask: jax.Array | None, token_types: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Hidden states `(batch, time, d)`, or logits `(batch, outputs)`; arguments as in `Bert`."""
        x = self.embeddings(input_ids, positions(input_ids, self.padding), token_types, key)
        x = self.encoder(x, mask, key)
        return x if self.classifier is None else self.classifier(pool(x, mask, self.pooling), key)


def positions(input_ids: jax.Array, padding: int) -> jax.Array:
    """`padding + 1`, `padding + 2`, … for a row's tokens in turn, and `padding` for its padding.

    Padding is told by its token and not by the mask, as in transformers: text that is padded on the left has the
    positions that it has alone.

    Example:
        >>> positions(jnp.array([[0, 5, 2, 1], [1, 0, 5, 2]]), 1).tolist()
        [[2, 3, 4, 1], [1, 2, 3, 4]]
    """
    tokens = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(tokens, axis=1) * tokens + padding


ROBERTA = dataclasses.replace(
    BERT,
    config=RobertaConfig,
    module=Roberta,
    # `RobertaModel` has a pooler, the class with a head has none: a checkpoint's is left aside.
    names=NameTable(
        modules={
            **ENCODER_MODULES,
            "classifier/dense": "classifier.dense",
            "classifier/output": "classifier.out_proj",
        },
        prefix="roberta.",
        outside=("classifier",),
        unused=r"lm_head\..*",
    ),
    architectures=encoder_architectures("Roberta"),
    logits="classifier/output",
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, config=XlmRobertaConfig, architectures=encoder_architectures("XLMRoberta"))
