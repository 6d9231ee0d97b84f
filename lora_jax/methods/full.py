"""Full fine-tuning, the reference that the efficient methods are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .base import Method, is_trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTune(Method):
    """Trains every leaf of a floating type.

    Args:
        also_train: leaves labelled `"head"` rather than `"full"`, so that an optimizer can treat them differently.

    Example:
        >>> import lora_jax as lj
        >>> lj.label_params({"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, lj.FullFineTune(also_train=("head",)))
        {'head': 'head', 'w': 'full'}
    """

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {path: "full" for path, leaf in leaves.items() if is_trainable(path, leaf)}
