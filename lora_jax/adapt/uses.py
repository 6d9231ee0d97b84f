"""What a function does with each of its weights: `trace_weights` and `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..methods.base import is_weight
from ..paths import flatten_with_paths, require_arrays
from ..state import state_paths
from ..types import Leaf, LeafPath, Params, PyTree, Use
from ..weights import IN, OUT, STACK, ConvSpec, DotSpec, FactoredWeight, RaggedDotSpec, TakeSpec, Unfactorable, register
from .transform import is_array, new_walker, walk_function
from .walk import Encounter

# The axis is gone at the point of use: the function took one member of it, by an index.
_GONE = "?"


class Explanation(tuple[Encounter, ...]):
    """Every meeting of an adapted weight with an operation; prints as a table."""

    @property
    def materialized(self) -> list[str]:
        """Paths of the weights that were merged somewhere."""
        return sorted({row.path for row in self if not row.factored})

    def __str__(self) -> str:
        header = ("weight", "operation", "computed", "where")
        rows = [header] + [
            (row.path, row.op, "factored" if row.factored else f"merged: {row.reason}", row.source) for row in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
            for row in rows
        )


@register
@dataclasses.dataclass(frozen=True)
class _Probe(FactoredWeight):
    """Stands for a weight and notes what is done with its axes; `axes` holds sets of the original axis numbers."""

    note: Callable[[Use], None]
    original_ndim: int
    scanned: frozenset[int] = frozenset()

    def merge(self) -> jax.Array:
        return self.base

    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        self._note(
            "dot_general", {**dict.fromkeys(spec.weight_contract, IN), **dict.fromkeys(spec.weight_batch, STACK)}
        )
        return run(self.base, other)

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        del indices
        self._note("gather", {spec.axis: IN})
        return run(self.base)

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        del other
        self._note("conv_general_dilated", {axis: IN for axis in range(self.ndim) if axis != spec.kernel_out})
        return run(self.base)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        del sizes
        self._note("ragged_dot_general", {spec.weight_contract: IN, spec.weight_group: STACK})
        return run(self.base, other)

    def times(self, factor: jax.Array) -> _Probe:
        return dataclasses.replace(self, base=self.base * factor)

    def _note(self, op: str, roles: dict[int, str]) -> None:
        labels: dict[int, str] = {}
        for axis, originals in enumerate(self.axes):
            role = roles.get(axis, OUT)
            for original in originals:
                if labels.setdefault(original, role) != role:
                    raise Unfactorable("one of its axes is split between the two sides of the operation")
        labels |= dict.fromkeys(self.scanned, STACK)
        self.note(Use(op, "".join(labels.get(axis, _GONE) for axis in range(self.original_ndim))))

    def _join(self, labels: Sequence[Any], sizes: Sequence[int]) -> Any:
        del sizes
        return frozenset().union(*labels)

    def _axes(self, labels: Sequence[Any]) -> Any:
        # Axes that the function adds have no original.
        return tuple(frozenset() if label == STACK else label for label in labels)

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], _Probe]]:
        scanned = self.scanned | self.axes[0]
        return [self.base], lambda slices: dataclasses.replace(
            self, base=slices[0], axes=self.axes[1:], scanned=scanned
        )


def trace_weights(fn: Callable[..., PyTree], params: Params, *args: PyTree, **kwargs: PyTree) -> dict[LeafPath, Use]:
    """How `fn` uses each weight, from an abstract run: nothing is computed.

    Pass the result to `attach` as `uses`, where weights have more than two axes (heads, stacks of layers, experts,
    convolutions), or where two-axis weights are stored `(out, in)`.

    Args:
        fn: The model's function, not adapted.
        params: The base parameters (arrays or `jax.ShapeDtypeStruct`s), its first argument.
        *args, **kwargs: The other arguments, arrays or shapes.

    Returns:
        `{path: Use(op, labels)}` for every weight that `fn` uses, in the order of first use. A weight that two
        operations need different labels for, or that only meets operations without a rule, has `labels=None` and the
        reason; to adapt it nevertheless, override its entry by hand.

    Example:
        >>> import lora_jax as lj
        >>> apply = lambda params, x: jnp.einsum("btd,dnh->btnh", x, params["query"])
        >>> lj.trace_weights(apply, {"query": jnp.ones((8, 2, 4))}, jnp.ones((1, 3, 8)))
        {'query': Use(op='dot_general', labels='ioo', reason='')}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    noted: dict[str, list[Use]] = {}
    merged: dict[str, Encounter] = {}

    def report(encounter: Encounter) -> None:
        noted.setdefault(encounter.path, [])
        if not encounter.factored:
            merged.setdefault(encounter.path, encounter)

    def probed(path: LeafPath, leaf: Leaf) -> _Probe:
        axes = tuple(frozenset({axis}) for axis in range(len(leaf.shape)))
        return _Probe(leaf, lambda use: noted.setdefault(path, []).append(use), len(axes), axes=axes)

    require_arrays(paths, leaves)
    state = state_paths(params)
    weights = {path for path, leaf in zip(paths, leaves, strict=True) if is_weight(path, leaf)} - state
    chosen = [probed(path, leaf) if path in weights else leaf for path, leaf in zip(paths, leaves, strict=True)]
    _walk_abstractly(fn, report, (jax.tree.unflatten(treedef, chosen), *args), kwargs)
    return {path: _overall(found, merged.get(path)) for path, found in noted.items()}


