"""The adapted weight: a pytree node that stands where a weight array stood.

A method that changes a weight defines one subclass. It says how its arrays relate to the axes of the base (`fields`),
what the weight is worth as one array (`merge`), and how it acts in a matmul, a lookup or a convolution; moving and
cutting axes comes with this base class, for every method alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from .errors import ArgumentTypeError
from .matmul import Strategy

IN, OUT, STACK = "i", "o", "s"


class Unfactorable(Exception):
    """An operation that an adapted weight cannot take part in without being merged; the message says why."""


class DotSpec(NamedTuple):
    """How a weight meets another operand in a `dot_general`: axis numbers of each, in corresponding order."""

    weight_contract: tuple[int, ...]
    weight_batch: tuple[int, ...]
    other_contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    weight_is_lhs: bool
    precision: Any
    strategy: Strategy | None = None


class TakeSpec(NamedTuple):
    """A lookup of whole slices along one axis of a weight: `jnp.take(weight, indices, axis)`."""

    axis: int
    offset_dims: tuple[int, ...]
    mode: Any


class ConvSpec(NamedTuple):
    """A convolution with the weight as its kernel; `params` are those of `lax.conv_general_dilated`."""

    kernel_out: int
    output_feature: int
    params: dict[str, Any]


class RaggedDotSpec(NamedTuple):
    """`lax.ragged_dot(tokens, weight, sizes)`: the weight's axis that is contracted, and the one of the groups."""

    weight_contract: int
    weight_group: int
    precision: Any


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """Base of the nodes that stand for a weight: `base`, arrays of the method's own, and one label per base axis.

    The labels in `axes` are `"i"` (in: contracted in the forward pass), `"o"` (out) and `"s"` (stack: layers of a
    scan, experts). Subclasses are frozen dataclasses made by `register`; they list in `fields` for every array of
    their own which axes it has, in order: `"s"`, `"i"`, `"o"` stand for all base axes of that label in the base's
    order, any other character for an axis that the base does not have (`"r"`, the rank).

    Fields may hold anything a pytree may hold (labels, booleans, `None`, shapes), as pytree functions require.
    """

    fields: ClassVar[dict[str, str]] = {}
    # Those of `fields` that a task saves, and those among them that a node may do without.
    saved: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    # Whether functions are given the merged array, because there is no way to compute with the parts.
    merged_on_entry: ClassVar[bool] = False
    # Whether it stands where the base has a leaf; or in a place of its own, without a `base`.
    has_base: ClassVar[bool] = True
    # Every registered node class by the name under which an adapter file knows it.
    registry: ClassVar[dict[str, type[AdaptedWeight]]] = {}

    base: Any
    axes: Any = dataclasses.field(kw_only=True)

    # What the weight is.

    def merge(self) -> jax.Array:
        """The one array that this node stands for, in the base's shape and dtype."""
        raise NotImplementedError

    @classmethod
    def merge_all(cls, nodes: Sequence[Self]) -> list[jax.Array]:
        """What a tree's nodes of this class stand for, in tree order; for nodes that share something."""
        return [node.merge() for node in nodes]

    def label(self, method_labels: bool) -> Self:
        """This node with a label in place of every array; `"frozen"` throughout unless `method_labels`."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def size(self) -> int:
        return self.base.size

    def places(self, label: str) -> list[int]:
        """The base's axes of one label."""
        return [axis for axis, own in enumerate(self.axes) if own == label]

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """What is wrong with arrays of these shapes as this node's own, `None` if nothing is."""
        private: dict[str, int] = {}
        for name, shape in shapes.items():
            dims = self._dims(name)
            letters = [role for role in self.fields[name] if role not in (STACK, IN, OUT)]
            owners = iter(letters)
            expected = tuple(
                private.get(next(owners), shape[place] if place < len(shape) else 0)
                if axis is None
                else self.shape[axis]
                for place, axis in enumerate(dims)
            )
            if shape != expected:
                beside = f"a base of {self.shape} labelled {self.axes!r}"
                return f"`{name}` has the shape {shape}, expected {expected} beside {beside}"
            private.update({letter: shape[dims.index(None)] for letter in letters})
        return None

    def prepared(self) -> AdaptedWeight:
        """The node that works in this one's place: what depends on the arrays alone is computed once a call."""
        return self

    def regrown(self, shared: dict[Any, Any]) -> Self:
        """This node with those of its arrays that no file holds, because its settings determine them.

        `shared` has what the nodes before it made, by what determines it: equal arrays are in memory once.
        """
        del shared
        return self

    # How it acts. `run(base)` computes what the unchanged operation gives for the base, or for another array of its
    # shape; that of a matmul, ragged or not, takes the other operand too.

    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        raise Unfactorable(f"{type(self).__name__} has no rule for matmuls")

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        raise Unfactorable(f"{type(self).__name__} has no rule for lookups")

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        raise Unfactorable(f"{type(self).__name__} has no rule for convolutions")

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        raise Unfactorable(f"{type(self).__name__} has no rule for ragged matmuls")

    def times(self, factor: jax.Array) -> Self:
        """The node of `factor * weight`, `factor` a scalar."""
        raise Unfactorable(f"{type(self).__name__} has no rule for multiplication by a scalar")

    def with_key(self, key: jax.Array | None) -> Self:
        """This node with the random key of this step, or none; for methods that use randomness in training."""
        del key
        return self

    def for_use(self, number: Any) -> Self:
        """This node as its `number`-th use sees it; where a random key is at work, each use has its own."""
        return self

    # Moving and cutting axes.

    def transpose(self, permutation: Sequence[int]) -> Self:
        source = dict(enumerate(permutation))
        return self._moved(
            lax.transpose(self.base, tuple(permutation)), [self.axes[old] for old in permutation], source
        )

    def reshape(self, sizes: Sequence[int]) -> Self:
        """Splits and joins axes; only axes of one label can be joined."""
        labels: list[Any] = [STACK] * len(sizes)
        for old, new in _matching_runs(self.base.shape, sizes):
            roles = [self.axes[axis] for axis in old if self.base.shape[axis] != 1] or [self.axes[axis] for axis in old]
            # A new axis of size one has no source: it goes with the axis before it.
            label = self._join(roles, sizes) if roles else labels[new[0] - 1]
            for axis in new:
                labels[axis] = label
        base = lax.reshape(self.base, tuple(sizes))
        arrays = {}
        for name, array, _ in self._arrays():
            private = iter(array.shape[dim] for dim, axis in enumerate(self._dims(name)) if axis is None)
            target = _field_dims(self.fields[name], labels)
            arrays[name] = jnp.reshape(array, [next(private) if axis is None else sizes[axis] for axis in target])
        return self._with(base, labels, arrays)

    def broadcast_in_dim(self, shape: Sequence[int], dimensions: Sequence[int]) -> Self:
        """New axes are stack axes: every position holds the same weight."""
        labels = [STACK] * len(shape)
        for old, new in enumerate(dimensions):
            labels[new] = self.axes[old]
        place = {new: old for old, new in enumerate(dimensions)}
        base = lax.broadcast_in_dim(self.base, tuple(shape), tuple(dimensions))
        arrays = {}
        for name, array, dims in self._arrays():
            target = _field_dims(self.fields[name], labels)
            private = iter(dim for dim, axis in enumerate(dims) if axis is None)
            source = [
                next(private) if axis is None else dims.index(place[axis]) if axis in place else None for axis in target
            ]
            private_sizes = iter(array.shape[dim] for dim, axis in enumerate(dims) if axis is None)
            sizes = [next(private_sizes) if axis is None else shape[axis] for axis in target]
            kept = [dim for dim in source if dim is not None]
            array = jnp.transpose(array, kept)
            places = [index for index, dim in enumerate(source) if dim is not None]
            arrays[name] = lax.broadcast_in_dim(array, tuple(sizes), tuple(places))
        return self._with(base, labels, arrays)

    def cut(self, cutter: Callable[[jax.Array, list[int | None]], jax.Array]) -> Self:
        """Applies `cutter(array, base_axis_of_each_dim)` to the base and to every array; the axes stay in place."""
        base = cutter(self.base, list(range(self.ndim)))
        return self._with(base, self.axes, {name: cutter(array, dims) for name, array, dims in self._arrays()})

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Self]]:
        """The arrays that run along the leading stack axis, and what makes the node of one member from its slices."""
        if not self.axes or self.axes[0] != STACK:
            raise Unfactorable(f"its leading axis is no stack axis in the labels {self.axes!r}")
        names = [name for name, _, dims in self._arrays() if 0 in dims]

        def member(slices: Sequence[jax.Array]) -> Self:
            return self._with(slices[0], self.axes[1:], dict(zip(names, slices[1:], strict=True)))

        return [self.base, *(getattr(self, name) for name in names)], member

    def partition_specs(self, spec: Any) -> Self:
        """A node of partition specs: every array is split where the axes that it shares with the base are."""
        parts = [*spec, *[None] * (self.ndim - len(spec))]
        specs = {
            name: None
            if getattr(self, name) is None
            else type(spec)(*(None if axis is None else parts[axis] for axis in self._dims(name)))
            for name in self.fields
        }
        return dataclasses.replace(self, base=spec, **specs)

    def placements(self) -> dict[str, Sharding]:
        """Where the node's own arrays belong: on the device of the base, split where its shared axes are split.

        Empty where JAX places the base as it likes; it may then do so with these.
        """
        sharding = placement(self.base)
        if isinstance(sharding, NamedSharding):
            specs = dataclasses.replace(self, **dict.fromkeys(self.fields, ...)).partition_specs(sharding.spec)
            return {name: NamedSharding(sharding.mesh, getattr(specs, name)) for name in self.fields}
        return dict.fromkeys(self.fields, sharding) if isinstance(sharding, SingleDeviceSharding) else {}

    def each(self, function: Callable[[jax.Array], jax.Array]) -> Self:
        """Applies `function` to the base and to every array of the method's own."""
        return jax.tree.map(function, self)

    def with_base(self, base: Any) -> Self:
        return dataclasses.replace(self, base=base)

    # Plumbing.

    def _dims(self, name: str) -> list[int | None]:
        return _field_dims(self.fields[name], self.axes)

    def _arrays(self) -> list[tuple[str, jax.Array, list[int | None]]]:
        return [
            (name, getattr(self, name), self._dims(name)) for name in self.fields if getattr(self, name) is not None
        ]

    def _moved(self, base: jax.Array, labels: Sequence[Any], source: dict[int, int]) -> Self:
        arrays = {}
        for name, array, dims in self._arrays():
            private = iter(dim for dim, axis in enumerate(dims) if axis is None)
            target = _field_dims(self.fields[name], labels)
            order = [next(private) if axis is None else dims.index(source[axis]) for axis in target]
            arrays[name] = jnp.transpose(array, order)
        return self._with(base, labels, arrays)

    def _with(self, base: jax.Array, labels: Sequence[Any], arrays: dict[str, jax.Array]) -> Self:
        return dataclasses.replace(self, base=base, axes=self._axes(labels), **arrays)

    def _join(self, labels: Sequence[Any], sizes: Sequence[int]) -> Any:
        if len(set(labels)) > 1:
            raise Unfactorable(f"a reshape from {self.shape} to {tuple(sizes)} joins axes of different roles")
        return labels[0]

    def _axes(self, labels: Sequence[Any]) -> Any:
        return "".join(labels)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ArgumentTypeError(
            f"a {type(self).__name__} of shape {getattr(self.base, 'shape', None)} was used as an array: wrap the "
            "function that takes these parameters with `lj.adapt`, or fold the factors in with `lj.merge_params`"
        )

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = (
        __abs__
    ) = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @property
    def T(self) -> Any:
        return self._refuse()

    def astype(self, dtype: Any) -> Any:
        return self._refuse()


