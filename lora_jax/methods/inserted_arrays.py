"""What the methods share that insert arrays where the base has none: adapters, prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax

from ..weights import STACK, AdaptedWeight, register
from .base import Method, require

INSERTED = "inserted"

# Where the two parts of every layer of a bundled model write into the residual.
_ENDS = ("attention/output/kernel", "mlp/down/kernel")


@dataclasses.dataclass(frozen=True)
class Insertion(AdaptedWeight):
    """Base of the nodes that stand where the base has nothing; functions get the array that they stand for.

    `axes` are those of that array: `"s"` for the layers of a scan, `"i"`, `"o"`.
    """

    has_base: ClassVar[bool] = False
    merged_on_entry: ClassVar[bool] = True

    def label(self, method_labels: bool) -> Self:
        word = INSERTED if method_labels else "frozen"
        return dataclasses.replace(
            self, **{name: None if getattr(self, name) is None else word for name in self.fields}
        )

    def with_base(self, base: Any) -> Self:
        del base
        return self


@register
@dataclasses.dataclass(frozen=True)
class InsertedArray(Insertion):
    """An array that learns, `value`, in a place of its own."""

    fields: ClassVar[dict[str, str]] = {"value": "sio"}
    saved: ClassVar[tuple[str, ...]] = ("value",)

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def merge(self) -> jax.Array:
        return self.value

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Self]]:
        return [self.value], lambda slices: dataclasses.replace(self, value=slices[0], axes=self.axes[1:])

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        shape = shapes["value"]
        return None if len(shape) == len(self.axes) else f"`value` has the shape {shape}, with axes {self.axes!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsertingMethod(Method, abstract=True):
    """Base of the methods that insert arrays, which a function has to know of: those of `lora_jax.models` do."""

    inserts: ClassVar[bool] = True

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        labels = {path: leaf.label(True) for path, leaf in leaves.items() if isinstance(leaf, Insertion)}
        require(
            bool(labels),
            f"the tree has nothing of {type(self).__name__}: make it with `lj.attach(params, method, key=...)` and "
            "label its result",
        )
        return labels


class Sublayer(NamedTuple):
    """The attention or the MLP of a layer, or of all layers where they are stacked.

    Attributes:
        path: `encoder/layers/0/attention`.
        width: `d`, the features of the residual that it writes into.
        stack: `(layers,)` where they are stacked, else `()`.
    """

    path: str
    width: int
    stack: tuple[int, ...]

    @property
    def stack_axes(self) -> str:
        return STACK * len(self.stack)


def sublayers(leaves: Mapping[str, Any], method: Method) -> tuple[list[Sublayer], list[Sublayer]]:
    """The attentions and the MLPs of a bundled model, in tree order.

    Raises:
        ValueError: the tree isn't that of a bundled model.
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
