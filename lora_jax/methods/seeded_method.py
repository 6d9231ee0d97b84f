"""Base of the methods whose adapted weights are merged before a function runs, since their parts can't compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NoReturn, Self

from ..errors import ArgumentError
from ..selection import SelectionError, Selector, select
from ..types import LeafPath, PyTree
from ..weights import MergedOnEntry, is_adapted
from . import dtypes
from .base import (
    LeafLabels,
    Leaves,
    Method,
    flag,
    is_number,
    require,
    require_made,
    require_seed,
    require_selector,
    rooted,
)


@dataclasses.dataclass(frozen=True)
class SeededWeight(MergedOnEntry):
    """Base of the nodes whose random part is computed from a seed again at every use.

    Attributes:
        base: The frozen leaf, with any number of axes.
        seed: Seed of this leaf's random numbers.
    """

    seed: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        require_seed(self.seed)

    def stacked(self) -> NoReturn:
        raise ArgumentError(
            f"a {type(self).__name__} can't be taken apart, since its random numbers belong to the leaf as a whole: "
            "fold it in first, with `lj.merge_params`"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeededMethod(Method):
    """Base of the methods that put a `SeededWeight` at each of their targets.

    Attributes:
        targets: `"all"` leaves but the head's, or what `selection.select` reads.
        seed: Seed of what is drawn. The key of `attach` isn't used.
    """

    nodes: ClassVar[tuple[type[SeededWeight], ...]]
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": ()}

    targets: Selector = dataclasses.field(default="all", metadata=flag("all, or modules"))
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")
        require(is_number(self.seed, int), f"`seed` must be an integer, got {self.seed!r}")

    def selected_from(
        self, leaves: Leaves, *, eligible: Callable[[LeafPath, PyTree], bool], kind: str
    ) -> list[LeafPath]:
        """Paths of the targets, in tree order; `leaves` are those of the base."""
        heads = set(self.head(leaves))
        if self.targets == "all":
            found = [path for path, leaf in leaves.items() if path not in heads and eligible(path, leaf)]
            if not found:
                raise SelectionError(f'`targets="all"` found no {kind} beside the head')
        else:
            found = select(leaves, self.targets, argument="targets", eligible=eligible, kind=kind, below=True)
            if both := sorted(heads & set(found)):
                raise SelectionError(f"`targets` and `also_train` both select {', '.join(both)}: choose one of the two")
        return dtypes.trained(leaves, found, argument="targets")

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        return require_made(
            self, {path: leaf.label(True) for path, leaf in leaves.items() if isinstance(leaf, self.nodes)}
        )

    def with_targets(self, leaves: Leaves, paths: list[LeafPath]) -> Self:
        """For `resolved`: this method with its selectors written out."""
        return dataclasses.replace(super().resolved(leaves), targets=rooted(paths))


def bases(leaves: Leaves) -> dict[LeafPath, PyTree]:
    """The base's leaves, whether or not they are adapted."""
    return {path: leaf.base if is_adapted(leaf) else leaf for path, leaf in leaves.items()}
