"""The frozen baseline: only the head learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Trains nothing but the head: the pretrained model as a fixed feature extractor.

    The floor in quality that every other method is measured against, and in cost nearly so.

    Args:
        also_train: the head, see `Method`. Without one nothing is trained, and `label_params` refuses.

    Example:
        >>> import lora_jax as lj
        >>> lj.label_params({"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, lj.Frozen(also_train=("head",)))
        {'head': 'head', 'w': 'frozen'}
    """

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        del leaves
        return {}
