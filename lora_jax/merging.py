"""Folding the factors back into plain arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from .errors import ArgumentError
from .paths import flatten_with_paths, require_arrays
from .types import DTypeLike, Leaf, LeafPath, Params
from .weights import (
    AdaptedWeight,
    InsertedNode,
    MergedOnEntry,
    is_adapted,
    is_traced,
    merge_on_entry,
    not_finite,
    placement,
)


def merge_params(params: Params, *, dtype: DTypeLike | None = None) -> Params:
    """The plain tree that an adapted one stands for: `W + scale · B A` at every adapted weight.

    The result has the base's structure, shapes and shardings, so a function compiled for the base runs on it as it is.
    (What a method has inserted, an adapter or a prefix, stays in its place as plain arrays.)
    The sum is taken in float32 (or wider, for a wider base) and cast once, one leaf at a time. Leaves that are not
    adapted are the same objects.

    Args:
        params: A tree from `attach`, trained or not; under `jit` as well.
        dtype: Dtype of the merged weights; `None` keeps the base's.

    Returns:
        A tree of plain arrays.

    Raises:
        ValueError: A factor holds NaN or infinity, or a merged number is too large for float16 or a float of 8 bits
            (both checked where values are concrete); the message names the leaf. `dtype` is no floating type, or a base
            is complex.

    Example:
        >>> import lora_jax as lj
        >>> node = lj.LoRAWeight(jnp.zeros((2, 3)), jnp.ones((1, 2)), jnp.ones((1, 3)), scale=0.5, axes="io")
        >>> lj.merge_params({"w": node})["w"].tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError(f"`dtype` must be a floating type, got {dtype!r}")
    paths, leaves, treedef = flatten_with_paths(params)
    require_arrays(paths, leaves)
    leaves = [leaf.with_key(None) if is_adapted(leaf) else leaf for leaf in leaves]
    _refuse_not_finite(dict(zip(paths, leaves, strict=True)))
    cut = [path for path, leaf in zip(paths, leaves, strict=True) if dtype is not None and _is_complex(leaf)]
    if cut:
        raise ArgumentError(f"cannot merge `{cut[0]}` into {jnp.dtype(dtype)}, for it is complex: leave `dtype` out")
    whole = merge_on_entry([_widened(leaf, dtype) if _is_whole(leaf) else leaf for leaf in leaves])
    merged = [
        _finished(array, leaf, dtype) if _is_whole(leaf) else _merged(leaf, dtype) if is_adapted(leaf) else leaf
        for array, leaf in zip(whole, leaves, strict=True)
    ]
    _refuse_overflow(dict(zip(paths, leaves, strict=True)), merged)
    return jax.tree.unflatten(treedef, merged)


def _is_complex(leaf: Leaf) -> bool:
    return is_adapted(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _is_whole(leaf: Leaf) -> bool:
    return isinstance(leaf, MergedOnEntry)


def _finished(array: jax.Array, node: AdaptedWeight, dtype: DTypeLike | None) -> jax.Array:
    place = placement(node.base)
    array = array.astype(node.dtype if dtype is None else dtype)
    return array if place is None else jax.device_put(array, place)


def _refuse_not_finite(leaves: dict[LeafPath, Leaf]) -> None:
    factors = {
        (path, name): getattr(node, name)
        for path, node in leaves.items()
        if is_adapted(node)
        for name in node.fields
        if getattr(node, name) is not None
    }
    for path, name in not_finite(factors):
        raise ArgumentError(
            f"cannot merge `{path}`: its factor `{name}` holds NaN or infinity; load an earlier checkpoint"
        )


def _refuse_overflow(leaves: dict[LeafPath, Leaf], merged: list[Leaf]) -> None:
    """A sum can be too large for a float of 16 bits or 8 whose parts are not: it would be infinity, or NaN."""
    narrow = {
        path: array
        for (path, node), array in zip(leaves.items(), merged, strict=True)
        if is_adapted(node) and float(jnp.finfo(array.dtype).max) < float(jnp.finfo(jnp.float32).max) / 2
    }
    for path in not_finite(narrow):
        dtype = narrow[path].dtype
        if isinstance(leaves[path], InsertedNode) or not not_finite({path: leaves[path].base}):
            raise ArgumentError(
                f"cannot merge `{path}` into {dtype}: a merged number is larger than its largest, "
                f"{float(jnp.finfo(dtype).max):g}; merge with `dtype=jnp.bfloat16` or `jnp.float32`"
            )


def _merged(node: AdaptedWeight, dtype: DTypeLike | None) -> jax.Array:
    dtype = node.dtype if dtype is None else jnp.dtype(dtype)
    if is_traced(node):
        return _fold(node, dtype)
    return _compiled_fold(placement(node.base))(node, dtype=dtype)


@functools.lru_cache
def _compiled_fold(sharding: Sharding | None) -> Callable[..., jax.Array]:
    """One function a placement: leaves of equal shapes share what is compiled for it."""
    return jax.jit(_fold, static_argnames="dtype", out_shardings=sharding)


def _fold(node: AdaptedWeight, dtype: DTypeLike | None) -> jax.Array:
    return _widened(node, dtype).merge().astype(dtype)


def _widened(node: AdaptedWeight, dtype: DTypeLike | None) -> AdaptedWeight:
    return node if dtype is None else node.widened(dtype)
