"""Full fine-tuning, the reference that the efficient methods are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .base import is_trainable
from .leaf_sets import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTune(Selection):
    """Trains every leaf of a floating type, or those at and below what is named.

    Args:
        targets: `"all"`, or the parts to train, `("attention",)` say; see `selection.select`.
        also_train: leaves labelled `"head"` rather than `"full"`, so that an optimizer can treat them differently.

    Raises:
        SelectionError: (when used) an entry matches no leaf of a floating type.

    Example:
        >>> import lora_jax as lj
        >>> lj.label_params({"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, lj.FullFineTune(also_train=("head",)))
        {'head': 'head', 'w': 'full'}
    """

    label: ClassVar[str] = "full"
    kind: ClassVar[str] = "trainable leaf"
    sought: ClassVar[str] = "leaf of a floating type"
    below: ClassVar[bool] = True

    def members(self, leaves: Mapping[str, Any]) -> list[str]:
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf)]

    def way_out(self, leaves: Mapping[str, Any]) -> str:
        return f"It has {len(leaves)} leaves: pass the model's parameters"
