"""`Family`: all that loading, saving and naming have to know of a kind of model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..interop.module_names import ModuleNames
from .checkpoint.name_table import NameTable, is_kernel
from .model_config import ModelConfig

Task = Literal["classification", "regression", "causal-lm"] | None

# A decoder's embeddings, and its head where that is no part of them.
WORDS, HEAD = "embeddings/word/embedding", "lm_head/kernel"


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One kind of model, told by `model_type` in its `config.json`.

    Attributes:
        config: the class of its configurations.
        module: `module(config, pooling=, outputs=, dtype=, remat=, rngs=)` makes the NNX module, which is called with
            `(input_ids, mask, token_types, dropout_key)`. That of a decoder is made with `head=` and `scan=` in place
            of `pooling=` and `outputs=`, and called as `Decoder` says.
        names: its parameters' names in Hugging Face checkpoints.
        architectures: the classes of transformers, by task.
        sizes: `{tensor: entries of the configuration}`: the sizes that the shapes in a checkpoint repeat.
        layers: the entry of the configuration that counts the layers.
        heads: top-level modules that a base may have without use, or lack, to be drawn anew.
        logits: the module whose kernel's columns are the outputs.
        draws_heads: whether a head that the base lacks is drawn anew; otherwise its tensors are missing.
    """

    config: type[ModelConfig]
    module: Callable[..., Any]
    names: NameTable
    architectures: Mapping[Task, str]
    sizes: Mapping[str, tuple[str, ...]]
    layers: str
    heads: tuple[str, ...]
    logits: str
    draws_heads: bool = True

    @property
    def head(self) -> str:
        """The top-level module that the logits are made in."""
        return self.logits.partition("/")[0]

    @property
    def is_decoder(self) -> bool:
        return "causal-lm" in self.architectures

    def leaf_modules(self, paths: Collection[str], task: Task) -> ModuleNames:
        """The Hugging Face module of every leaf; of embeddings that are the head as well, both.

        Args:
            paths: of all leaves, those of the layers side by side.
            task: of the model.
        """
        names: dict[str, str | tuple[str, ...]] = {}
        names |= self.names.module_names(paths, prefix=self.names.prefix if task else "")
        if task == "causal-lm" and HEAD not in names:
            names[WORDS] = self.names.module(WORDS, prefix=self.names.prefix), self.names.module(HEAD)
        kept = [path for path in paths if is_kernel(path) and not self.names.is_transposed(path)]
        in_out = sorted({self.names.module(path).rpartition(".")[2] for path in kept})
        return ModuleNames(names, fan_in_fan_out=in_out)


def encoder_architectures(name: str) -> dict[Task, str]:
    """The classes of an encoder.

    Example:
        >>> encoder_architectures("Bert")[None], encoder_architectures("Bert")["regression"]
        ('BertModel', 'BertForSequenceClassification')
    """
    head = f"{name}ForSequenceClassification"
    return {None: f"{name}Model", "classification": head, "regression": head}


def decoder_architectures(name: str, *, head: str | None = None) -> dict[Task, str]:
    """The classes of a decoder.

    Example:
        >>> decoder_architectures("Llama")
        {None: 'LlamaModel', 'causal-lm': 'LlamaForCausalLM'}
    """
    return {None: f"{name}Model", "causal-lm": head or f"{name}ForCausalLM"}
