"""Adapted weights: pytree nodes that stand where a weight array stood, or where a model had no array at all.

A method that changes a weight defines one subclass. It says how its arrays relate to the axes of the base (`fields`)
and which single array it stands for (`merge`). There are three kinds:

- `FactoredWeight` computes with its parts: it says how it acts in a matmul, a lookup or a convolution. Moving and
  cutting axes comes with the class, for every method alike.
- `MergedOnEntry` has no way to compute with its parts: functions get the merged array.
- `InsertedNode` stands where the base has nothing: functions get an array there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .class_registry import Registry
from .errors import ArgumentTypeError
from .matmul import Strategy
from .types import DTypeLike, PyTree

IN, OUT, STACK = "i", "o", "s"
# Default of an array that a node needs at work, but may lack until `regrown` or `dataclasses.replace` sets it.
ABSENT: Any = None


class Unfactorable(Exception):
    """An operation in which an adapted weight can't take part without being merged; the message says why."""


class DotSpec(NamedTuple):
    """How a weight meets another operand in a `dot_general`: axis numbers of each, in corresponding order."""

    weight_contract: tuple[int, ...]
    weight_batch: tuple[int, ...]
    other_contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    weight_is_lhs: bool
    precision: lax.PrecisionLike
    strategy: Strategy | None = None


class TakeSpec(NamedTuple):
    """A lookup of whole slices along one axis of a weight: `jnp.take(weight, indices, axis)`."""

    axis: int
    offset_dims: tuple[int, ...]
    mode: lax.GatherScatterMode


class ConvSpec(NamedTuple):
    """A convolution with the weight as its kernel; `params` are those of `lax.conv_general_dilated`."""

    kernel_out: int
    output_feature: int
    params: dict[str, Any]


class RaggedDotSpec(NamedTuple):
    """`lax.ragged_dot(tokens, weight, sizes)`: the weight's contracted axis, and its axis of groups."""

    weight_contract: int
    weight_group: int
    precision: lax.PrecisionLike


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """Base of all nodes: `base`, arrays of the method's own, and one label per axis of the array it stands for.

    The labels in `axes` are `"i"` (in: contracted in the forward pass), `"o"` (out) and `"s"` (stack: layers of a
    scan, experts). Subclasses are frozen dataclasses made by `register`; they list in `fields` for every array of
    their own which axes it has, in order: `"s"`, `"i"`, `"o"` stand for all axes of that label, in the base's order;
    any other character stands for an axis that the base does not have (`"r"`, the rank).

    The types of the fields are those of a node at work. As pytree functions require, a field accepts anything that a
    pytree may hold: labels, booleans, `None`, shapes.
    """

    # Name of the class in adapter files. A subclass has none unless it says so itself; it can't be saved then.
    saved_as: ClassVar[str] = ""
    fields: ClassVar[dict[str, str]] = {}
    # Those of `fields` that a task saves, and those of them that a node may lack.
    saved: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    # Every class with a name by that name.
    registry: ClassVar[Registry[type[AdaptedWeight]]] = Registry("saved_as", r"[A-Za-z][A-Za-z0-9_]*")

    base: Any  # an array; `None` in an `InsertedNode`
    axes: Any = dataclasses.field(kw_only=True)  # a string; a tracing node has sets in place of letters

    def __init_subclass__(cls) -> None:
        cls.saved_as = vars(cls).get("saved_as", "")

    @classmethod
    def bare(cls, base: object, **settings: object) -> Self:
        """A node that has a base and settings, and no arrays of its own yet."""
        return cls(base, **dict.fromkeys(cls.fields), **settings)

    def merge(self) -> jax.Array:
        """The one array that this node stands for, in its shape and dtype."""
        raise NotImplementedError

    def label(self, method_labels: bool) -> Self:
        """This node with a label in place of every array; `"frozen"` throughout unless `method_labels`."""
        raise NotImplementedError

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Self]]:
        """The arrays that run along the leading stack axis, and a function that makes one member from its slices."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def places(self, label: str) -> list[int]:
        """The axes of one label."""
        return [axis for axis, own in enumerate(self.axes) if own == label]

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why this node can't have arrays of these shapes; `None` if it can."""
        private: dict[str, int] = {}
        for name, shape in shapes.items():
            dims = self._dims(name)
            letters = [role for role in self.fields[name] if role not in (STACK, IN, OUT)]
            owners = iter(letters)
            expected = tuple(
                private.get(next(owners), shape[dim] if dim < len(shape) else 0) if axis is None else self.shape[axis]
                for dim, axis in enumerate(dims)
            )
            if shape != expected:
                beside = f"a base of {self.shape} labelled {self.axes!r}"
                return f"`{name}` has the shape {shape}, expected {expected} beside {beside}"
            private.update({letter: shape[dims.index(None)] for letter in letters})
        return None

    def regrown(self, shared: dict[Hashable, jax.Array]) -> Self:
        """This node with those of its arrays that its settings determine and no file holds.

        `shared` keeps what earlier nodes made, by what determines it, so that equal arrays are in memory once.
        """
        del shared
        return self

    def with_key(self, key: jax.Array | None) -> Self:
        """This node with the random key of this step, or none; for methods that use randomness in training."""
        del key
        return self

    def with_base(self, base: object) -> Self:
        return dataclasses.replace(self, base=base)

    def widened(self, dtype: DTypeLike) -> Self:
        """This node on a base in which a sum for a result of `dtype` can be taken without rounding twice."""
        return self.with_base(self.base.astype(wider(self.dtype, dtype)))

    def partition_specs(self, spec: PartitionSpec) -> Self:
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

    def _dims(self, name: str) -> list[int | None]:
        return _field_dims(self.fields[name], self.axes)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
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
    def T(self) -> NoReturn:
        self._refuse()

    def astype(self, dtype: DTypeLike) -> NoReturn:
        self._refuse(dtype)


