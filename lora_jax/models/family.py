"""`Family`: what loading, saving and naming need to know about one kind of model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..interop.module_names import ModuleNames
from .checkpoint.tensor_names import TensorNames, is_kernel
from .model_config import ModelConfig

Task = Literal["classification", "regression", "causal-lm"] | None

# A decoder's embeddings, and its head if that isn't tied to them.
WORDS, HEAD = "embeddings/word/embedding", "lm_head/kernel"


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One kind of model, identified by `model_type` in its `config.json`.

    Attributes:
        config: Class of the family's configurations.
        module: `module(config, pooling=, outputs=, dtype=, remat=, rngs=)` makes an encoder's NNX module, which is
            called with `(input_ids, mask, token_types, dropout_key)`. A decoder's takes `head=` and `scan=` in place of
            `pooling=` and `outputs=`, and is called as `Decoder` describes.
        names: Names of the parameters in Hugging Face checkpoints.
        architectures: Classes of transformers, by task.
        sizes: `{tensor: configuration entries}` for tensors whose shapes must equal these entries.
        layers: Configuration entry with the number of layers.
        heads: Top-level modules that a checkpoint may have although they aren't used, or lack, to be drawn anew.
        logits: Module whose kernel has one column per output.
        draws_heads: Whether a head that the checkpoint lacks is drawn anew; if not, its absence is an error.
    """

    config: type[ModelConfig]
    module: Callable[..., Any]
    names: TensorNames
    architectures: Mapping[Task, str]
    sizes: Mapping[str, tuple[str, ...]]
    layers: str
    heads: tuple[str, ...]
    logits: str
    draws_heads: bool = True

    @property
    def head(self) -> str:
        """Top-level module that computes the logits."""
        return self.logits.partition("/")[0]

    @property
    def is_decoder(self) -> bool:
        return "causal-lm" in self.architectures

    def leaf_modules(self, paths: Collection[str], task: Task) -> ModuleNames:
        """The Hugging Face module of every leaf; both modules for embeddings that double as the head.

        Args:
            paths: Paths of all leaves, with unstacked layers.
            task: The model's task.
        """
        names: dict[str, str | tuple[str, ...]] = {}
        names |= self.names.module_names(paths, prefix=self.names.prefix if task else "")
        if task == "causal-lm" and HEAD not in names:
            names[WORDS] = self.names.module(WORDS, prefix=self.names.prefix), self.names.module(HEAD)
        kept = [path for path in paths if is_kernel(path) and not self.names.is_transposed(path)]
        in_out = sorted({self.names.module(path).rpartition(".")[2] for path in kept})
        return ModuleNames(names, fan_in_fan_out=in_out)


def encoder_architectures(name: str) -> dict[Task, str]:
    """The classes of an encoder in transformers, by task.

    Example:
        >>> encoder_architectures("Bert")[None], encoder_architectures("Bert")["regression"]
        ('BertModel', 'BertForSequenceClassification')
    """
    head = f"{name}ForSequenceClassification"
    return {None: f"{name}Model", "classification": head, "regression": head}


def decoder_architectures(name: str, *, head: str | None = None) -> dict[Task, str]:
    """The classes of a decoder in transformers, by task.

    Example:
        >>> decoder_architectures("Llama")
        {None: 'LlamaModel', 'causal-lm': 'LlamaForCausalLM'}
    """
    return {None: f"{name}Model", "causal-lm": head or f"{name}ForCausalLM"}
