"""A method in one file, as a user would add it: one trained gain for each weight, `g W`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.methods.base import flag
from lora_jax.methods.weight_method import TargetWeight, WeightMethod
from lora_jax.weights import STACK, AdaptedWeight, DotSpec, FactoredWeight, Unfactorable, labelled, register


@register
@dataclasses.dataclass(frozen=True)
class ToyWeight(FactoredWeight):
    """`g W`, with one gain `g` for each member of a stack."""

    saved_as: ClassVar[str] = "ToyWeight"
    fields: ClassVar[dict[str, str]] = {"gain": "s"}
    saved: ClassVar[tuple[str, ...]] = ("gain",)

    gain: jax.Array

    def merge(self) -> jax.Array:
        others = [axis for axis in range(self.ndim) if axis not in self.places(STACK)]
        return self.base * jnp.expand_dims(self.gain, others).astype(self.dtype)

    def label(self, method_labels: bool) -> Self:
        return labelled(self, {"gain": "gain"} if method_labels else {})

    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        if self.places(STACK):
            raise Unfactorable("a stack of gains")
        product = run(self.base, other)
        return product * self.gain.astype(product.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(WeightMethod):
    """Trains one gain for each weight."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "toy gains"
    summary: ClassVar[str] = "one gain for each weight"
    defaults: ClassVar[Mapping[str, object]] = {"targets": "all-linear"}
    default_rate: ClassVar[float] = 3e-2
    node: ClassVar[type[AdaptedWeight]] = ToyWeight

    first_gain: float = dataclasses.field(default=1.0, metadata=flag("Initial gain"))

    def nodes(self, targets: list[TargetWeight], *, key: jax.Array) -> dict[str, AdaptedWeight]:
        del key
        return {
            target.path: ToyWeight(
                target.base, jnp.full(target.sizes(STACK), self.first_gain, jnp.float32), axes=target.axes
            )
            for target in targets
        }