def _overall(found: Sequence[Use], merged: Encounter | None) -> Use:
    reason = "" if merged is None else f"merged by {merged.op} at {merged.source}: {merged.reason}"
    if not found:
        assert merged is not None
        return Use(merged.op, None, reason)
    first = found[0]
    for count, use in enumerate(found, start=1):
        if _agreed(found[:count]) is None:
            shown = [_agreed([one]) for one in (first, use)]
            return Use(
                first.op, None, f"{first.op} needs the labels {shown[0]!r}, {use.op} needs {shown[1]!r}: choose by hand"
            )
    return Use(first.op, _agreed(found), reason)


def _agreed(found: Sequence[Use]) -> str | None:
    """One labelling that every use stays factored with; `None` if there is none.

    A use contracts exactly the in axes or exactly the out axes that it sees. An axis that one use batches or scans over
    is a stack axis for all; so is one that no use sees, because each takes one member of it.
    """
    spelled = [use.labels or "" for use in found]
    axes = range(len(spelled[0]))
    columns = [{labels[axis] for labels in spelled} for axis in axes]
    stack = {axis for axis in axes if STACK in columns[axis] or columns[axis] == {_GONE}}
    fullest = min(spelled, key=lambda labels: labels.count(_GONE))
    inner = {axis for axis in axes if fullest[axis] == IN}
    for labels in spelled:
        seen = {axis for axis in axes if labels[axis] != _GONE} - stack
        if {axis for axis in axes if labels[axis] == IN} not in (inner & seen, seen - inner):
            return None
    return "".join(STACK if axis in stack else IN if axis in inner else OUT for axis in axes)


def explain(fn: Callable[..., PyTree], params: Params, *args: PyTree, **kwargs: PyTree) -> Explanation:
    """Which adapted weight `adapt(fn)` keeps factored, in which operation, and which it merges, where and why.

    An abstract run: nothing is computed.

    Args:
        fn: The model's function, not adapted.
        params: A tree from `attach`, its first argument.
        *args, **kwargs: The other arguments, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        A tuple of `Encounter(path, op, factored, source, reason)` that prints as a table; `materialized` lists the
        merged.

    Example:
        >>> import lora_jax as lj
        >>> node = lj.LoRAWeight(jnp.zeros((2, 3)), jnp.ones((1, 2)), jnp.ones((1, 3)), scale=0.5, axes="io")
        >>> rows = lj.explain(lambda params, x: x @ jnp.tanh(params["w"]), {"w": node}, jnp.ones((1, 2)))
        >>> rows.materialized, rows[0].op
        (['w'], 'tanh')
    """
    rows: list[Encounter] = []
    _walk_abstractly(fn, rows.append, (params, *args), kwargs)
    return Explanation(dict.fromkeys(rows))


def _walk_abstractly(
    fn: Callable[..., PyTree], report: Callable[[Encounter], None], args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> None:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(arrays: list[Leaf]) -> list[Leaf]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        output = walk_function(fn, new_walker(report), args, kwargs)
        return [leaf for leaf in jax.tree.leaves(output) if is_array(leaf)]

    jax.eval_shape(run, [leaves[place] for place in places])
