"""What the methods that change weights share: which weights, and which of their axes are in and out."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax

from ..errors import ArgumentError
from ..paths import BIAS_NAMES, NORM_NAMES, leaf_name, shape_text
from ..selection import SelectionError, Selector, matches_entry, select
from ..weights import IN, OUT, STACK, AdaptedWeight
from . import dtypes
from .base import Method, is_trainable, is_weight, require, require_selector, rooted
from .presets import PRESETS, Choice, choose, reasons

# Operations that say which of a weight's axes are in and which are out, if any labels fit.
_TELLING = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")


class Target(NamedTuple):
    """A weight that a method changes, one label for each of its axes."""

    path: str
    base: Any
    axes: str

    def sizes(self, label: str) -> tuple[int, ...]:
        """The base's axes of one label, in its order."""
        return tuple(size for size, own in zip(self.base.shape, self.axes, strict=True) if own == label)

    def size(self, label: str) -> int:
        return math.prod(self.sizes(label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMethod(Method, abstract=True):
    """Base of the methods that put an adapted weight at each of their targets.

    A subclass names its node and its presets, and makes the nodes in `nodes`.
    """

    node: ClassVar[type[AdaptedWeight]]
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = PRESETS

    targets: Selector

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")

    def nodes(self, targets: list[Target], *, key: jax.Array) -> dict[str, AdaptedWeight]:
        """The adapted weight of each target, by path, as training starts."""
        raise NotImplementedError

    def selected(self, leaves: Mapping[str, Any], uses: Mapping[str, Any] | None = None) -> list[str]:
        """Paths of the weights that are adapted."""
        return self._choice(leaves, uses).found

    @property
    def by_preset(self) -> bool:
        """Whether the targets are found by the library, not named."""
        return isinstance(self.targets, str) and self.targets in self.presets

    def _choice(self, leaves: Mapping[str, Any], uses: Mapping[str, Any] | None) -> Choice:
        if not self.by_preset:
            return Choice(
                select(leaves, self.targets, argument="targets", eligible=self._may_be_named, kind="weight"), {}
            )
        preset = str(self.targets)
        return choose(preset, self.presets[preset], leaves, set(self.head(leaves)), uses)

    def _may_be_named(self, path: str, leaf: Any) -> bool:
        """A weight; or what is named like a bias or a scale in part, a `gate_bias`, if its own name is given."""
        if is_weight(path, leaf) or callable(self.targets) or isinstance(self.targets, str):
            return is_weight(path, leaf)
        name = leaf_name(path)
        if not is_trainable(path, leaf) or len(leaf.shape) < 2 or name in BIAS_NAMES | NORM_NAMES:
            return False
        return any(entry.rpartition("/")[2] == name and matches_entry(path, entry) for entry in self.targets)

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        found, unusable = self._choice(leaves, uses)
        if unusable:
            warnings.warn(
                f"`targets={self.targets!r}` leaves out weights that factors can't stand beside. {reasons(unusable)}",
                stacklevel=3,
            )
        chosen = self._admitted(leaves, found)
        both = sorted(set(chosen) & set(self.head(leaves)))
        if both:
            raise SelectionError(
                f"`targets` and `also_train` both select {', '.join(both)}: train it in full or by factors"
            )
        return self.nodes(
            [Target(path, leaves[path], axis_labels(path, leaves[path], uses)) for path in chosen], key=key
        )

    def own_nodes(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The method's adapted weights in a tree, by path."""
        return {path: leaf for path, leaf in leaves.items() if type(leaf) is self.node}

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        nodes = self.own_nodes(leaves)
        require(
            bool(nodes),
            f"the tree has no {type(self).__name__} factors: make them with `lj.attach(params, method, key=...)` and "
            "label its result",
        )
        return {path: nodes[path].label(True) for path in self._admitted(leaves, list(nodes))}

    def _admitted(self, leaves: Mapping[str, Any], paths: list[str]) -> list[str]:
        """`paths`, if factors can stand beside their leaves."""
        return dtypes.factored(leaves, paths)

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return dataclasses.replace(super().resolved(leaves), targets=rooted(list(self.own_nodes(leaves))))


def overridden(default: Any, overrides: Mapping[str, Any], targets: list[Target], argument: str) -> dict[str, Any]:
    """`default` for each target by path, or what the one entry of `overrides` that matches it says."""
    values = {target.path: default for target in targets}
    owner: dict[str, str] = {}
    for entry, value in overrides.items():
        matched = matching(entry, targets, argument)
        for path in matched:
            if path in owner:
                raise SelectionError(f"`{argument}` entries {owner[path]!r} and {entry!r} both match {path}")
            owner[path], values[path] = entry, value
    return values


def matching(entry: str, targets: list[Target], argument: str) -> list[str]:
    """Paths of the targets that a name means; one at least."""
    matched = [target.path for target in targets if matches_entry(target.path, entry)]
    if not matched:
        chosen = ", ".join(target.path for target in targets)
        raise SelectionError(f"`{argument}` entry {entry!r} matches none of the targets: {chosen}")
    return matched


def by_convention(leaf: Any, use: Any) -> bool:
    """Whether a weight is read as `(in, out)`: it has two axes, and no use of it says otherwise.

    A `custom_vjp`, or elementwise arithmetic, says nothing of them: whatever its labels, the weight is merged there.
    """
    return len(leaf.shape) == 2 and (use is None or (use.labels is None and use.op not in _TELLING))


def axis_labels(path: str, leaf: Any, uses: Mapping[str, Any] | None) -> str:
    """One label for each axis of a weight: what `uses` says, or in and out where there are two."""
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
        why, way_out = f" ({use.reason})", f"give them yourself, `uses | ...` with {by_hand}"
    elif uses is None:
        why, way_out = "", f"pass `uses=lj.trace_weights(fn, params, ...)`, or {by_hand}"
    else:
        why, way_out = " (`uses` has no entry for it: the function doesn't use it)", f"give them yourself, {by_hand}"
    raise ArgumentError(f"the roles of the axes of `{path}` {shape_text(leaf)} are unknown{why}: {way_out}")
