"""Stacked layers, taken apart: a scanned tree has one leaf for all layers, Hugging Face a module for each.

`names` says it: it has `layers/0/up/kernel`, `layers/1/up/kernel`, … where the tree has `layers/up/kernel` with one
more axis in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters import AdapterError
from ..paths import shape_text
from ..types import DTypeLike, Leaf, Use, Uses
from ..weights import STACK, AdaptedWeight
from .module_names import Names

Part = TypeVar("Part")


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One layer's part of a stacked array; its values are read when they are asked for."""

    stack: Leaf
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.stack.dtype

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.stack[self.number], dtype=dtype)


class _StackPlace(NamedTuple):
    stack: str
    number: int


class Stacks:
    """Which leaves of a tree are stacks, and of what.

    Args:
        names: See `ModuleTable`; paths that the tree has as they are, are no members of a stack.
        leaves: Leaves of the tree by path, arrays or adapted weights.

    Raises:
        AdapterError: `names` has some members of a stack and not others.

    Example:
        >>> names = {"layers/0/up/kernel": "model.layers.0.up", "layers/1/up/kernel": "model.layers.1.up"}
        >>> stacks = Stacks(names, leaves := {"layers/up/kernel": np.zeros((2, 4, 3)), "norm/scale": np.ones(3)})
        >>> {path: leaf.shape for path, leaf in stacks.apart(leaves).items()}
        {'layers/0/up/kernel': (4, 3), 'layers/1/up/kernel': (4, 3), 'norm/scale': (3,)}
        >>> stacks.whole("layers/1/up/kernel")
        'layers/up/kernel'
    """

    def __init__(self, names: Names, leaves: Mapping[str, Leaf]) -> None:
        self._places: dict[str, _StackPlace] = {}
        self._members: dict[str, dict[int, str]] = {}
        for path in names if isinstance(names, Mapping) else ():  # another `names` is refused by `ModuleTable`
            place = None if path in leaves else _place(str(path), leaves)
            if place is not None:
                self._places[path] = place
                self._members.setdefault(place.stack, {})[place.number] = path
        for stack, members in self._members.items():
            count = leaves[stack].shape[0]
            absent = [str(number) for number in range(count) if number not in members]
            if absent:
                raise AdapterError(
                    f"`{stack}` {shape_text(leaves[stack])} is a stack of {count}, and `names` has {len(members)} of "
                    f"them: it lacks number {', '.join(absent[:5])}"
                )

    def whole(self, path: str) -> str:
        """The leaf of the tree that the one at `path` is a part of, or is."""
        return self._places[path].stack if path in self._places else path

    def wholes(self, paths: Iterable[str]) -> list[str]:
        """`whole` of each, once."""
        return list(dict.fromkeys(map(self.whole, paths)))

    def apart(self, leaves: Mapping[str, Leaf], part: Callable[[Any, int], Any] | None = None) -> dict[str, Any]:
        """`{path: leaf}` with the members in place of each stack; `part(leaf, number)` makes one."""
        part = part or _part
        return {
            path: member
            for whole, leaf in leaves.items()
            for path, member in (
                {path: part(leaf, number) for number, path in sorted(self._members[whole].items())}.items()
                if whole in self._members
                else ((whole, leaf),)
            )
        }

    def uses(self, uses: Uses | None) -> Uses | None:
        """What `trace_weights` says of the stacks, said of their members."""
        return None if uses is None else self.apart(uses, lambda use, _: _part_of_use(use))

    def together(self, parts: Mapping[str, Part], join: Callable[[str, list[Part]], Leaf]) -> dict[str, Leaf]:
        """The inverse of `apart`, for what was made of the leaves at some paths; `join(path, members)` makes a stack.

        Raises:
            AdapterError: Some members of a stack are there, and others not.
        """
        result: dict[str, Leaf] = {}
        for path, value in parts.items():
            whole = self.whole(path)
            if whole == path:
                result[path] = value
            elif whole not in result:
                members = [member for _, member in sorted(self._members[whole].items())]
                absent = [member for member in members if member not in parts]
                if absent:
                    raise AdapterError(
                        f"`{whole}` is one leaf for {len(members)} layers, and {', '.join(absent[:5])} would stay as "
                        "they are: use a tree with its layers side by side (`lj.models.unstack_layers`)"
                    )
                result[whole] = join(whole, [parts[member] for member in members])
        return result


def stack_weights(base: Leaf, nodes: Sequence[AdaptedWeight]) -> AdaptedWeight:
    """One adapted weight of those of all layers, which are alike, beside the stacked base."""
    first, *rest = [dataclasses.replace(node, base=None) for node in nodes]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), first, *rest)
    node = dataclasses.replace(stacked, base=base, axes=STACK + first.axes)
    places = node.placements()
    arrays = {name: jax.device_put(getattr(node, name), places[name]) for name in node.saved if name in places}
    return dataclasses.replace(node, **arrays)


def _place(path: str, leaves: Mapping[str, Leaf]) -> _StackPlace | None:
    segments = path.split("/")
    for index, segment in enumerate(segments):
        if segment.isdecimal():
            stack = "/".join(segments[:index] + segments[index + 1 :])
            shape = getattr(leaves.get(stack), "shape", ())
            if shape and int(segment) < shape[0]:
                return _StackPlace(stack, int(segment))
    return None


def _part(leaf: Leaf, number: int) -> Leaf:
    if not isinstance(leaf, AdaptedWeight):
        return Member(leaf, number)
    if not str(leaf.axes).startswith(STACK):
        raise AdapterError(
            f"`names` has a module for each layer of a weight labelled {leaf.axes!r}: its first axis should be a stack "
            "axis, `s`. Attach the factors with `uses=lj.trace_weights(fn, params, ...)`"
        )
    (base, *arrays), member = leaf.stacked()
    slices: list[Leaf] = [Member(base, number), *(array[number] for array in arrays)]
    return member(slices)


def _part_of_use(use: Use) -> Use:
    labels = use.labels
    return use._replace(labels=labels[1:] if labels and labels.startswith(STACK) else None)
