"""What is trained: labels, masks, the split of a parameter tree and its inverse."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError
from .methods import Method
from .methods.base import FROZEN, HEAD
from .paths import flatten_with_paths, leaf_paths, listed, require_arrays
from .state import StateWarning, marked_leaves, unknown_collections
from .types import HasShape, Labels, Leaf, LeafPath, Mask, Params, TreeDef, has_shape
from .weights import is_adapted, is_traced


class Partition(NamedTuple):
    """A parameter tree in two: where one side has a leaf, the other has `None`."""

    trainable: Params
    frozen: Params


class LabelCount(NamedTuple):
    """Size of the leaves of one label: numbers and bytes."""

    params: int
    bytes: int


class ParamCount(NamedTuple):
    """Parameter counts of a labelled tree; `bytes` and `percent` are those of the trainable part."""

    trainable: int
    total: int
    percent: float
    bytes: int
    per_label: dict[str, LabelCount]

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)"


def label_params(params: Params, method: Method) -> Labels:
    """A tree of labels with the structure of `params`: what each leaf is to the method.

    Args:
        params: A parameter tree; for `LoRA`, one returned by `attach`.
        method: The method, which says what is trained.

    Returns:
        `params` with a string in place of every array: `"frozen"`, `"head"`, or a label of the method (`"lora_a"`,
        `"lora_b"`, `"bias"`, `"full"`). An adapted weight keeps its node: `LoRAWeight(base="frozen", a="lora_a", …)`.
        State (batch statistics, caches, random streams: see `state`) is `"frozen"`, whatever the method.

    Raises:
        ValueError: The method trains nothing, or expects factors that the tree does not have.
        SelectionError: A selector of the method matches nothing, or state alone.
        TypeError: A leaf is an array of another library.

    Example:
        >>> import lora_jax as lj
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(2)}
        >>> lj.label_params(params, lj.BitFit(also_train=("head",)))
        {'dense': {'bias': 'bias', 'kernel': 'frozen'}, 'head': 'head'}
    """
    leaves = marked_leaves(params)
    labels = {path: leaf.label(False) if is_adapted(leaf) else FROZEN for path, leaf in leaves.items()}
    labels |= method.own_labels(leaves)
    labels |= dict.fromkeys(method.head(leaves), HEAD)
    if all(label == FROZEN for label in jax.tree.leaves(labels)):
        raise ArgumentError(
            f"{method} trains nothing: name leaves in `also_train`, or choose a method that trains some"
        )
    if getattr(method, "targets", None) == "all":
        _warn_of_unknown_collections(unknown_collections(params), labels)
    _, _, treedef = flatten_with_paths(params)
    return jax.tree.unflatten(treedef, list(labels.values()))


def _warn_of_unknown_collections(collections: Mapping[str, str], labels: Mapping[LeafPath, Leaf]) -> None:
    """What nobody has named is trained by `targets="all"`: a head beside `params`, or state under a name of its own."""
    unnamed = {
        path: name
        for path, name in collections.items()
        if labels[path] != HEAD and set(jax.tree.leaves(labels[path])) != {FROZEN}
    }
    if unnamed:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(unnamed.values()))
        warnings.warn(
            f'`targets="all"` trains {listed(list(unnamed), most=4)}: {names} stands beside `params`, where Flax Linen '
            "keeps state. If it is state, pass what is below `params` alone; if it is to be trained, name it in "
            "`also_train`",
            StateWarning,
            stacklevel=3,
        )


def trainable_mask(params: Params, method: Method) -> Mask:
    """A tree of booleans with the structure of `params`: `True` where `label_params` says anything but `"frozen"`.

    Example:
        >>> import lora_jax as lj
        >>> lj.trainable_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, lj.BitFit())
        {'bias': True, 'kernel': False}
    """
    return jax.tree.map(lambda label: label != FROZEN, label_params(params, method))


def partition(params: Params, mask: Mask) -> Partition:
    """Splits `params` by `mask`; `combine` is the inverse.

    Frozen leaves stay the same objects. Trainable leaves outside of adapted weights are copied, since a training step
    that donates them would otherwise delete the arrays of the base tree that they came from.

    Leaves that are no arrays (an Equinox model's functions) are frozen. `jax.jit` takes none as an argument: close over
    the frozen side, or compile with `equinox.filter_jit`.

    Args:
        params: Any tree.
        mask: Booleans, in the structure of `params`.

    Returns:
        `Partition(trainable, frozen)`, both with the structure of `params` and `None` for each absent leaf.

    Raises:
        ValueError: The structures differ.

    Example:
        >>> partition({"w": 1.0, "b": 2.0}, {"w": False, "b": True})
        Partition(trainable={'b': 2.0, 'w': None}, frozen={'b': None, 'w': 1.0})
    """
    paths, leaves, treedef = flatten_with_paths(params)
    require_arrays(paths, leaves)
    mask_leaves = _matching_leaves("mask", mask, paths, leaves, treedef)
    trainable, frozen = [], []
    for leaf, keep in zip(leaves, mask_leaves, strict=True):
        if is_adapted(leaf):
            trainable.append(jax.tree.map(lambda array, chosen: array if chosen else None, leaf, keep))
            frozen.append(jax.tree.map(lambda array, chosen: None if chosen else array, leaf, keep))
        else:
            trainable.append(copied(leaf) if keep else None)
            frozen.append(None if keep else leaf)
    return Partition(jax.tree.unflatten(treedef, trainable), jax.tree.unflatten(treedef, frozen))


def combine(trainable: Params, frozen: Params) -> Params:
    """Puts the two sides of a `Partition` together again.

    Raises:
        ValueError: The structures differ, or both sides have the same leaf.

    Example:
        >>> combine({"w": None, "b": 2.0}, {"w": 1.0, "b": None})
        {'b': 2.0, 'w': 1.0}
    """

    def pick(path: tuple[object, ...], ours: Leaf, theirs: Leaf) -> Leaf:
        if ours is not None and theirs is not None:
            raise ArgumentError(
                f"both sides have the leaf at `{jax.tree_util.keystr(path, simple=True, separator='/')}`"
            )
        return theirs if ours is None else ours

    try:
        return jax.tree_util.tree_map_with_path(pick, trainable, frozen, is_leaf=lambda node: node is None)
    except ValueError as error:
        if "both sides" in str(error):
            raise
        raise ArgumentError(
            f"`trainable` and `frozen` do not come from one `partition`: their structures differ. JAX says: {error}"
        ) from None


def count_params(params: Params, labels: Labels) -> ParamCount:
    """Counts what a labelled tree trains.

    Args:
        params: Arrays, or anything with `size` and `dtype` (`jax.ShapeDtypeStruct`).
        labels: Strings in the structure of `params`, from `label_params`.

    Returns:
        A `ParamCount`; `total` includes the factors of adapted weights, and no projection that a seed determines.

    Raises:
        ValueError: The structures differ.

    Example:
        >>> params = {"w": jnp.ones((9, 11)), "b": jnp.ones(1)}
        >>> count = count_params(params, {"w": "frozen", "b": "bias"})
        >>> print(count, count.bytes)
        1 of 100 parameters are trained (1 %) 4
    """
    paths, leaves, treedef = flatten_with_paths(params)
    sizes: dict[str, LabelCount] = {}
    for leaf, label in zip(leaves, _matching_leaves("labels", labels, paths, leaves, treedef), strict=True):
        for array, name in _parameters(leaf, label):
            if not has_shape(array):
                continue  # an Equinox model's activation function, a Python number: no parameter
            before = sizes.get(name, LabelCount(0, 0))
            size = _size(array)
            sizes[name] = LabelCount(before.params + size, before.bytes + size * array.dtype.itemsize)
    total = sum(count.params for count in sizes.values())
    trained = [count for name, count in sizes.items() if name != FROZEN]
    trainable = sum(count.params for count in trained)
    percent = 100 * trainable / total if total else 0.0
    return ParamCount(trainable, total, percent, sum(count.bytes for count in trained), dict(sorted(sizes.items())))


def _parameters(leaf: Leaf, label: Leaf) -> list[tuple[Leaf, str]]:
    """Arrays with their labels; of an adapted weight without what its settings determine: no file holds that."""
    if not is_adapted(leaf):
        return [(leaf, label)]
    pairs = [(getattr(leaf, name), getattr(label, name)) for name in ("base", *leaf.saved)]
    return [(array, name) for array, name in pairs if array is not None]


def _size(array: HasShape) -> int:
    return int(np.prod(array.shape, dtype=np.int64))


def copied(leaf: Leaf) -> Leaf:
    """A copy with its own buffer, in the same place; inside a trace there is no buffer to protect."""
    if is_traced(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jnp.copy(leaf)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _matching_leaves(
    argument: str, tree: Params, paths: list[LeafPath], leaves: list[Leaf], treedef: TreeDef
) -> list[Leaf]:
    others, other = jax.tree.flatten(tree, is_leaf=is_adapted)
    pairs = zip(leaves, others, strict=False)
    nodes = [path for path, (ours, twin) in zip(paths, pairs, strict=False) if is_adapted(ours) != is_adapted(twin)]
    if other != treedef or nodes:
        theirs = set(leaf_paths(tree))
        differing = [path for path in paths if path not in theirs] + sorted(theirs - set(paths)) or nodes
        where = f"; they differ at {', '.join(differing[:8])}" if differing else ""
        raise ArgumentError(f"`{argument}` does not have the structure of `params`{where}")
    return others
