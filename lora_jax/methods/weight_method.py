"""Base of the methods that put an adapted weight at each target, and which axes of a weight are in and out."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Self, TypeVar

import jax

from ..errors import ArgumentError
from ..paths import BIAS_NAMES, NORM_NAMES, leaf_name, shape_text
from ..selection import SelectionError, Selector, matches_entry, select
from ..types import HasShape, LeafPath, PyTree, Use, Uses
from ..weights import IN, OUT, STACK, AdaptedWeight
from . import dtypes
from .base import (
    LeafLabels,
    Leaves,
    Method,
    flag,
    is_trainable,
    is_weight,
    require,
    require_made,
    require_selector,
    rooted,
)
from .presets import PRESETS, Choice, choose, reasons

Value = TypeVar("Value", int, float)

# Operations that say which axes of a weight are in and which are out, if any labels fit.
_TELLING = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")


class TargetWeight(NamedTuple):
    """A weight that a method changes, with one label for each of its axes."""

    path: LeafPath
    base: jax.Array
    axes: str

    def sizes(self, label: str) -> tuple[int, ...]:
        """Sizes of the axes of one label, in the base's order."""
        return tuple(size for size, own in zip(self.base.shape, self.axes, strict=True) if own == label)

    def size(self, label: str) -> int:
        return math.prod(self.sizes(label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """Base of the methods that put an adapted weight at each of their targets.

    A subclass names the class of its nodes in `node` and makes them in `nodes`.

    Attributes:
        targets: Weights to adapt: one of `presets`, or what `selection.select` reads.
    """

    node: ClassVar[type[AdaptedWeight]]
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = PRESETS

    targets: Selector = dataclasses.field(metadata=flag("all-linear, attention, mlp, or modules (query value)"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")

    def nodes(self, targets: list[TargetWeight], *, key: jax.Array) -> dict[LeafPath, AdaptedWeight]:
        """The adapted weight of each target, by path, as training starts."""
        raise NotImplementedError

    @property
    def by_preset(self) -> bool:
        """Whether a preset finds the targets, rather than the user naming them."""
        return isinstance(self.targets, str) and self.targets in self.presets

    def selected(self, leaves: Leaves, uses: Uses | None = None) -> list[LeafPath]:
        """Paths of the weights that are adapted."""
        return self._choice(leaves, uses).found

    def _choice(self, leaves: Leaves, uses: Uses | None) -> Choice:
        if not self.by_preset:
            return Choice(
                select(leaves, self.targets, argument="targets", eligible=self._may_be_named, kind="weight"), {}
            )
        preset = str(self.targets)
        return choose(preset, self.presets[preset], leaves, set(self.head(leaves)), uses)

    def _may_be_named(self, path: LeafPath, leaf: PyTree) -> bool:
        """Whether a leaf is a weight, or is named like a bias or a scale in part (`gate_bias`) and named outright."""
        if is_weight(path, leaf) or callable(self.targets) or isinstance(self.targets, str):
            return is_weight(path, leaf)
        name = leaf_name(path)
        if not is_trainable(path, leaf) or len(leaf.shape) < 2 or name in BIAS_NAMES | NORM_NAMES:
            return False
        return any(entry.rpartition("/")[2] == name and matches_entry(path, entry) for entry in self.targets)

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        found, unusable = self._choice(leaves, uses)
        if unusable:
            warnings.warn(
                f"`targets={self.targets!r}` leaves out weights that factors can't stand beside. {reasons(unusable)}",
                stacklevel=3,
            )
        selected = self._admitted(leaves, found)
        both = sorted(set(selected) & set(self.head(leaves)))
        if both:
            raise SelectionError(
                f"`targets` and `also_train` both select {', '.join(both)}: train it in full or by factors"
            )
        return self.nodes(
            [TargetWeight(path, leaves[path], axis_labels(path, leaves[path], uses)) for path in selected], key=key
        )

    def own_nodes(self, leaves: Leaves) -> dict[LeafPath, PyTree]:
        """The method's adapted weights in a tree, by path."""
        return {path: leaf for path, leaf in leaves.items() if type(leaf) is self.node}

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        nodes = self.own_nodes(leaves)
        return require_made(self, {path: nodes[path].label(True) for path in self._admitted(leaves, list(nodes))})

    def _admitted(self, leaves: Leaves, paths: list[LeafPath]) -> list[LeafPath]:
        """`paths`, if factors can stand beside their leaves."""
        return dtypes.factored(leaves, paths)

    def resolved(self, leaves: Leaves) -> Self:
        return dataclasses.replace(super().resolved(leaves), targets=rooted(list(self.own_nodes(leaves))))


def overridden(
    default: Value, overrides: Mapping[str, Value], targets: Sequence[TargetWeight], argument: str
) -> dict[LeafPath, Value]:
    """For each target by path, the value of the one entry of `overrides` that matches it, or `default`."""
    values = {target.path: default for target in targets}
    owner: dict[LeafPath, str] = {}
    for entry, value in overrides.items():
        for path in matching(entry, targets, argument):
            if path in owner:
                raise SelectionError(f"`{argument}` entries {owner[path]!r} and {entry!r} both match {path}")
            owner[path], values[path] = entry, value
    return values


def matching(entry: str, targets: Sequence[TargetWeight], argument: str) -> list[LeafPath]:
    """Paths of the targets that a name matches, at least one."""
    matched = [target.path for target in targets if matches_entry(target.path, entry)]
    if not matched:
        known = ", ".join(target.path for target in targets)
        raise SelectionError(f"`{argument}` entry {entry!r} matches none of the targets: {known}")
    return matched


def by_convention(leaf: HasShape, use: Use | None) -> bool:
    """Whether a weight is read as `(in, out)`: it has two axes, and no use of it says otherwise.

    A `custom_vjp`, or elementwise arithmetic, says nothing of them: whatever its labels, the weight is merged there.
    """
    return len(leaf.shape) == 2 and (use is None or (use.labels is None and use.op not in _TELLING))


def axis_labels(path: LeafPath, leaf: HasShape, uses: Uses | None) -> str:
    """One label for each axis of a weight: those in `uses`, or in and out if the weight has two axes."""
    use = (uses or {}).get(path)
    if use is not None and use.labels is not None:
        require(
            len(use.labels) == len(leaf.shape) and not set(use.labels) - {IN, OUT, STACK},
            f"`uses` labels `{path}` {shape_text(leaf)} with {use.labels!r}: one of i, o, s for each axis",
        )
        return use.labels
    if by_convention(leaf, use):
        return IN + OUT
    by_hand = f'`uses={{"{path}": lj.Use("dot_general", labels)}}` with one label an axis (i in, o out, s stack)'
    if use is not None:
        why, fix = f" ({use.reason})", f"give them yourself, `uses | ...` with {by_hand}"
    elif uses is None:
        why, fix = "", f"pass `uses=lj.trace_weights(fn, params, ...)`, or {by_hand}"
    else:
        why, fix = " (`uses` has no entry for it: the function doesn't use it)", f"give them yourself, {by_hand}"
    raise ArgumentError(f"the roles of the axes of `{path}` {shape_text(leaf)} are unknown{why}: {fix}")