@dataclasses.dataclass(frozen=True)
class FactoredWeight(AdaptedWeight):
    """An adapted weight that computes with its parts, as far as it knows how; otherwise `adapt` merges it."""

    def prepared(self) -> FactoredWeight:
        """The node that works in this one's place; what depends on the arrays alone is computed once a call."""
        return self

    def for_use(self, number: int | jax.Array) -> Self:
        """This node as its `number`-th use sees it; where a random key is at work, each use has its own."""
        del number
        return self

    # Operations. `run(base)` computes what the unchanged operation gives for the base, or for another array of its
    # shape. For a matmul, ragged or not, `run` takes the other operand too.

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

    # Moving and cutting axes.

    def transpose(self, permutation: Sequence[int]) -> Self:
        labels, source = [self.axes[old] for old in permutation], dict(enumerate(permutation))
        arrays = {}
        for name, array, dims in self._arrays():
            private = iter(dim for dim, axis in enumerate(dims) if axis is None)
            target = _field_dims(self.fields[name], labels)
            order = [next(private) if axis is None else dims.index(source[axis]) for axis in target]
            arrays[name] = jnp.transpose(array, order)
        return self._with(lax.transpose(self.base, tuple(permutation)), labels, arrays)

    def reshape(self, sizes: Sequence[int]) -> Self:
        """Splits and joins axes; only axes of one label can be joined."""
        labels: list[Hashable] = [STACK] * len(sizes)
        for old, new in _matching_runs(self.base.shape, sizes):
            roles = [self.axes[axis] for axis in old if self.base.shape[axis] != 1] or [self.axes[axis] for axis in old]
            # A new axis of size one has no source: it goes with the axis before it.
            label = self._join(roles, sizes) if roles else labels[new[0] - 1]
            for axis in new:
                labels[axis] = label
        base = lax.reshape(self.base, tuple(sizes))
        arrays = {}
        for name, array, dims in self._arrays():
            private = iter(array.shape[dim] for dim, axis in enumerate(dims) if axis is None)
            target = _field_dims(self.fields[name], labels)
            arrays[name] = jnp.reshape(array, [next(private) if axis is None else sizes[axis] for axis in target])
        return self._with(base, labels, arrays)

    def broadcast_in_dim(self, shape: Sequence[int], dimensions: Sequence[int]) -> Self:
        """New axes are stack axes: every position holds the same weight."""
        labels: list[Hashable] = [STACK] * len(shape)
        for old, new in enumerate(dimensions):
            labels[new] = self.axes[old]
        source_axis = {new: old for old, new in enumerate(dimensions)}
        base = lax.broadcast_in_dim(self.base, tuple(shape), tuple(dimensions))
        arrays = {}
        for name, array, dims in self._arrays():
            target = _field_dims(self.fields[name], labels)
            private = iter(dim for dim, axis in enumerate(dims) if axis is None)
            source = [
                next(private) if axis is None else dims.index(source_axis[axis]) if axis in source_axis else None
                for axis in target
            ]
            private_sizes = iter(array.shape[dim] for dim, axis in enumerate(dims) if axis is None)
            new_shape = [next(private_sizes) if axis is None else shape[axis] for axis in target]
            array = jnp.transpose(array, [dim for dim in source if dim is not None])
            filled = [index for index, dim in enumerate(source) if dim is not None]
            arrays[name] = lax.broadcast_in_dim(array, tuple(new_shape), tuple(filled))
        return self._with(base, labels, arrays)

    def cut(self, cutter: Callable[[jax.Array, list[int | None]], jax.Array]) -> Self:
        """Applies `cutter(array, base_axis_of_each_dim)` to the base and to every array; the axes stay in place."""
        base = cutter(self.base, list(range(self.ndim)))
        return self._with(base, self.axes, {name: cutter(array, dims) for name, array, dims in self._arrays()})

    def stacked(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Self]]:
        if not self.axes or self.axes[0] != STACK:
            raise Unfactorable(f"its leading axis is no stack axis in the labels {self.axes!r}")
        names = [name for name, _, dims in self._arrays() if 0 in dims]

        def member(slices: Sequence[jax.Array]) -> Self:
            return self._with(slices[0], self.axes[1:], dict(zip(names, slices[1:], strict=True)))

        return [self.base, *(getattr(self, name) for name in names)], member

    def each(self, function: Callable[[jax.Array], jax.Array]) -> Self:
        """Applies `function` to the base and to every array of the method's own."""
        return jax.tree.map(function, self)

    def _arrays(self) -> Iterator[tuple[str, jax.Array, list[int | None]]]:
        for name in self.fields:
            if (array := getattr(self, name)) is not None:
                yield name, array, self._dims(name)

    def _with(self, base: jax.Array, labels: Sequence[Hashable], arrays: dict[str, jax.Array]) -> Self:
        return dataclasses.replace(self, base=base, axes=self._axes(labels), **arrays)

    def _join(self, labels: Sequence[Hashable], sizes: Sequence[int]) -> Hashable:
        if len(set(labels)) > 1:
            raise Unfactorable(f"a reshape from {self.shape} to {tuple(sizes)} joins axes of different roles")
        return labels[0]

    def _axes(self, labels: Sequence[Hashable]) -> Sequence[Hashable]:
        return "".join(map(str, labels))


