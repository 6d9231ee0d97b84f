"""RoBERTa in Flax NNX: BERT's encoder with different positions and a different head; XLM-RoBERTa is the same model.

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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lora_jax.errors import ArgumentError

from ..checkpoint.tensor_names import TensorNames
from ..family import encoder_architectures
from ..nn.attention import AttentionForm
from ..nn.encoder import Embeddings, Encoder
from ..nn.heads import DenseHead, Pooling, pool
from ..nn.rematerialization import Remat
from .bert import BERT, ENCODER_MODULES, BertConfig


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """BERT's sizes and settings, and the padding token, on which the positions depend.

    Raises:
        ValueError: As for BERT, or `pad_token_id` isn't a token or leaves no positions.
    """

    model_type: ClassVar[str] = "roberta"

    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise ArgumentError(
                f"`pad_token_id` must be a token, from 0 to {self.vocab_size - 1:,}, got {self.pad_token_id!r:.50}: "
                "positions are counted from it."
            )
        if self.max_length < 1:
            raise ArgumentError(
                f"`max_position_embeddings` must be more than `pad_token_id` + 1 ({self.pad_token_id + 1}), the first "
                f"position, got {self.max_position_embeddings}."
            )

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


class XlmRobertaConfig(RobertaConfig):
    """RoBERTa's configuration with another `model_type`."""

    model_type: ClassVar[str] = "xlm-roberta"


class Roberta(nnx.Module):
    """An encoder without a pooler, with a head of two layers if `outputs` is given.

    Args:
        config: Sizes and settings.
        pooling: Input of the head: the `"first"` token's last hidden state, as in transformers'
            `RobertaForSequenceClassification`, or the `"mean"` of the hidden states over the tokens that aren't
            padding.
        outputs, dtype, remat, attention, rngs: See `Bert`.
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
        self,
        input_ids: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None,
        token_types: Int[Array, "batch time"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch time d"] | Float[Array, "batch outputs"]:
        """Computes hidden states, or logits if there is a head; arguments as in `Bert`."""
        x = self.embeddings(input_ids, positions(input_ids, self.padding), token_types, key)
        x = self.encoder(x, mask, key)
        return x if self.classifier is None else self.classifier(pool(x, mask, self.pooling), key)


def positions(input_ids: Int[Array, "batch time"], padding: int) -> Int[Array, "batch time"]:
    """Positions `padding + 1`, `padding + 2`, … for the tokens of each sequence, and `padding` for its padding.

    As in transformers, padding is recognized by its token and not by the mask. Padding on the left doesn't change the
    positions of a text.

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
    # `RobertaModel` has a pooler, but the class with a head doesn't, so a pooler in a checkpoint is ignored.
    names=TensorNames(
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
