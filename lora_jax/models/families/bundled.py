"""The bundled families, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_jax.files import FileError

from ..checkpoint.weight_files import read_config
from ..family import Family
from ..model_config import ModelConfig, model_type_of, unknown_model_type
from .bert import BERT
from .distilbert import DISTILBERT
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3
from .roberta import ROBERTA, XLM_ROBERTA

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)
DECODERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
FAMILIES: dict[str, Family] = {family.config.model_type: family for family in ENCODERS + DECODERS}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def config_from_dict(config: Mapping[str, object]) -> ModelConfig:
    """Makes the configuration that the content of a `config.json` describes.

    Raises:
        ValueError: A kind of model that isn't bundled, a missing size, or a variant that isn't implemented.

    Example:
        >>> sizes = dict(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=4)
        >>> config_from_dict({"model_type": "distilbert", **sizes}).max_length
        4
    """
    model_type = model_type_of(config)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown_model_type(model_type, FAMILIES)
    return FAMILIES[model_type].config.from_dict(config)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads the configuration of a Hugging Face folder.

    Raises:
        FileError: `config.json` is missing or malformed, or describes a model that can't be loaded.
    """
    content = read_config(folder)
    try:
        return config_from_dict(content)
    except ValueError as error:
        raise FileError(f"{folder / 'config.json'}: {error}") from error
