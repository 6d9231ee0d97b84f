"""Full fine-tuning, the reference for the efficient methods."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..types import LeafPath
from .base import Leaves, is_trainable
from .leaf_method import LeafMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTune(LeafMethod):
    """Trains every leaf of a floating type, or those at and below what is named.

    Args:
        targets: `"all"`, or the parts to train, `("attention",)` for example; see `selection.select`.
        also_train: Leaves labelled `"head"` rather than `"full"`, so that an optimizer can treat them differently.

    Raises:
        SelectionError: (When used.) An entry matches no leaf of a floating type.

    Example:
        >>> import lora_jax as lj
        >>> lj.label_params({"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, lj.FullFineTune(also_train=("head",)))
        {'head': 'head', 'w': 'full'}
    """

    name: ClassVar[str] = "full"
    saved_as: ClassVar[str] = "FullFineTune"
    title: ClassVar[str] = "full fine-tuning"
    summary: ClassVar[str] = "every parameter"
    default_rate: ClassVar[float] = 1e-4
    label: ClassVar[str] = "full"
    kind: ClassVar[str] = "trainable leaf"
    sought: ClassVar[str] = "leaf of a floating type"
    below: ClassVar[bool] = True

    def members(self, leaves: Leaves) -> list[LeafPath]:
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf)]

    def advice(self, leaves: Leaves) -> str:
        return f"It has {len(leaves)} leaves: pass the model's parameters"
