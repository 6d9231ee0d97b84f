"""What the methods share whose adapted weights are merged before a function runs, since their parts can't compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from ..errors import ArgumentError
from ..selection import SelectionError, Selector, select
from ..weights import AdaptedWeight
from . import dtypes
from .base import Method, is_number, require, require_selector, rooted


@dataclasses.dataclass(frozen=True)
class WholeWeight(AdaptedWeight):
    """Base of nodes whose random part is computed from a seed, again at every use, and which functions get merged.

    Attributes:
        base: the frozen leaf, any number of axes.
        seed: of this leaf's random numbers.
    """

    merged_on_entry: ClassVar[bool] = True

    seed: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        require(
            is_number(self.seed, int) and 0 <= self.seed < 2**32,
            f"`seed` must be an integer from 0 to 2³² - 1, got {self.seed!r}",
        )

    def stacked(self) -> Any:
        return self._with()

    def _with(self, *_: Any) -> Any:
        # Every change of layout ends here.
        raise ArgumentError(
            f"a {type(self).__name__} can't be moved or taken apart, since its random numbers belong to the leaf as a "
            "whole: fold it in first, with `lj.merge_params`"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeMethod(Method, abstract=True):
    """Base of the methods that put a `WholeWeight` at each of their targets.

    Attributes:
        targets: `"all"`, which leaves out the head alone, or what `selection.select` reads.
        seed: of what is drawn. The key of `attach` isn't used.
    """

    nodes: ClassVar[tuple[type[WholeWeight], ...]]

    targets: Selector = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")
        require(is_number(self.seed, int), f"`seed` must be an integer, got {self.seed!r}")

    def chosen(self, leaves: Mapping[str, Any], *, eligible: Callable[[str, Any], bool], kind: str) -> list[str]:
        """Paths of the targets, in tree order; `leaves` are those of the base."""
        return dtypes.trained(leaves, self._named(leaves, eligible, kind), argument="targets")

    def _named(self, leaves: Mapping[str, Any], eligible: Callable[[str, Any], bool], kind: str) -> list[str]:
        heads = set(self.head(leaves))
        if self.targets == "all":
            found = [path for path, leaf in leaves.items() if path not in heads and eligible(path, leaf)]
            if not found:
                raise SelectionError(f'`targets="all"` found no {kind} beside the head')
            return found
        found = select(leaves, self.targets, argument="targets", eligible=eligible, kind=kind, below=True)
        if both := sorted(heads & set(found)):
            raise SelectionError(f"`targets` and `also_train` both select {', '.join(both)}: choose one of the two")
        return found

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        labels = {path: leaf.label(True) for path, leaf in leaves.items() if isinstance(leaf, self.nodes)}
        require(
            bool(labels),
            f"the tree has nothing of {type(self).__name__}: make it with `lj.attach(params, method, key=...)` and "
            "label its result",
        )
        return labels

    def with_targets(self, leaves: Mapping[str, Any], paths: list[str], **settings: Any) -> Self:
        """For `resolved`: this method with selectors written out."""
        return dataclasses.replace(super().resolved(leaves), targets=rooted(paths), **settings)


def bases(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The base's leaves, be they adapted or not."""
    return {path: leaf.base if isinstance(leaf, AdaptedWeight) else leaf for path, leaf in leaves.items()}