@dataclasses.dataclass(frozen=True)
class MergedOnEntry(AdaptedWeight):
    """An adapted weight that can't compute with its parts: `adapt` gives functions the merged array."""

    @classmethod
    def merge_all(cls, nodes: Sequence[MergedOnEntry]) -> list[jax.Array]:
        """The arrays that the nodes of this class in a tree stand for, in tree order; they may share something."""
        return [node.merge() for node in nodes]


@dataclasses.dataclass(frozen=True)
class InsertedNode(MergedOnEntry):
    """A node that stands where the base has nothing: `base` is `None`, and `axes` are those of the array that
    functions get."""

    def label(self, method_labels: bool) -> Self:
        return labelled(self, {}, otherwise="inserted" if method_labels else "frozen")

    def with_base(self, base: object) -> Self:
        del base
        return self

    def widened(self, dtype: DTypeLike) -> Self:
        del dtype
        return self


Node = TypeVar("Node", bound=AdaptedWeight)
Rule = TypeVar("Rule", bound=Callable[..., jax.Array])
Key = TypeVar("Key", bound=Hashable)


def register(cls: type[Node]) -> type[Node]:
    """Makes a frozen dataclass an adapted weight: `base` and its `fields` are pytree children, the rest is static.

    A class with a `saved_as` can be saved and loaded under that name, and no other class can have it.
    """
    children = ["base", *cls.fields]
    static = [field.name for field in dataclasses.fields(cls) if field.name not in children]
    if cls.saved_as:
        AdaptedWeight.registry.add(cls.saved_as, cls)
    return jax.tree_util.register_dataclass(cls, data_fields=children, meta_fields=static)


