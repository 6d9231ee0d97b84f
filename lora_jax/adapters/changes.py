"""Comparing two trees of one model: which leaves training has changed."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..paths import leaves_by_path
from ..text import listed
from ..types import Leaf, Params
from ..weights import is_adapted, wider


def changed_leaves(params: Params, base_params: Params, *, argument: str = "params") -> list[str]:
    """The paths at which two trees of plain arrays differ, in tree order; values are compared, not dtypes.

    Args:
        params: The changed tree.
        base_params: The base, in the same structure.
        argument: What the caller calls `params`, for messages.

    Raises:
        ValueError: A tree has factors; the trees differ in structure or shapes; what isn't an array differs.

    Example:
        >>> changed_leaves({"w": jnp.ones(2), "b": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.zeros(2)})
        ['b']
    """
    leaves, before = leaves_by_path(params), leaves_by_path(base_params)
    _refuse_adapted(argument, leaves)
    _refuse_adapted("base_params", before)
    if leaves.keys() != before.keys():
        differing = sorted(leaves.keys() ^ before.keys())
        raise ArgumentError(f"`{argument}` and `base_params` are no trees of one model, at {listed(differing, 5)}.")
    return [path for path in leaves if _differ(path, leaves[path], before[path])]


def _refuse_adapted(argument: str, leaves: Mapping[str, Leaf]) -> None:
    adapted = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if adapted:
        raise ArgumentError(
            f"`{argument}` has factors, at {', '.join(adapted[:5])}, and plain arrays are compared: fold them in with "
            "`lj.merge_params` first, or take them off with `lj.detach`"
        )


def _differ(path: str, new: Leaf, old: Leaf) -> bool:
    if new is old:
        return False
    if not hasattr(new, "shape") or not hasattr(old, "shape"):
        if new == old:
            return False
        raise ArgumentError(f"`{path}` has changed, and is no array")
    if tuple(new.shape) != tuple(old.shape):
        raise ArgumentError(f"`{path}` has the shape {tuple(new.shape)}, and the base's has {tuple(old.shape)}")
    new, old = np.asarray(new), np.asarray(old)
    if new.dtype != old.dtype and all(jnp.issubdtype(array.dtype, jnp.floating) for array in (new, old)):
        wide = wider(wider(new.dtype, old.dtype), jnp.float32)
        new, old = new.astype(wide), old.astype(wide)
    return not np.array_equal(new, old)
