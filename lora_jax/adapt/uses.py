"""What a function does with each of its weights: `trace_weights` and `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ..methods.base import is_weight
from ..paths import flatten_with_paths
from ..weights import IN, OUT, STACK, AdaptedWeight, ConvSpec, DotSpec, TakeSpec, Unfactorable, register
from .walk import Encounter, is_array, new_walker, walk_function


class Use(NamedTuple):
    """How a function uses one weight.

    Attributes:
        op: the primitive that it works in.
        labels: one letter per axis, `i` in, `o` out, `s` stack; `None` where factors cannot stand beside it.
        reason: why `labels` is `None`.
    """

    op: str
    labels: str | None
    reason: str = ""


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
class _Probe(AdaptedWeight):
    """Stands for a weight and notes what is done with its axes; `axes` holds sets of the original axis numbers."""

    note: Callable[[str, dict[int, str]], None]

    def merge(self) -> jax.Array:
        return self.base

    def dot_general(self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        del other
        self._note(
            "dot_general", {**dict.fromkeys(spec.weight_contract, IN), **dict.fromkeys(spec.weight_batch, STACK)}
        )
        return run(self.base)

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        del indices
        self._note("gather", {spec.axis: IN})
        return run(self.base)

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        del other
        self._note("conv_general_dilated", {axis: IN for axis in range(self.ndim) if axis != spec.kernel_out})
        return run(self.base)

    def times(self, factor: jax.Array) -> _Probe:
        return dataclasses.replace(self, base=self.base * factor)

    def _note(self, op: str, roles: dict[int, str]) -> None:
        labels: dict[int, str] = {}
        for axis, originals in enumerate(self.axes):
            role = roles.get(axis, OUT)
            for original in originals:
                if labels.setdefault(original, role) != role:
                    raise Unfactorable("one of its axes is split between the two sides of the operation")
        self.note(op, labels)

    def _join(self, labels: Sequence[Any], sizes: Sequence[int]) -> Any:
        del sizes
        return frozenset().union(*labels)

    def _axes(self, labels: Sequence[Any]) -> Any:
        # Axes that the function adds have no original.
        return tuple(frozenset() if label == STACK else label for label in labels)

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], _Probe]]:
        return [self.base], lambda slices: dataclasses.replace(self, base=slices[0], axes=self.axes[1:])


def trace_weights(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Use]:
    """How `fn` uses each weight, from an abstract run: nothing is computed.

    Pass the result to `attach` as `uses`, where weights have more than two axes (heads, stacks of layers, experts,
    convolutions), or where two-axis weights are stored `(out, in)`.

    Args:
        fn: the model's function, not adapted.
        params: its base parameters (arrays or `jax.ShapeDtypeStruct`s), the first argument.
        *args, **kwargs: the other arguments, arrays or shapes.

    Returns:
        `{path: Use(op, labels)}` for every weight that `fn` uses, in the order of first use. A weight that two operations
        need different labels for, or that meets an operation without a rule, has `labels=None` and the reason; `attach`
        refuses it with that reason, unless the entry is overridden by hand.

    Example:
        >>> import lora_jax as lj
        >>> apply = lambda params, x: jnp.einsum("btd,dnh->btnh", x, params["query"])
        >>> lj.trace_weights(apply, {"query": jnp.ones((8, 2, 4))}, jnp.ones((1, 3, 8)))
        {'query': Use(op='dot_general', labels='ioo', reason='')}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    uses: dict[str, Use] = {}

    def noting(path: str, leaf: Any) -> Callable[[str, dict[int, str]], None]:
        def note(op: str, labels: dict[int, str]) -> None:
            # An axis that is gone at the point of use was indexed or scanned away: one member of a stack was taken.
            spelled = "".join(labels.get(axis, STACK) for axis in range(len(leaf.shape)))
            before = uses.get(path)
            if before is None:
                uses[path] = Use(op, spelled)
            elif before.labels is not None and not _same_partition(before.labels, spelled):
                reason = f"{before.op} needs the labels {before.labels!r}, {op} needs {spelled!r}: choose by hand"
                uses[path] = Use(before.op, None, reason)

        return note

    def report(encounter: Encounter) -> None:
        if not encounter.factored:
            reason = f"{encounter.op} at {encounter.source}: {encounter.reason}"
            uses[encounter.path] = Use(encounter.op, None, reason)

    def probed(path: str, leaf: Any) -> Any:
        axes = tuple(frozenset({axis}) for axis in range(len(leaf.shape)))
        return _Probe(leaf, noting(path, leaf), axes=axes)

    chosen = [probed(path, leaf) if is_weight(path, leaf) else leaf for path, leaf in zip(paths, leaves, strict=True)]
    _walk_abstractly(fn, report, (jax.tree.unflatten(treedef, chosen), *args), kwargs)
    return uses


def explain(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Which adapted weight `adapt(fn)` keeps factored, in which operation, and which it merges, where and why.

    An abstract run: nothing is computed.

    Args:
        fn: the model's function, not adapted.
        params: a tree from `attach`, the first argument.
        *args, **kwargs: the other arguments, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        A tuple of `Encounter(path, op, factored, source, reason)` that prints as a table; `materialized` lists the merged.

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
    fn: Callable[..., Any], report: Callable[[Encounter], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(arrays: list[Any]) -> list[Any]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        output = walk_function(fn, new_walker(report), args, kwargs)
        return [leaf for leaf in jax.tree.leaves(output) if is_array(leaf)]

    jax.eval_shape(run, [leaves[place] for place in places])


def _same_partition(first: str, second: str) -> bool:
    """Whether two labellings split the axes alike; which side is called `in` does not matter."""
    return second in (first, first.translate(str.maketrans(IN + OUT, OUT + IN)))
