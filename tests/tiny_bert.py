"""A tiny BERT folder as Hugging Face writes one, with random weights and a small vocabulary.

Every tensor is random and far from zero, biases and norms too, so that a swapped name or a forgotten term shows.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from lora_jax.files import write_safetensors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = """
the a is are was it this that i you we they not very good bad great poor movie film plot actor order invoice meeting
report please thanks sorry why when how where what could can would send help late broken love hate
"""
WORDS = tuple(_WORDS.split())


def write_tiny_bert(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    vocab_words: Iterable[str] = WORDS,
    prefix: str = "",
    pooler: bool = True,
    positions: int = 64,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`; returns the folder.

    Args:
        folder: made if it doesn't exist.
        seed: of the weights.
        layers, hidden, heads, positions: sizes; the MLP is `2 * hidden` wide.
        vocab_words: whole words in the vocabulary, beside single letters and digits (so no word is unknown).
        prefix: put before every tensor's name (`"bert."` in checkpoints of a task model).
        pooler: whether the checkpoint has one.
        dtype: of the tensors.
        **config: more entries of `config.json`, or others' replacements.
    """
    words = vocabulary(vocab_words)
    sizes = {
        "vocab_size": len(words),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
    }
    settings = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
    }
    tensors = random_tensors(sizes, seed=seed, pooler=pooler)
    return write_folder(
        folder,
        config={**sizes, **settings, **config},
        tensors={prefix + name: tensor.astype(dtype) for name, tensor in tensors.items()},
        tokenizer=word_piece(words),
        tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions},
    )


def write_folder(
    folder: str | os.PathLike[str],
    *,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    tokenizer: tokenizers.Tokenizer,
    tokenizer_config: dict[str, Any],
) -> Path:
    """Writes the four files; makes the folder if it doesn't exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def random_tensors(config: dict[str, Any], *, seed: int = 0, pooler: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a `BertModel` under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    width, mlp = config["hidden_size"], config["intermediate_size"]
    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, columns**-0.5, (rows, columns))
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, rows)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, width)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, width)

    for name, rows in (
        ("word_embeddings", config["vocab_size"]),
        ("position_embeddings", config["max_position_embeddings"]),
        ("token_type_embeddings", config["type_vocab_size"]),
    ):
        tensors[f"embeddings.{name}.weight"] = rng.normal(0, 1, (rows, width))
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            linear(f"{block}.attention.self.{name}", width, width)
        linear(f"{block}.attention.output.dense", width, width)
        norm(f"{block}.attention.output.LayerNorm")
        linear(f"{block}.intermediate.dense", mlp, width)
        linear(f"{block}.output.dense", width, mlp)
        norm(f"{block}.output.LayerNorm")
    if pooler:
        linear("pooler.dense", width, width)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def vocabulary(words: Iterable[str]) -> dict[str, int]:
    """Ids of the special tokens, single characters and `words`."""
    characters = string.ascii_lowercase + string.digits + ".,!?'-"
    tokens = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *words]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def word_piece(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's tokenizer, and DistilBERT's."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer
