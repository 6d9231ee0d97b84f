"""Which leaves of a tree belong to which layer, told by the numbers in their paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# `layers/3/…` of lists, `Block_3/…` of Flax Linen's own numbering.
_NUMBERED = re.compile(r"(?:(?P<name>.+)_)?(?P<number>\d+)")


class Place(NamedTuple):
    """Where a leaf is within a stack of layers.

    Attributes:
        stack: The path of the layers, `encoder/layers`.
        layer: The number of this one.
        term: The rest of the path, `attention/query/bias`.
    """

    stack: str
    layer: int
    term: str


def layer_places(paths: Iterable[str]) -> dict[str, Place]:
    """The place of every leaf that belongs to a layer; of stacks within each other the outermost counts.

    A stack is what numbers from 0 on tell apart: the members of a list (`encoder/layers/0/…`), or modules that Flax
    Linen numbers (`Block_0/…`, two of them at least). Layers that one leaf holds along an axis have no paths of their
    own, so they aren't found.

    Example:
        >>> layer_places(["encoder/layers/0/up/bias", "encoder/norm/bias"])
        {'encoder/layers/0/up/bias': Place(stack='encoder/layers', layer=0, term='up/bias')}
    """
    candidates = {path: _candidates(path) for path in paths}
    numbers: dict[str, set[int]] = {}
    for places in candidates.values():
        for place in places:
            numbers.setdefault(place.stack, set()).add(place.layer)

    def is_stack(name: str) -> bool:
        found = numbers[name]
        return found == set(range(len(found))) and (len(found) > 1 or not name.endswith("_"))

    chosen = {
        path: next((place for place in places if is_stack(place.stack)), None) for path, places in candidates.items()
    }
    return {path: place._replace(stack=place.stack.removesuffix("_")) for path, place in chosen.items() if place}


def _candidates(path: str) -> list[Place]:
    """Outermost first; the name of a stack that is told by suffixes ends in `_`."""
    segments, found = path.split("/"), []
    for depth, segment in enumerate(segments[:-1]):
        if match := _NUMBERED.fullmatch(segment):
            name = [match["name"] + "_"] if match["name"] else []
            found.append(
                Place("/".join(segments[:depth] + name), int(match["number"]), "/".join(segments[depth + 1 :]))
            )
    return found


def layer_sizes(places: Mapping[str, Place]) -> dict[str, int]:
    """`{stack: how many layers it has}`, in tree order."""
    sizes: dict[str, int] = {}
    for place in places.values():
        sizes[place.stack] = max(sizes.get(place.stack, 0), place.layer + 1)
    return sizes
