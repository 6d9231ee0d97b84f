"""The types of public signatures: trees, their leaves, and what is said of a leaf.

A static checker takes a `PyTree` for anything; the tests check annotations at run time, with jaxtyping and beartype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike as ArrayLike
from jax.typing import DTypeLike as DTypeLike
from jaxtyping import PyTree as PyTree

# A leaf's place in its tree, `encoder/layers/0/attention/query/kernel`.
LeafPath: TypeAlias = str
# A concrete or traced array, or NumPy's.
Array: TypeAlias = jax.Array | np.ndarray | np.generic
# What a tree may hold beside containers: an array, an adapted weight, or an object of the model's own.
Leaf: TypeAlias = Any
# Parameters, adapted or not: arrays, tracers, `jax.ShapeDtypeStruct`s, `None`, and what else a model's tree holds.
Params: TypeAlias = PyTree
# Labels and booleans in the structure of the parameters; an adapted weight keeps its node around its own.
Labels: TypeAlias = PyTree[str]
Mask: TypeAlias = PyTree[bool | np.bool_]


@runtime_checkable
class TreeDef(Protocol):
    """The structure of a tree, which `jax.tree.flatten` returns and `jax.tree.unflatten` takes."""

    @property
    def num_leaves(self) -> int: ...


@runtime_checkable
class HasShape(Protocol):
    """An array, or what stands for one: a tracer, a `jax.ShapeDtypeStruct`, an adapted weight."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


def has_shape(leaf: object) -> TypeGuard[HasShape]:
    """Whether a leaf has a shape and a dtype. An Equinox model's functions and Python's numbers have none."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class Use(NamedTuple):
    """How a function uses one weight.

    Attributes:
        op: The primitive in which it is used.
        labels: One letter per axis, `i` in, `o` out, `s` stack; `None` where no factors can stand beside the weight.
        reason: Why `labels` is `None`, or where the function needs the merged weight beside its factored uses.
    """

    op: str
    labels: str | None
    reason: str = ""


Uses: TypeAlias = Mapping[LeafPath, Use]
