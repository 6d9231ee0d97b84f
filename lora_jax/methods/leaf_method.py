"""Base of the methods that train some of a model's own leaves in full and add nothing to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

from ..paths import leaf_name, listed
from ..selection import SelectionError, Selector, select
from ..types import LeafPath, PyTree
from . import dtypes
from .base import LeafLabels, Leaves, Method, flag, is_trainable, require_selector, rooted


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafMethod(Method):
    """Base of the methods that train leaves of one kind, all of them or those that are named; nothing needs merging.

    Attributes:
        targets: `"all"` leaves of the kind, or what `selection.select` reads.
    """

    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": ()}
    # Label of the trained leaves.
    label: ClassVar[str]
    # Singular noun for such a leaf, and for what `"all"` looks for.
    kind: ClassVar[str]
    sought: ClassVar[str]
    # Whether a name in `targets` means everything below it, too.
    below: ClassVar[bool] = False

    targets: Selector = dataclasses.field(default="all", metadata=flag("all, or modules"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")

    def members(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the leaves of the kind, those that `"all"` takes."""
        raise NotImplementedError

    def advice(self, leaves: Leaves) -> str:
        """The end of the message where a tree has no leaf of the kind: what to do."""
        return (
            f"Leaves with one axis: {listed(self.candidates(leaves)) or 'none'}; name those that are meant in `targets`"
        )

    def candidates(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the leaves that may be of the kind under another name."""
        return [path for path, leaf in leaves.items() if _is_vector(path, leaf)]

    def may_be_named(self, path: LeafPath, leaf: PyTree) -> bool:
        """Whether a leaf that isn't known to be of the kind is trained if the user names it."""
        return _is_vector(path, leaf)

    def selected(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the leaves that are trained."""
        members = self.members(leaves)
        if self.targets == "all":
            if not members:
                raise SelectionError(f'`targets="all"` found no {self.sought}. {self.advice(leaves)}'.rstrip())
            return members
        known = set(members)

        def eligible(path: LeafPath, leaf: PyTree) -> bool:
            return path in known or (self.may_be_named(path, leaf) and self._is_named(path))

        return select(leaves, self.targets, argument="targets", eligible=eligible, kind=self.kind, below=self.below)

    def _is_named(self, path: LeafPath) -> bool:
        """A name that means a whole module must not select its vectors of another kind, such as a norm's scale."""
        names = self.targets
        return callable(names) or isinstance(names, str) or leaf_name(path) in map(leaf_name, names)

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        return dict.fromkeys(dtypes.trained(leaves, self.selected(leaves), argument="targets"), self.label)

    def resolved(self, leaves: Leaves) -> Self:
        return dataclasses.replace(super().resolved(leaves), targets=rooted(self.selected(leaves)))


def _is_vector(path: LeafPath, leaf: PyTree) -> bool:
    return is_trainable(path, leaf) and len(leaf.shape) == 1
