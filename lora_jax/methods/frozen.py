"""The frozen baseline: only the head is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

from ..errors import ArgumentError
from .base import LeafLabels, Leaves, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Trains nothing but the head: the pretrained model is a fixed feature extractor.

    This is the floor in quality against which every other method is measured, and nearly the floor in cost.

    Args:
        also_train: The head, see `Method`. Without one nothing is trained, and `label_params` refuses.

    Example:
        >>> import lora_jax as lj
        >>> lj.label_params({"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, lj.Frozen(also_train=("head",)))
        {'head': 'head', 'w': 'frozen'}
    """

    name: ClassVar[str] = "frozen"
    saved_as: ClassVar[str] = "Frozen"
    title: ClassVar[str] = "head only"
    summary: ClassVar[str] = "the head alone"
    default_rate: ClassVar[float] = 5e-3

    @classmethod
    def for_task(cls, task: str, options: Mapping[str, object]) -> Self:
        if task == "causal-lm" and not options.get("also_train"):
            raise ArgumentError(
                "it trains the head alone, and a causal-lm adds none: name modules in `also_train` (`norm`, for "
                "example), or choose another method"
            )
        return super().for_task(task, options)

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        del leaves
        return {}
