"""Tiny folders of every bundled encoder, as Hugging Face writes them, with random weights; see `tiny_bert`.

Tensors and names are written out here rather than taken from the package, so that a wrong name there shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from .tiny_bert import WORDS, random_tensors, vocabulary, word_piece, write_folder, write_tiny_bert

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}
LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def write_tiny(folder: str | os.PathLike[str], family: str = "bert", **options: Any) -> Path:
    """Writes the folder of a family: `write_tiny_bert` and its like."""
    if family == "bert":
        return write_tiny_bert(folder, **options)
    if family == "distilbert":
        return write_tiny_distilbert(folder, **options)
    return write_tiny_roberta(folder, model_type=family, **options)


def write_tiny_roberta(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    prefix: str = "",
    pooler: bool = True,
    head: int | None = None,
    positions: int = 64,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """A RoBERTa that takes `positions` tokens, with a byte-level tokenizer; arguments as in `write_tiny_bert`.

    Args:
        head: outputs of a classification head; `None` for none. Its tensors never have the prefix.
    """
    tokenizer = byte_level(WORDS)
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions + 2,
        "type_vocab_size": 1,
    }
    settings = {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    config = {**sizes, **settings, **config}
    tensors = {prefix + name: tensor for name, tensor in random_tensors(config, seed=seed, pooler=pooler).items()}
    tensors |= _head(("classifier.dense", "classifier.out_proj"), hidden, head, seed)
    return write_folder(
        folder,
        config=config,
        tensors={name: tensor.astype(dtype) for name, tensor in tensors.items()},
        tokenizer=tokenizer,
        tokenizer_config={
            "tokenizer_class": "RobertaTokenizer",
            "add_prefix_space": True,
            "model_max_length": positions,
        },
    )


def write_tiny_distilbert(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    prefix: str = "",
    head: int | None = None,
    positions: int = 64,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """A DistilBERT with BERT's tokenizer; arguments as in `write_tiny_roberta`."""
    words = vocabulary(WORDS)
    settings = {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": len(words),
        "dim": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "hidden_dim": 2 * hidden,
        "max_position_embeddings": positions,
        "activation": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "initializer_range": 0.02,
        "sinusoidal_pos_embds": False,
        "pad_token_id": 0,
    }
    config = {**settings, **config}
    tensors = {prefix + name: tensor for name, tensor in random_distilbert_tensors(config, seed=seed).items()}
    tensors |= _head(("pre_classifier", "classifier"), hidden, head, seed)
    return write_folder(
        folder,
        config=config,
        tensors={name: tensor.astype(dtype) for name, tensor in tensors.items()},
        tokenizer=word_piece(words),
        tokenizer_config={
            "tokenizer_class": "DistilBertTokenizer",
            "do_lower_case": True,
            "model_max_length": positions,
        },
    )


def random_distilbert_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a `DistilBertModel` under their Hugging Face names: a BERT's, renamed."""
    sizes = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "intermediate_size": config["hidden_dim"],
        "max_position_embeddings": config["max_position_embeddings"],
        "type_vocab_size": 1,
    }
    tensors = random_tensors(sizes, seed=seed, pooler=False)
    del tensors["embeddings.token_type_embeddings.weight"]
    return {_distilbert_name(name): tensor for name, tensor in tensors.items()}


def _distilbert_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "encoder":
        return name
    return ".".join(["transformer.layer", parts[2], LAYER[".".join(parts[3:-1])], parts[-1]])


def _head(names: tuple[str, str], width: int, outputs: int | None, seed: int) -> dict[str, np.ndarray]:
    """The two linear layers of a head, far from zero."""
    if outputs is None:
        return {}
    rng = np.random.default_rng((seed, 1))
    tensors: dict[str, np.ndarray] = {}
    for name, rows in zip(names, (width, outputs), strict=True):
        tensors[f"{name}.weight"] = rng.normal(0, width**-0.5, (rows, width)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.5, rows).astype(np.float32)
    return tensors


def byte_level(words: Iterable[str]) -> tokenizers.Tokenizer:
    """RoBERTa's kind of tokenizer: bytes, merged into `words` (with the space before) from the left."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in words:
        for end in range(len(word)):
            if (piece := f"Ġ{word[: end + 1]}") not in tokens:
                tokens.append(piece)
                merges.append((f"Ġ{word[:end]}", word[end]))
    vocabulary = {token: index for index, token in enumerate([*tokens, "<mask>"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    return tokenizer
