"""The Llama family in Flax NNX: Llama 2 and 3, Mistral, Qwen2 and Qwen3, distinguished by `model_type`.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971. Grouped-query attention:
Ainslie et al., 2023, arXiv:2305.13245. Sliding window: Jiang et al., "Mistral 7B", 2023, arXiv:2310.06825.

All share one computation: RMS norms before attention and MLP, rotary positions, several query heads per key head, and a
gated MLP. Their configurations specify the differences: biases, norms of queries and keys, and sliding windows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import numpy as np
from flax import nnx

from lora_jax.errors import ArgumentError

from ..checkpoint.tensor_names import TensorNames
from ..family import Family, decoder_architectures
from ..nn.attention import AttentionForm, Scope, attend
from ..nn.cache import Cache
from ..nn.decoder import Context, Decoder, DecoderConfig, Place, join_heads, make_layers, remembered, split_heads
from ..nn.insertion import InsertedAdapter, InsertedPrefix, adapted, with_prefix
from ..nn.layers import ACTIVATIONS, RMSNorm, Table, key_for, linear
from ..nn.rematerialization import Remat, kept
from ..nn.rope import Rope, rotate, rotation

_ATTENTION = tuple(f"attention/{name}" for name in ("query", "key", "value", "output"))
_MLP = tuple(f"mlp/{name}" for name in ("gate", "up", "down"))


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and settings of a Llama, named as in Hugging Face's `config.json`.

    `rope` represents `rope_theta` and `rope_scaling`, or `rope_parameters`.

    Raises:
        ValueError: A size isn't a positive integer, the heads don't divide the width or each other, the activation is
            unknown, or a dropout rate is outside [0, 1).
    """

    model_type: ClassVar[str] = "llama"
    bounded_positions: ClassVar[bool] = False
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
    # Linear layers that always have biases.
    fixed_biases: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    # Biases on all linear layers, including those without one in the checkpoint; transformers has no such entry.
    all_biases: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            self._check_heads("hidden_size", "num_attention_heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("max_position_embeddings", "num_key_value_heads", "head_dim"):
            self._check_size(name)
        self._check_heads("num_attention_heads", "num_key_value_heads")
        if self.head_width % 2:
            raise ArgumentError(
                f"`head_dim` must be even, since rotary positions rotate pairs of features, got {self.head_dim}."
            )
        self._check_choice("hidden_act", ACTIVATIONS)
        self._check_positive("rms_norm_eps")
        self._check_rate("attention_dropout")
        for name in ("attention_bias", "mlp_bias", "all_biases", "tie_word_embeddings"):
            self._check_flag(name)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> Self:
        if isinstance(config, Mapping):  # otherwise the base class raises
            config = {**config, "rope": Rope.from_config(config)}
        return super().from_dict(config)

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def key_heads(self) -> int:
        assert self.num_key_value_heads is not None  # set in `__post_init__`
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None  # set in `__post_init__`
        return self.head_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.num_hidden_layers, self.key_heads, self.head_width

    def with_dropout(self, rate: float) -> Self:
        return dataclasses.replace(self, attention_dropout=rate)

    def with_biases(self) -> Self:
        return dataclasses.replace(self, all_biases=True)

    def has_bias(self, module: str) -> bool:
        """Whether a linear layer, such as `attention/query`, has a bias."""
        return self.all_biases or module in self.held_biases

    @property
    def held_biases(self) -> tuple[str, ...]:
        """The linear layers with a bias in the checkpoint."""
        set_by_entries = (modules for entry, modules in self.bias_entries.items() if getattr(self, entry))
        return (*self.fixed_biases, *itertools.chain.from_iterable(set_by_entries))

    def is_added_bias(self, path: str) -> bool:
        return path.endswith("/bias") and not path.endswith(tuple(f"/{module}/bias" for module in self.held_biases))

    # Differences between the members of the family.

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalized, head by head."""
        return False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The number of tokens that each layer attends to, including the current one; `None` for all."""
        return (None,) * self.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Llama's sizes and settings, and a sliding window for all layers or none (`null`)."""

    model_type: ClassVar[str] = "mistral"
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    max_position_embeddings: int = 4096 * 32
    num_key_value_heads: int | None = 8
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None:
            self._check_size("sliding_window")

    @classmethod
    def _check_variant(cls, config: Mapping[str, object]) -> None:
        _refuse_biases(config, ("attention_bias", "mlp_bias"), cls.model_type)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Llama's sizes and settings, with biases on query, key and value, and a sliding window for some layers.

    `layer_types` lists `"full_attention"` or `"sliding_attention"` for each layer; without it, `use_sliding_window`
    applies the window to the layers from `max_window_layers` on.

    Raises:
        ValueError: As for Llama, or `layer_types` doesn't fit the layers or the window.
    """

    model_type: ClassVar[str] = "qwen2"
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    fixed_biases: ClassVar[tuple[str, ...]] = _ATTENTION[:3]

    max_position_embeddings: int = 32768
    num_key_value_heads: int | None = 32
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("use_sliding_window")
        if self.sliding_window is not None:
            self._check_size("sliding_window")
        if type(self.max_window_layers) is not int or self.max_window_layers < 0:
            raise ArgumentError(f"`max_window_layers` must be a number of layers, got {self.max_window_layers!r:.50}.")
        kinds = self.layer_types
        if kinds is None:
            return
        if len(kinds) != self.num_hidden_layers or any(kind not in _KINDS for kind in kinds):
            raise ArgumentError(
                f"`layer_types` must be one of {', '.join(map(repr, _KINDS))} for each of the "
                f"{self.num_hidden_layers} layers, got {list(kinds)!r:.200}."
            )
        if _SLIDING in kinds and (not self.use_sliding_window or self.sliding_window is None):
            raise ArgumentError(
                f"`layer_types` has {_SLIDING!r}, but there is no window: `use_sliding_window` is "
                f"{self.use_sliding_window} and `sliding_window` is {self.sliding_window}."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> Self:
        if isinstance(config, Mapping) and (kinds := config.get("layer_types")) is not None:
            if not isinstance(kinds, list | tuple):
                raise ArgumentError(f"`layer_types` must be a list, got {kinds!r:.50}.")
            config = {**config, "layer_types": tuple(kinds)}
        return super().from_dict(config)

    @classmethod
    def _check_variant(cls, config: Mapping[str, object]) -> None:
        _refuse_biases(config, ("mlp_bias",), cls.model_type)

    @property
    def windows(self) -> tuple[int | None, ...]:
        if not self.use_sliding_window:
            return super().windows
        kinds = self.layer_types or tuple(
            _SLIDING if layer >= self.max_window_layers else _FULL for layer in range(self.num_hidden_layers)
        )
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in kinds)


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen2's sizes and settings, with norms of queries and keys, and no biases unless `attention_bias` is set."""

    model_type: ClassVar[str] = "qwen3"
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention_bias": _ATTENTION}
    fixed_biases: ClassVar[tuple[str, ...]] = ()

    head_dim: int | None = 128

    @property
    def head_norms(self) -> bool:
        return True


_FULL, _SLIDING = _KINDS = ("full_attention", "sliding_attention")


def _refuse_biases(config: Mapping[str, object], names: tuple[str, ...], model_type: str) -> None:
    for name in names:
        if config.get(name):
            raise ArgumentError(f"`{name}` must be false: a {model_type} has no such biases in transformers.")


class Llama(Decoder):
    """A decoder; arguments as in `Gpt2`."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        head: bool,
        dtype: jax.typing.DTypeLike,
        remat: Remat | None = None,
        scan: bool = False,
        attention: AttentionForm = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        width, deviation = config.hidden_size, config.initializer_range
        self.config = config
        self.has_head = head
        self.remat = remat
        self.attention: AttentionForm = attention
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, scan=scan, rngs=rngs
        )
        self.norm = RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        untied = head and not config.tie_word_embeddings
        self.lm_head = (
            linear(width, config.vocab_size, bias=False, deviation=deviation, dtype=dtype, rngs=rngs)
            if untied
            else None
        )

    def embed(self, input_ids: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        del positions, key  # the rotation includes the positions; there is no dropout
        return self.embeddings.word(input_ids)

    def context(self, scope: Scope, positions: jax.Array) -> Context:
        turn = rotation(positions, self.config.rope.frequencies(self.config.head_width))
        windows = set(self.config.windows)
        # One window there is at most: of all layers, or of those that `settings` say.
        (window,) = windows if len(windows) == 1 else windows - {None}
        return Context(scope._replace(window=window), turn, self.attention)

    def settings(self) -> np.ndarray | None:
        """Whether each layer has the window, if only some have it."""
        windows = self.config.windows
        return np.array([window is not None for window in windows]) if len(set(windows)) > 1 else None


class Embeddings(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        deviation = config.initializer_range
        self.word = Table(config.vocab_size, config.hidden_size, deviation=deviation, dtype=dtype, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, place: Place, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        x, cache = self.attention(x, context, place, cache, key)
        return self.mlp(x), cache


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, queries, keys = config.hidden_size, config.num_attention_heads, config.key_heads
        head = config.head_width
        dense = functools.partial(linear, deviation=config.initializer_range, dtype=dtype, rngs=rngs)
        norm = functools.partial(RMSNorm, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.heads = queries
        self.key_heads = keys
        self.scale = head**-0.5
        self.dropout = config.attention_dropout
        self.norm = norm(width)
        self.query = dense(width, queries * head, bias=config.has_bias("attention/query"))
        self.key = dense(width, keys * head, bias=config.has_bias("attention/key"))
        self.value = dense(width, keys * head, bias=config.has_bias("attention/value"))
        self.output = dense(queries * head, width, bias=config.has_bias("attention/output"))
        self.query_norm = norm(head) if config.head_norms else None
        self.key_norm = norm(head) if config.head_norms else None
        self.adapter: InsertedAdapter | None = None
        self.prefix: InsertedPrefix | None = None

    def __call__(
        self, x: jax.Array, context: Context, place: Place, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        y = self.norm(x)
        q, k, v = (
            split_heads(layer(y), heads)
            for layer, heads in ((self.query, self.heads), (self.key, self.key_heads), (self.value, self.key_heads))
        )
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        assert context.rotation is not None
        q, k, v = kept(rotate(q, context.rotation)), kept(rotate(k, context.rotation)), kept(v)
        k, v, cache = remembered(cache, place, k, v)
        k, v, length = with_prefix(self.prefix, k, v)
        y = attend(
            q,
            k,
            v,
            context.scope._replace(windowed=True if place.setting is None else place.setting, prefix=length),
            scale=self.scale,
            rate=self.dropout,
            dropout_key=key_for(key, "attention/probs"),
            attention=context.attention,
        )
        return x + adapted(self.adapter, kept(self.output(join_heads(y)))), cache


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        dense = functools.partial(linear, deviation=config.initializer_range, dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.gate = dense(width, inner, bias=config.has_bias("mlp/gate"))
        self.up = dense(width, inner, bias=config.has_bias("mlp/up"))
        self.down = dense(inner, width, bias=config.has_bias("mlp/down"))
        self.adapter: InsertedAdapter | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        return x + adapted(self.adapter, self.down(self.activation(kept(self.gate(y))) * kept(self.up(y))))


LLAMA = Family(
    config=LlamaConfig,
    module=Llama,
    names=TensorNames(
        modules={
            "embeddings/word": "embed_tokens",
            "layers/{}/attention/norm": "layers.{}.input_layernorm",
            "layers/{}/attention/query": "layers.{}.self_attn.q_proj",
            "layers/{}/attention/key": "layers.{}.self_attn.k_proj",
            "layers/{}/attention/value": "layers.{}.self_attn.v_proj",
            "layers/{}/attention/output": "layers.{}.self_attn.o_proj",
            "layers/{}/attention/query_norm": "layers.{}.self_attn.q_norm",
            "layers/{}/attention/key_norm": "layers.{}.self_attn.k_norm",
            "layers/{}/mlp/norm": "layers.{}.post_attention_layernorm",
            "layers/{}/mlp/gate": "layers.{}.mlp.gate_proj",
            "layers/{}/mlp/up": "layers.{}.mlp.up_proj",
            "layers/{}/mlp/down": "layers.{}.mlp.down_proj",
            "norm": "norm",
            "lm_head": "lm_head",
        },
        prefix="model.",
        outside=("lm_head",),
        unused=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # in checkpoints of old versions
    ),
    architectures=decoder_architectures("Llama"),
    sizes={
        "embed_tokens.weight": ("vocab_size", "hidden_size"),
        "layers.0.mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    },
    layers="num_hidden_layers",
    heads=("lm_head",),
    logits="lm_head",
    draws_heads=False,
)
MISTRAL = dataclasses.replace(LLAMA, config=MistralConfig, architectures=decoder_architectures("Mistral"))
QWEN2 = dataclasses.replace(LLAMA, config=Qwen2Config, architectures=decoder_architectures("Qwen2"))
QWEN3 = dataclasses.replace(LLAMA, config=Qwen3Config, architectures=decoder_architectures("Qwen3"))
