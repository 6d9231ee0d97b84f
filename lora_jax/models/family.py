"""`Family`: all that loading, saving and naming have to know of a kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .config import ModelConfig
from .names import NameTable

Task = Literal["classification", "regression"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One kind of model, told by `model_type` in its `config.json`.

    Attributes:
        config: the class of its configurations.
        module: `module(config, pooling=, outputs=, dtype=, remat=, rngs=)` makes the NNX module, which is called with
            `(input_ids, mask, token_types, dropout_key)`.
        names: its parameters' names in Hugging Face checkpoints.
        architectures: the classes of transformers, by task.
        sizes: `{tensor: entries of the configuration}`: the sizes that the shapes in a checkpoint repeat.
        layers: the entry of the configuration that counts the layers.
        heads: top-level modules that a base may lack, to be drawn anew, or have without use.
        logits: the module whose kernel's columns are the outputs.
    """

    config: type[ModelConfig]
    module: Callable[..., Any]
    names: NameTable
    architectures: Mapping[Task, str]
    sizes: Mapping[str, tuple[str, ...]]
    layers: str
    heads: tuple[str, ...]
    logits: str


def encoder_architectures(name: str) -> dict[Task, str]:
    """The classes of an encoder.

    Example:
        >>> encoder_architectures("Bert")[None], encoder_architectures("Bert")["regression"]
        ('BertModel', 'BertForSequenceClassification')
    """
    head = f"{name}ForSequenceClassification"
    return {None: f"{name}Model", "classification": head, "regression": head}