Node = TypeVar("Node", bound=AdaptedWeight)
Key = TypeVar("Key", bound=Hashable)


def register(cls: type[Node]) -> type[Node]:
    """Makes a frozen dataclass an adapted weight: `base` and its `fields` are pytree children, the rest is static."""
    children = ["base", *cls.fields]
    static = [field.name for field in dataclasses.fields(cls) if field.name not in children]
    AdaptedWeight.registry[cls.__name__] = cls
    return jax.tree_util.register_dataclass(cls, data_fields=children, meta_fields=static)


def is_adapted(node: Any) -> bool:
    """Whether `node` is an adapted weight; pass it as `is_leaf` to treat such nodes as leaves."""
    return isinstance(node, AdaptedWeight)


def merge_on_entry(leaves: Sequence[Any]) -> list[Any]:
    """A tree's leaves, those that are `merged_on_entry` merged."""
    places: dict[type[AdaptedWeight], list[int]] = {}
    for place, leaf in enumerate(leaves):
        if is_adapted(leaf) and leaf.merged_on_entry:
            places.setdefault(type(leaf), []).append(place)
    merged = list(leaves)
    for cls, own in places.items():
        for place, array in zip(own, cls.merge_all([leaves[place] for place in own]), strict=True):
            merged[place] = array
    return merged


