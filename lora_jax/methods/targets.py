"""What the methods that change weights share: which weights, and which of their axes are in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax

from ..paths import SelectionError, Selector, matches_entry, select, shape_text
from ..weights import IN, OUT, STACK, AdaptedWeight
from . import dtypes
from .base import Method, is_weight, require, require_selector, rooted

_ATTENTION = tuple(f"attention/{name}" for name in ("query", "key", "value", "query_key_value", "output"))
_MLP = tuple(f"mlp/{name}" for name in ("up", "gate", "down"))
PRESETS = {"attention": _ATTENTION, "mlp": _MLP, "all-linear": _ATTENTION + _MLP}
# Modules that map to the output's vocabulary or classes; `"all-linear"` leaves them alone, as PEFT does.
_OUTPUT_HEADS = ("lm_head", "head", "classifier", "score", "logits", "unembed", "output_projection")


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
        preset = self.presets.get(self.targets) if isinstance(self.targets, str) else None
        if preset is None:
            return select(leaves, self.targets, argument="targets", eligible=is_weight, kind="weight")
        heads = set(self.head(leaves))
        if self.targets == "all-linear" and uses is not None:
            return [path for path in leaves if path not in heads and _is_linear(path, uses)]
        found = [
            path
            for path, leaf in leaves.items()
            if path not in heads and is_weight(path, leaf) and any(matches_entry(path, entry) for entry in preset)
        ]
        if not found:
            way_out = (
                'pass `targets="all-linear"` with `uses=lj.trace_weights(fn, params, ...)`'
                if "all-linear" in self.presets
                else "say which they are by their own names"
            )
            raise SelectionError(
                f"`targets={self.targets!r}` knows the bundled models' names ({', '.join(preset)}), and this tree has "
                f"none of them: name the modules, or {way_out}"
            )
        return found

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        chosen = self._admitted(leaves, self.selected(leaves, uses))
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


def axis_labels(path: str, leaf: Any, uses: Mapping[str, Any] | None) -> str:
    """One label for each axis of a weight: what `uses` says, or in and out where there are two."""
    use = (uses or {}).get(path)
    if use is not None and use.labels is not None:
        require(
            len(use.labels) == len(leaf.shape) and not set(use.labels) - {IN, OUT, STACK},
            f"`uses` labels `{path}` {shape_text(leaf)} with {use.labels!r}: one of i, o, s for each axis",
        )
        return use.labels
    if use is None and len(leaf.shape) == 2:
        return IN + OUT
    why = f" ({use.reason})" if use is not None else ""
    raise ValueError(
        f"the roles of the axes of `{path}` {shape_text(leaf)} are unknown{why}: pass "
        "`uses=lj.trace_weights(fn, params, ...)`, or "
        f'`uses={{"{path}": lj.Use("dot_general", labels)}}` with one label an axis (i in, o out, s stack)'
    )


def _is_linear(path: str, uses: Mapping[str, Any]) -> bool:
    use = uses.get(path)
    linear = (
        use is not None
        and use.labels is not None
        and use.op in ("dot_general", "conv_general_dilated", "ragged_dot_general")
    )
    return linear and not any(matches_entry(path, head) for head in _OUTPUT_HEADS)