def own_function(rule: Rule) -> Rule:
    """Makes a `dot_general` a function of its own in the program: traced, differentiated and lowered once for all
    weights of equal shapes."""
    return cast(Rule, jax.jit(rule, static_argnames=("spec", "run")))


def is_adapted(node: object) -> TypeGuard[AdaptedWeight]:
    """Whether `node` is an adapted weight; pass it as `is_leaf` to treat such nodes as leaves."""
    return isinstance(node, AdaptedWeight)


def labelled(node: Node, labels: Mapping[str, str], *, otherwise: str = "frozen") -> Node:
    """A node with a label in place of every array: those of `labels`, by field, and `otherwise` for the base and the
    rest. Fields that are `None` stay so."""
    own = {name: labels.get(name, otherwise) for name in node.fields if getattr(node, name) is not None}
    return dataclasses.replace(node if node.base is None else node.with_base(otherwise), **own)


def merge_on_entry(leaves: Sequence[PyTree]) -> list[PyTree]:
    """A tree's leaves, with every `MergedOnEntry` merged."""
    indices: dict[type[MergedOnEntry], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, MergedOnEntry):
            indices.setdefault(type(leaf), []).append(index)
    merged = list(leaves)
    for cls, own in indices.items():
        for index, array in zip(own, cls.merge_all([leaves[index] for index in own]), strict=True):
            merged[index] = array
    return merged


def placement(leaf: object) -> Sharding | None:
    """The sharding that an array was given on purpose; `None` where JAX chose one, and may move it.

    To give an array a sharding, even the one that it has, makes it another argument to a compiled function.
    """
    if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.committed:
        return leaf.sharding
    return None


def wider(first: DTypeLike, second: DTypeLike) -> np.dtype:
    """The dtype in which to compute with arrays of both; strict promotion forbids what is implicit, and this is not.

    Floats of 8 bits are for storing: the other dtype decides, and float32 where both are such.

    Example:
        >>> wider("bfloat16", "float32").name, wider("float8_e4m3fn", "bfloat16").name
        ('float32', 'bfloat16')
    """
    dtypes: list[DTypeLike] = [dtype for dtype in (first, second) if not _is_for_storing(dtype)] or [jnp.float32]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtypes[0], dtypes[-1])


def _is_for_storing(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def summed(first: jax.Array, second: jax.Array) -> jax.Array:
    """The sum in the first one's dtype, computed in a dtype of at least 16 bits."""
    wide = wider(first.dtype, first.dtype)
    return (first.astype(wide) + second.astype(wide)).astype(first.dtype)


def is_traced(tree: PyTree) -> bool:
    """Whether any array of `tree` is abstract at the moment, so that its values can't be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def not_finite(arrays: Mapping[Key, jax.Array]) -> list[Key]:
    """Keys of the arrays that hold NaN or infinity, as far as values are concrete.

    All arrays are looked at together, since each look alone would wait for the device.
    """
    with jax.ensure_compile_time_eval():  # values are concrete, even in the midst of a trace
        finite = {key: _all_finite(array) for key, array in arrays.items() if not is_traced(array)}
    return [key for key, good in jax.device_get(finite).items() if not good]


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _field_dims(spec: str, labels: Sequence[Hashable]) -> list[int | None]:
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