def placement(leaf: Any) -> Sharding | None:
    """The sharding that an array was given on purpose; `None` where JAX chose one, and may move it.

    To give an array a sharding, be it the one it has, makes it another argument to a compiled function.
    """
    given = isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.committed
    return leaf.sharding if given else None


def wider(first: Any, second: Any) -> Any:
    """The dtype to compute in with arrays of both; strict promotion forbids what is implicit, and this is not.

    Floats of 8 bits are for storing: the other dtype decides, and float32 where both are such.

    Example:
        >>> wider("bfloat16", "float32").name, wider("float8_e4m3fn", "bfloat16").name
        ('float32', 'bfloat16')
    """
    kinds = [kind for kind in (first, second) if not _is_for_storing(kind)] or [jnp.float32]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(kinds[0], kinds[-1])


def _is_for_storing(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def summed(first: jax.Array, second: jax.Array) -> jax.Array:
    """The sum in the first one's dtype, which JAX computes for floats of 16 bits and more."""
    wide = wider(first.dtype, first.dtype)
    return (first.astype(wide) + second.astype(wide)).astype(first.dtype)


def is_traced(tree: Any) -> bool:
    """Whether any array of `tree` is abstract at the moment: its values cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def not_finite(arrays: Mapping[Key, jax.Array]) -> list[Key]:
    """Which of some arrays hold NaN or infinity, as far as values are concrete; all at once, since each look alone
    would wait for the device."""
    with jax.ensure_compile_time_eval():  # values are concrete, be it in the midst of a trace
        finite = {key: _all_finite(array) for key, array in arrays.items() if not is_traced(array)}
    return [key for key, good in jax.device_get(finite).items() if not good]


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _field_dims(spec: str, labels: Sequence[Any]) -> list[int | None]:
    """For every axis of a field its base axis, or `None` for one of its own."""
    dims: list[int | None] = []
    for role in spec:
        if role in (STACK, IN, OUT):
            dims += [axis for axis, label in enumerate(labels) if label == role]
        else:
            dims.append(None)
    return dims


def _matching_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts a reshape into the smallest runs of old and new axes that hold the same number of elements."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_i = size_j = 1
        if i < len(old):
            size_i, i = old[i], i + 1
        if j < len(new) and (size_i != 1 or i == start_i or new[j] == 1):
            size_j, j = new[j], j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        runs.append((list(range(start_i, i)), list(range(start_j, j))))
    assert math.prod(old) == math.prod(new)
    return runs
