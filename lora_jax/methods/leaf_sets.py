"""What the methods share that train some of a model's own leaves in full and add nothing to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from ..paths import leaf_name, listed
from ..selection import SelectionError, Selector, select
from . import dtypes
from .base import Method, is_trainable, require_selector, rooted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection(Method, abstract=True):
    """Base of the methods that train leaves of one kind, all or those that are named. Nothing needs merging.

    Attributes:
        targets: `"all"` of the kind, or what `selection.select` reads.
    """

    # The label of what is trained; what one such leaf is called; what `"all"` looks for; whether a name means
    # everything below it too.
    label: ClassVar[str]
    kind: ClassVar[str]
    sought: ClassVar[str]
    below: ClassVar[bool] = False

    targets: Selector = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")

    def members(self, leaves: Mapping[str, Any]) -> list[str]:
        """Paths of the leaves of the kind: what `"all"` takes."""
        raise NotImplementedError

    def way_out(self, leaves: Mapping[str, Any]) -> str:
        """What to do where there is nothing of the kind; ends the message."""
        return (
            f"Leaves with one axis: {listed(self.candidates(leaves)) or 'none'}; name those that are meant in `targets`"
        )

    def candidates(self, leaves: Mapping[str, Any]) -> list[str]:
        """Paths of the leaves that may be of the kind under another name."""
        return [path for path, leaf in leaves.items() if _is_vector(path, leaf)]

    def may_be_named(self, path: str, leaf: Any) -> bool:
        """Whether a leaf that isn't known to be of the kind is taken at the user's word."""
        return _is_vector(path, leaf)

    def selected(self, leaves: Mapping[str, Any]) -> list[str]:
        """Paths of what is trained."""
        members = self.members(leaves)
        if self.targets == "all":
            if not members:
                raise SelectionError(f'`targets="all"` found no {self.sought}. {self.way_out(leaves)}'.rstrip())
            return members
        chosen = set(members)

        def eligible(path: str, leaf: Any) -> bool:
            return path in chosen or (self.may_be_named(path, leaf) and self._is_named(path))

        return select(leaves, self.targets, argument="targets", eligible=eligible, kind=self.kind, below=self.below)

    def _is_named(self, path: str) -> bool:
        """A name that means a whole module must not sweep up its vectors of another kind: a norm's scale, say."""
        names = self.targets
        return callable(names) or isinstance(names, str) or leaf_name(path) in map(leaf_name, names)

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(dtypes.trained(leaves, self.selected(leaves), argument="targets"), self.label)

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return dataclasses.replace(super().resolved(leaves), targets=rooted(self.selected(leaves)))


def _is_vector(path: str, leaf: Any) -> bool:
    return is_trainable(path, leaf) and len(leaf.shape) == 1
