"""A random mask: of all weights, some entries learn, chosen by chance."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax import lax

from ..draws import leaf_seed, spread_places
from ..weights import IN, OUT, STACK, register, wider
from .base import is_number, is_trainable, is_weight, require
from .bitfit import BitFit
from .targets import axis_labels
from .whole import WholeMethod, WholeWeight, bases

Kind = Literal["uniform", "rows", "columns"]


@register
@dataclasses.dataclass(frozen=True)
class MaskedEntries(WholeWeight):
    """`W` with new values in `n` of its entries, at places drawn from `seed`: `W[places] = values`.

    Attributes:
        values: shape `(n,)`, float32; they start as the entries that they replace. In `MaskedRows` and
            `MaskedColumns` they are whole lines, `(n, out…)` and `(n, in…)`.
    """

    fields: ClassVar[dict[str, str]] = {"values": "n"}
    saved: ClassVar[tuple[str, ...]] = ("values",)
    # Labels of the axes along which one chooses; the others lie within a line.
    across: ClassVar[str] = STACK + IN + OUT

    values: Any

    @property
    def lines(self) -> int:
        """How many entries (rows, columns) there are to choose from."""
        return math.prod(self.shape[axis] for axis in self._order()[0])

    def started(self, count: int) -> Self:
        """This node with `count` values, those of the base."""
        values = _taken(self._as_lines(self.base), jnp.uint32(self.seed), count=count)
        return dataclasses.replace(self, values=values.astype(wider(values.dtype, jnp.float32)))

    def merge(self) -> jax.Array:
        across, within = self._order()
        problem = self.misfit({"values": self.values.shape})
        require(problem is None, str(problem))
        lines = _replaced(self._as_lines(self.base), self.values, jnp.uint32(self.seed))
        whole = lines.reshape([self.shape[axis] for axis in across + within])
        return lax.transpose(whole, [(across + within).index(axis) for axis in range(self.ndim)])

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        problem = super().misfit(shapes)
        if problem is None and not 1 <= shapes["values"][0] <= self.lines:
            return f"`values` {shapes['values']} must be from 1 to the base's {self.lines} lines"
        return problem

    def label(self, method_labels: bool) -> Self:
        return dataclasses.replace(self, base="frozen", values="masked" if method_labels else "frozen")

    def _order(self) -> tuple[list[int], list[int]]:
        across = [axis for axis in range(self.ndim) if self.axes[axis] in self.across]
        return across, [axis for axis in range(self.ndim) if axis not in across]

    def _as_lines(self, array: jax.Array) -> jax.Array:
        across, within = self._order()
        return lax.transpose(array, across + within).reshape(self.lines, *(self.shape[axis] for axis in within))


@register
@dataclasses.dataclass(frozen=True)
class MaskedRows(MaskedEntries):
    """`MaskedEntries` whose lines are rows: all that one input gives, `W[i, :]` of a weight `(in, out)`."""

    fields: ClassVar[dict[str, str]] = {"values": "no"}
    across: ClassVar[str] = STACK + IN


@register
@dataclasses.dataclass(frozen=True)
class MaskedColumns(MaskedEntries):
    """`MaskedEntries` whose lines are columns: all that one output takes, `W[:, j]` of a weight `(in, out)`."""

    fields: ClassVar[dict[str, str]] = {"values": "ni"}
    across: ClassVar[str] = STACK + OUT


# The seed is an argument, so that one program serves all leaves of equal shapes.
@functools.partial(jax.jit, static_argnames="count")
def _taken(lines: jax.Array, seed: jax.Array, *, count: int) -> jax.Array:
    return lines[spread_places(seed, count, lines.shape[0])]


@jax.jit
def _replaced(lines: jax.Array, values: jax.Array, seed: jax.Array) -> jax.Array:
    places = spread_places(seed, values.shape[0], lines.shape[0])
    return lines.at[places].set(values.astype(lines.dtype), indices_are_sorted=True, unique_indices=True)


_NODES: dict[str, type[MaskedEntries]] = {"uniform": MaskedEntries, "rows": MaskedRows, "columns": MaskedColumns}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMask(WholeMethod):
    """Trains `k` numbers of the model chosen by chance, and the head: `W[places] = values`, all else as pretrained.

    The question that it answers is whether the biases are special, or any parameters as many would do. The share
    `k / N` of the `N` numbers in the targets is the same in each leaf, up to whole numbers (or rows, or columns).

    Only `values` are parameters: there is a gradient and optimizer state for `k` numbers. The places are computed from
    the seed at every use. The cost of a step is that of full fine-tuning nevertheless: the function gets the merged
    weights, and the gradient of `values` is read off that of the whole weight, which is formed on the way. It is a
    baseline for quality, not for speed.

    Args:
        size: `k`, a whole number; or a share of the targets' numbers, as a float below 1; or `"bitfit"`, as many as the
            tree has biases outside of the head.
        kind: `"uniform"` chooses single numbers, `"rows"` and `"columns"` whole rows and columns of weights: a row is
            what one input gives to all outputs, a column what one output takes from all inputs.
        targets: what is chosen from: `"all"` leaves (for rows and columns, all weights) but the head's, or those at and
            below what is named; see `selection.select`.
        seed: of the places; that of a leaf follows from it and the leaf's path. The key of `attach` isn't used.
        also_train: the head, see `Method`.

    Raises:
        ValueError: `size` or `kind` is none of these, or (when used) `size` is more than there are numbers, or less
            than one line; the axes of a weight of more than two are unknown (for rows and columns).
        SelectionError: (when used) an entry matches nothing, or a target is also a head.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.RandomMask(size=3, targets=("dense",))
        >>> params = lj.attach({"dense": {"kernel": jnp.ones((8, 4))}}, method, key=jax.random.key(0))
        >>> params["dense"]["kernel"].values.shape, lj.merge_params(params)["dense"]["kernel"].shape
        ((3,), (8, 4))

    Reference:
        Ben Zaken, Goldberg, Ravfogel, "BitFit", ACL 2022, arXiv:2106.10199, section 4, "Are bias parameters special?":
        "rand uniform" and "rand row/col".

    Deviations:
        The numbers are spread: cut into `k` equal parts, a leaf gives one of each. The paper draws without such parts.
    """

    nodes: ClassVar[tuple[type[WholeWeight], ...]] = tuple(_NODES.values())

    size: int | float | str = "bitfit"
    kind: Kind = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.size
        if isinstance(size, str):
            usable = size == "bitfit"
        else:
            usable = size >= 1 if is_number(size, int) else is_number(size, float) and 0 < size < 1
        require(
            usable,
            f'`size` must be a whole number of at least 1, a share between 0 and 1, or "bitfit", got {self.size!r}',
        )
        require(self.kind in _NODES, f"`kind` must be one of {tuple(_NODES)}, got {self.kind!r}")

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        del key
        wanted = self.count(leaves)
        node = _NODES[self.kind]
        targets = {
            path: node(leaves[path], None, seed=leaf_seed(self.seed, path), axes=self._axes(path, leaves[path], uses))
            for path in self._targets(leaves)
        }
        total = sum(target.size for target in targets.values())
        require(wanted <= total, f"`size` {wanted} is more than the {total} numbers of the targets")
        counts = _shares(wanted / total, targets)
        require(
            any(counts.values()),
            f"`size` {wanted} is less than one of the {self.kind}: choose a larger one, or fewer `targets`",
        )
        return {path: target.started(counts[path]) for path, target in targets.items() if counts[path]}

    def count(self, leaves: Mapping[str, Any]) -> int:
        """`k` for a tree, adapted or not."""
        leaves = bases(leaves)
        if self.size == "bitfit":
            found = set(BitFit().selected(leaves)) - set(self.head(leaves))
            return sum(math.prod(leaves[path].shape) for path in found)
        if isinstance(self.size, float) and self.size < 1:
            return round(self.size * sum(math.prod(leaves[path].shape) for path in self._targets(leaves)))
        return int(self.size)

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return self.with_targets(leaves, self._targets(bases(leaves)), size=self.count(leaves))

    def _targets(self, leaves: Mapping[str, Any]) -> list[str]:
        if self.kind == "uniform":
            return self.chosen(leaves, eligible=is_trainable, kind="leaf of a floating type")
        return self.chosen(leaves, eligible=is_weight, kind="weight")

    def _axes(self, path: str, leaf: Any, uses: Mapping[str, Any] | None) -> str:
        if self.kind == "uniform":
            return OUT * len(leaf.shape)
        return axis_labels(path, leaf, uses)


def _shares(share: float, targets: Mapping[str, MaskedEntries]) -> dict[str, int]:
    """How many lines of each target make up the share; what rounding leaves over goes to the next."""
    counts, left = {}, 0.0
    for path, target in targets.items():
        length = target.size // target.lines
        left += share * target.size
        counts[path] = min(target.lines, max(0, round(left / length)))
        left -= counts[path] * length
    return counts
