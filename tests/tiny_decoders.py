"""Tiny folders of every bundled decoder, as Hugging Face writes them, with random weights; see `tiny_bert`.

Tensors and names are written out here rather than taken from the package, so that a wrong name there shows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files import read_safetensors, write_safetensors

from .tiny_bert import WORDS, write_folder
from .tiny_encoders import byte_level

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 97
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 48,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
}
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
# Each family's own settings, away from their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2_SIZES, "n_inner": 40, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {**LLAMA_SIZES, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    "mistral": {**LLAMA_SIZES, "sliding_window": 5, "rope_theta": 1000.0},
    "qwen2": {**LLAMA_SIZES, "rope_theta": 2000.0, "use_sliding_window": True, "sliding_window": 4}
    | {"max_window_layers": 1},
    "qwen3": {**LLAMA_SIZES, "rope_theta": 2000.0},
}


def settings(family: str, **config: Any) -> dict[str, Any]:
    """The content of a `config.json`."""
    own = {"model_type": family, "architectures": [CLASSES[family]], "tie_word_embeddings": family == "gpt2"}
    content = {**own, **SETTINGS[family], **config}
    # Left out rather than `null`, which transformers' Qwen2 doesn't take.
    return {name: value for name, value in content.items() if (name, value) != ("head_dim", None)}


def write_tiny_decoder(
    folder: str | os.PathLike[str],
    family: str,
    *,
    seed: int = 0,
    bare: bool = False,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """Writes the folder of a family.

    Args:
        folder: made if it doesn't exist.
        family: its `model_type`.
        seed: of the weights.
        bare: without the prefix and the head, as the class without a head is saved.
        dtype: of the tensors.
        **config: more entries of `config.json`, or others' replacements.
    """
    content = settings(family, **config)
    tensors = gpt2_tensors(content, seed) if family == "gpt2" else llama_tensors(content, seed)
    prefix = "transformer." if family == "gpt2" else "model."
    if not bare:
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        if not content["tie_word_embeddings"]:
            width = content["n_embd" if family == "gpt2" else "hidden_size"]
            tensors["lm_head.weight"] = np.random.default_rng((seed, 1)).normal(0, 0.4, (content["vocab_size"], width))
    return write_folder(
        folder,
        config=content,
        tensors={name: tensor.astype(dtype) for name, tensor in tensors.items()},
        tokenizer=byte_level(WORDS),
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer"},
    )


class _Draw:
    """Tensors far from zero, biases and norms too, so that a swapped name or a forgotten term shows."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def table(self, name: str, rows: int, width: int) -> None:
        self.tensors[f"{name}.weight"] = self.rng.normal(0, 0.5, (rows, width))

    def norm(self, name: str, width: int, *, bias: bool) -> None:
        self.tensors[f"{name}.weight"] = self.rng.normal(1, 0.2, width)
        if bias:
            self.tensors[f"{name}.bias"] = self.rng.normal(0, 0.2, width)

    def dense(self, name: str, inputs: int, outputs: int, *, bias: bool, transposed: bool) -> None:
        shape = (outputs, inputs) if transposed else (inputs, outputs)
        self.tensors[f"{name}.weight"] = self.rng.normal(0, 1.5 * inputs**-0.5, shape)
        if bias:
            self.tensors[f"{name}.bias"] = self.rng.normal(0, 0.3, outputs)


def gpt2_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a `GPT2Model`; its layers are `Conv1D`s, `(in, out)`."""
    draw, width = _Draw(seed), config["n_embd"]
    inner = config.get("n_inner") or 4 * width
    draw.table("wte", config["vocab_size"], width)
    draw.table("wpe", config["n_positions"], width)
    for layer in range(config["n_layer"]):
        block = f"h.{layer}"
        draw.norm(f"{block}.ln_1", width, bias=True)
        draw.dense(f"{block}.attn.c_attn", width, 3 * width, bias=True, transposed=False)
        draw.dense(f"{block}.attn.c_proj", width, width, bias=True, transposed=False)
        draw.norm(f"{block}.ln_2", width, bias=True)
        draw.dense(f"{block}.mlp.c_fc", width, inner, bias=True, transposed=False)
        draw.dense(f"{block}.mlp.c_proj", inner, width, bias=True, transposed=False)
    draw.norm("ln_f", width, bias=True)
    return draw.tensors


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a `LlamaModel` and its like."""
    draw, width, kind = _Draw(seed), config["hidden_size"], config["model_type"]
    heads = config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    biased = bool(config.get("attention_bias"))
    draw.table("embed_tokens", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        block = f"layers.{layer}"
        draw.norm(f"{block}.input_layernorm", width, bias=False)
        for name, number in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            draw.dense(
                f"{block}.self_attn.{name}", width, number * head, bias=biased or kind == "qwen2", transposed=True
            )
        draw.dense(f"{block}.self_attn.o_proj", heads * head, width, bias=biased, transposed=True)
        if kind == "qwen3":
            draw.norm(f"{block}.self_attn.q_norm", head, bias=False)
            draw.norm(f"{block}.self_attn.k_norm", head, bias=False)
        draw.norm(f"{block}.post_attention_layernorm", width, bias=False)
        for name, inputs, outputs in (
            ("gate_proj", width, config["intermediate_size"]),
            ("up_proj", width, config["intermediate_size"]),
            ("down_proj", config["intermediate_size"], width),
        ):
            draw.dense(f"{block}.mlp.{name}", inputs, outputs, bias=bool(config.get("mlp_bias")), transposed=True)
    draw.norm("norm", width, bias=False)
    return draw.tensors


def split_into_parts(folder: Path, parts: int = 2) -> None:
    """Shares the tensors of `model.safetensors` out to several files and an index, every layer in each of them."""
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"model-{1 + i % parts:05}-of-{parts:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if place[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
