"""Base of the methods that insert arrays where the base has none: adapters, prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Self

import jax
import numpy as np

from ..types import LeafPath
from ..weights import STACK, InsertedNode, register
from .base import LeafLabels, Leaves, Method, require, require_made

# Where the two sublayers of every layer of a bundled model write into the residual.
_ENDS = ("attention/output/kernel", "mlp/down/kernel")


@register
@dataclasses.dataclass(frozen=True)
class InsertedArray(InsertedNode):
    """A trained array, `value`, in a place of its own."""

    saved_as: ClassVar[str] = "InsertedArray"
    fields: ClassVar[dict[str, str]] = {"value": "sio"}
    saved: ClassVar[tuple[str, ...]] = ("value",)

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    def merge(self) -> jax.Array:
        return self.value

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Self]]:
        return [self.value], lambda slices: dataclasses.replace(self, value=slices[0], axes=self.axes[1:])

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        shape = shapes["value"]
        return None if len(shape) == len(self.axes) else f"`value` has the shape {shape}, with axes {self.axes!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsertingMethod(Method):
    """Base of the methods that insert arrays. A function has to know of them: those of `lora_jax.models` do."""

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        return require_made(
            self, {path: leaf.label(True) for path, leaf in leaves.items() if isinstance(leaf, InsertedNode)}
        )


class Sublayer(NamedTuple):
    """The attention or the MLP of one layer, or of all layers if they are stacked.

    Attributes:
        path: Path of the module, `encoder/layers/0/attention`.
        width: `d`, the number of features of the residual into which it writes.
        stack: `(layers,)` if layers are stacked, else `()`.
    """

    path: LeafPath
    width: int
    stack: tuple[int, ...]

    @property
    def stack_axes(self) -> str:
        return STACK * len(self.stack)


def sublayers(leaves: Leaves, method: Method) -> tuple[list[Sublayer], list[Sublayer]]:
    """The attentions and the MLPs of a bundled model, in tree order.

    Raises:
        ValueError: The tree isn't that of a bundled model.
    """
    attentions, mlps = (
        [
            Sublayer(path.rsplit("/", 2)[0], leaf.shape[-1], tuple(leaf.shape[:-2]))
            for path, leaf in leaves.items()
            if path.endswith("/" + end)
        ]
        for end in _ENDS
    )
    require(
        bool(attentions) and len(attentions) == len(mlps),
        f"{type(method).__name__} inserts arrays that the model's function has to read, and this isn't the tree of a "
        f"model of `lj.models`: it has no layers with {' and '.join(_ENDS)}. LoRA, DoRA, IA3, VeRA and BitFit work on "
        "any function",
    )
    return attentions, mlps
