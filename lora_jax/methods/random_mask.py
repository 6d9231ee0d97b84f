"""Random masks: some entries of the weights are trained, chosen at random."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax import lax

from ..draws import leaf_seed, spread_places
from ..types import HasShape, LeafPath, Uses
from ..weights import IN, OUT, STACK, AdaptedWeight, labelled, register, wider
from .base import Leaves, flag, is_number, is_trainable, is_weight, require
from .bitfit import BitFit
from .seeded_method import SeededMethod, SeededWeight, bases
from .weight_method import axis_labels

Lines = Literal["uniform", "rows", "columns"]


@register
@dataclasses.dataclass(frozen=True)
class MaskedEntries(SeededWeight):
    """`W` with new values in `n` of its entries, at indices drawn from `seed`: `W[indices] = values`.

    Attributes:
        values: Shape `(n,)`, float32; they start as the entries that they replace. `MaskedRows` and `MaskedColumns`
            replace whole lines, `(n, out…)` and `(n, in…)`.
    """

    saved_as: ClassVar[str] = "MaskedEntries"
    fields: ClassVar[dict[str, str]] = {"values": "n"}
    saved: ClassVar[tuple[str, ...]] = ("values",)
    # Labels of the axes among whose entries one is drawn; the others lie within a line.
    across: ClassVar[str] = STACK + IN + OUT

    values: jax.Array

    @property
    def lines(self) -> int:
        """Number of entries (rows, columns) to draw from."""
        return math.prod(self.shape[axis] for axis in self._order()[0])

    def started(self, count: int) -> Self:
        """This node with `count` values, those of the base."""
        values = _taken(self._as_lines(self.base), jnp.uint32(self.seed), count=count)
        return dataclasses.replace(self, values=values.astype(wider(values.dtype, jnp.float32)))

    def merge(self) -> jax.Array:
        across, within = self._order()
        problem = self.misfit({"values": self.values.shape})
        require(problem is None, f"a {type(self).__name__} can't be merged: {problem}")
        lines = _replaced(self._as_lines(self.base), self.values, jnp.uint32(self.seed))
        whole = lines.reshape([self.shape[axis] for axis in across + within])
        return lax.transpose(whole, [(across + within).index(axis) for axis in range(self.ndim)])

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        problem = super().misfit(shapes)
        if problem is None and not 1 <= shapes["values"][0] <= self.lines:
            return f"`values` {shapes['values']} must be from 1 to the base's {self.lines} lines"
        return problem

    def label(self, method_labels: bool) -> Self:
        return labelled(self, {"values": "masked"} if method_labels else {})

    def _order(self) -> tuple[list[int], list[int]]:
        across = [axis for axis in range(self.ndim) if self.axes[axis] in self.across]
        return across, [axis for axis in range(self.ndim) if axis not in across]

    def _as_lines(self, array: jax.Array) -> jax.Array:
        across, within = self._order()
        return lax.transpose(array, across + within).reshape(self.lines, *(self.shape[axis] for axis in within))


@register
@dataclasses.dataclass(frozen=True)
class MaskedRows(MaskedEntries):
    """`MaskedEntries` whose lines are rows: the weights of one input, `W[i, :]` of a weight `(in, out)`."""

    saved_as: ClassVar[str] = "MaskedRows"
    fields: ClassVar[dict[str, str]] = {"values": "no"}
    across: ClassVar[str] = STACK + IN


@register
@dataclasses.dataclass(frozen=True)
class MaskedColumns(MaskedEntries):
    """`MaskedEntries` whose lines are columns: the weights of one output, `W[:, j]` of a weight `(in, out)`."""

    saved_as: ClassVar[str] = "MaskedColumns"
    fields: ClassVar[dict[str, str]] = {"values": "ni"}
    across: ClassVar[str] = STACK + OUT


# The seed is an argument, so that one program serves all leaves of equal shapes.
@functools.partial(jax.jit, static_argnames="count")
def _taken(lines: jax.Array, seed: jax.Array, *, count: int) -> jax.Array:
    return lines[spread_places(seed, count, lines.shape[0])]


@jax.jit
def _replaced(lines: jax.Array, values: jax.Array, seed: jax.Array) -> jax.Array:
    indices = spread_places(seed, values.shape[0], lines.shape[0])
    return lines.at[indices].set(values.astype(lines.dtype), indices_are_sorted=True, unique_indices=True)


_NODES: dict[str, type[MaskedEntries]] = {"uniform": MaskedEntries, "rows": MaskedRows, "columns": MaskedColumns}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMask(SeededMethod):
    """Trains `k` parameters drawn at random, and the head: `W[indices] = values`; all others stay as pretrained.

    The baseline answers whether biases are special, or whether any parameters of the same number would do. Each leaf
    has the same share `k / N` of the `N` parameters in the targets, up to whole parameters (or rows, or columns).

    Only `values` are parameters: there are a gradient and optimizer state for `k` of them. The indices are computed
    from the seed at every use. A step still costs as much as in full fine-tuning: the function gets the merged weights,
    and the gradient of `values` is read off the gradient of the whole weight. It is a baseline for quality, not for
    speed.

    Args:
        size: `k`, an integer; or a share of the targets' parameters, as a float below 1; or `"bitfit"`, as many as the
            tree has biases outside of the head.
        kind: What is drawn: `"uniform"` single parameters, `"rows"` and `"columns"` whole rows and columns of weights.
            A row has the weights of one input, a column those of one output.
        targets: Leaves to draw from: `"all"` (for rows and columns, all weights) but the head's, or those at and below
            what is named; see `selection.select`.
        seed: Seed of the indices; that of a leaf follows from it and the leaf's path. The key of `attach` isn't used.
        also_train: The head, see `Method`.

    Raises:
        ValueError: `size` or `kind` is none of these, or (when used) `size` is more than the targets have, or less than
            one line; the axes of a weight of more than two are unknown (for rows and columns).
        SelectionError: (When used.) An entry matches nothing, or a target is also a head.

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
        The parameters are spread: one is drawn from each of `k` equal parts of a leaf. The paper draws from the whole.
    """

    name: ClassVar[str] = "random-mask"
    saved_as: ClassVar[str] = "RandomMask"
    title: ClassVar[str] = "random mask"
    summary: ClassVar[str] = "parameters drawn at random, a baseline"
    defaults: ClassVar[Mapping[str, object]] = {"size": "bitfit"}
    default_rate: ClassVar[float] = 3e-3
    nodes: ClassVar[tuple[type[SeededWeight], ...]] = tuple(_NODES.values())

    size: int | float | str = dataclasses.field(
        default="bitfit", metadata=flag("Number of parameters, their share as 0.01, or bitfit for as many as biases")
    )
    kind: Lines = dataclasses.field(default="uniform", metadata=flag("Single parameters (uniform), rows or columns"))

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.size
        if isinstance(size, str):
            usable = size == "bitfit"
        else:
            usable = size >= 1 if is_number(size, int) else is_number(size, float) and 0 < size < 1
        require(
            usable,
            f'`size` must be a positive integer, a share between 0 and 1, or "bitfit", got {self.size!r}',
        )
        require(self.kind in get_args(Lines), f"`kind` must be one of {get_args(Lines)}, got {self.kind!r}")

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        del key
        wanted = self.count(leaves)
        node = _NODES[self.kind]
        targets = {
            path: node.bare(leaves[path], seed=leaf_seed(self.seed, path), axes=self._axes(path, leaves[path], uses))
            for path in self.selected(leaves)
        }
        total = sum(target.size for target in targets.values())
        require(
            wanted <= total, f"`size` must be at most {total}, the number of parameters in the targets, got {wanted}"
        )
        counts = _shares(wanted / total, targets)
        require(
            any(counts.values()),
            f"`size` {wanted} is less than one of the {self.kind}: choose a larger `size`, or fewer `targets`",
        )
        return {path: target.started(counts[path]) for path, target in targets.items() if counts[path]}

    def count(self, leaves: Leaves) -> int:
        """`k` for a tree, adapted or not."""
        leaves = bases(leaves)
        if self.size == "bitfit":
            found = set(BitFit().selected(leaves)) - set(self.head(leaves))
            return sum(math.prod(leaves[path].shape) for path in found)
        if isinstance(self.size, float) and self.size < 1:
            return round(self.size * sum(math.prod(leaves[path].shape) for path in self.selected(leaves)))
        return int(self.size)

    def resolved(self, leaves: Leaves) -> Self:
        return dataclasses.replace(self.with_targets(leaves, self.selected(bases(leaves))), size=self.count(leaves))

    def selected(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the targets, in tree order; `leaves` are those of the base."""
        if self.kind == "uniform":
            return self.selected_from(leaves, eligible=is_trainable, kind="leaf of a floating type")
        return self.selected_from(leaves, eligible=is_weight, kind="weight")

    def _axes(self, path: LeafPath, leaf: HasShape, uses: Uses | None) -> str:
        if self.kind == "uniform":
            return OUT * len(leaf.shape)
        return axis_labels(path, leaf, uses)


def _shares(share: float, targets: Mapping[LeafPath, MaskedEntries]) -> dict[LeafPath, int]:
    """Number of lines of each target that make up the share; what rounding leaves over goes to the next."""
    counts, left = {}, 0.0
    for path, target in targets.items():
        length = target.size // target.lines
        left += share * target.size
        counts[path] = min(target.lines, max(0, round(left / length)))
        left -= counts[path] * length
    return counts
