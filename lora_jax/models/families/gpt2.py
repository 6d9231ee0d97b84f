"""GPT-2 in Flax NNX: learned positions, one matmul for query, key and value, and a head tied to the embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.errors import ArgumentError

from ..checkpoint.tensor_names import TensorNames
from ..family import Family, decoder_architectures
from ..nn.attention import AttentionForm, Scope, attend
from ..nn.cache import Cache
from ..nn.decoder import Context, Decoder, DecoderConfig, Place, join_heads, make_layers, remembered, split_heads
from ..nn.insertion import InsertedAdapter, InsertedPrefix, adapted, with_prefix
from ..nn.layers import ACTIVATIONS, Norm, Table, dropout, key_for, linear
from ..nn.rematerialization import Remat, kept


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """Sizes and settings of a GPT-2, named as in Hugging Face's `config.json`.

    `reorder_and_upcast_attn`, which asks for scores in float32, has no effect: they always are.

    Raises:
        ValueError: A size isn't a positive integer, the heads don't divide the width, the activation is unknown, or a
            dropout rate is outside [0, 1).
    """

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("n_embd", "n_head")
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        self._check_size("n_inner")
        self._check_choice("activation_function", ACTIVATIONS)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            self._check_rate(name)
        self._check_positive("layer_norm_epsilon")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            self._check_flag(name)

    @property
    def max_length(self) -> int:
        return self.n_positions

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.n_layer, self.n_head, self.n_embd // self.n_head

    def with_dropout(self, rate: float) -> Self:
        return dataclasses.replace(self, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)

    @classmethod
    def _check_variant(cls, config: Mapping[str, object]) -> None:
        if config.get("add_cross_attention"):
            raise ArgumentError("`add_cross_attention` must be false: decoders with an encoder aren't implemented.")


class Gpt2(Decoder):
    """A decoder.

    Args:
        config: Sizes and settings.
        head: Whether to compute logits rather than hidden states.
        dtype: Dtype of the parameters and of the computation, see `Bert`.
        remat: Policy of rematerialization, see `Encoder`.
        scan: Whether to stack the layers and run them in a scan.
        attention: Form of the attention, see `attend`.
        rngs: Random streams for the initial values.
    """

    def __init__(
        self,
        config: Gpt2Config,
        *,
        head: bool,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        scan: bool = False,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        width, deviation = config.n_embd, config.initializer_range
        self.config = config
        self.has_head = head
        self.remat = remat
        self.attention: AttentionForm = attention
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs), config.n_layer, scan=scan, rngs=rngs
        )
        self.norm = Norm(width, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        untied = head and not config.tie_word_embeddings
        self.lm_head = (
            linear(width, config.vocab_size, bias=False, deviation=deviation, dtype=dtype, rngs=rngs)
            if untied
            else None
        )

    def embed(self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.embeddings(input_ids, positions, key)

    def context(self, scope: Scope, positions: jax.Array) -> Context:
        del positions  # the embeddings include them
        return Context(scope, attention=self.attention)

    def settings(self) -> np.ndarray | None:
        """Divisor of each layer's scores, besides `√h`."""
        if not self.config.scale_attn_by_inverse_layer_idx:
            return None
        return np.arange(1, self.config.n_layer + 1, dtype=np.float32)


class Embeddings(nnx.Module):
    def __init__(self, config: Gpt2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, deviation = config.n_embd, config.initializer_range
        self.dropout = config.embd_pdrop
        self.word = Table(config.vocab_size, width, deviation=deviation, dtype=dtype, rngs=rngs)
        self.position = Table(config.n_positions, width, deviation=deviation, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        return dropout(self.word(input_ids) + self.position(positions), self.dropout, key_for(key, "embeddings"))


class Layer(nnx.Module):
    def __init__(self, config: Gpt2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, place: Place, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        x, cache = self.attention(x, context, place, cache, key)
        return self.mlp(x, key), cache


class Attention(nnx.Module):
    """Query, key and value come from one weight, as in the checkpoint: a LoRA on it is PEFT's on `c_attn`."""

    def __init__(self, config: Gpt2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, deviation = config.n_embd, config.initializer_range
        self.heads = config.n_head
        self.scale = (width // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        self.probs_dropout = config.attn_pdrop
        self.dropout = config.resid_pdrop
        self.norm = Norm(width, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        self.query_key_value = linear(width, 3 * width, deviation=deviation, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, deviation=deviation, dtype=dtype, rngs=rngs)
        self.adapter: InsertedAdapter | None = None
        self.prefix: InsertedPrefix | None = None

    def __call__(
        self, x: jax.Array, context: Context, place: Place, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        parts = jnp.split(kept(self.query_key_value(self.norm(x))), 3, axis=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        k, v, cache = remembered(cache, place, k, v)
        k, v, length = with_prefix(self.prefix, k, v)
        scale = self.scale if place.setting is None else self.scale / place.setting
        probs_key = key_for(key, "attention/probs")
        y = attend(
            q,
            k,
            v,
            context.scope._replace(prefix=length),
            scale=scale,
            rate=self.probs_dropout,
            dropout_key=probs_key,
            attention=context.attention,
        )
        y = dropout(kept(self.output(join_heads(y))), self.dropout, key_for(key, "attention/output"))
        return x + adapted(self.adapter, y), cache


class MLP(nnx.Module):
    def __init__(self, config: Gpt2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner, deviation = config.n_embd, config.n_inner, config.initializer_range
        assert inner is not None  # set by the configuration
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = config.resid_pdrop
        self.norm = Norm(width, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        self.up = linear(width, inner, deviation=deviation, dtype=dtype, rngs=rngs)
        self.down = linear(inner, width, deviation=deviation, dtype=dtype, rngs=rngs)
        self.adapter: InsertedAdapter | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        y = self.down(self.activation(kept(self.up(self.norm(x)))))
        return x + adapted(self.adapter, dropout(y, self.dropout, key_for(key, "mlp/down")))


def is_transposed(path: str) -> bool:
    """In transformers the layers are `Conv1D`s, which store `(in, out)` as here; an untied head is a `Linear`."""
    return path == "lm_head/kernel"


GPT2 = Family(
    config=Gpt2Config,
    module=Gpt2,
    names=TensorNames(
        modules={
            "embeddings/word": "wte",
            "embeddings/position": "wpe",
            "layers/{}/attention/norm": "h.{}.ln_1",
            "layers/{}/attention/query_key_value": "h.{}.attn.c_attn",
            "layers/{}/attention/output": "h.{}.attn.c_proj",
            "layers/{}/mlp/norm": "h.{}.ln_2",
            "layers/{}/mlp/up": "h.{}.mlp.c_fc",
            "layers/{}/mlp/down": "h.{}.mlp.c_proj",
            "norm": "ln_f",
            "lm_head": "lm_head",
        },
        prefix="transformer.",
        outside=("lm_head",),
        unused=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, in checkpoints of old versions
        is_transposed=is_transposed,
    ),
    architectures=decoder_architectures("GPT2", head="GPT2LMHeadModel"),
    sizes={
        "wte.weight": ("vocab_size", "n_embd"),
        "wpe.weight": ("n_positions", "n_embd"),
        "h.0.mlp.c_fc.weight": ("n_embd", "n_inner"),
    },
    layers="n_layer",
    heads=("lm_head",),
    logits="lm_head",
    draws_heads=False,
)
