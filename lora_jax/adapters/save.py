"""Saving an adapter: the leaves that training changed, their method, and a fingerprint of the base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from ..files import replacing, sha256_file, with_checksum, write_json, write_safetensors
from ..masks import label_params
from ..methods import Method
from ..methods.base import FROZEN
from ..paths import is_random_key, leaves_by_path
from ..state import StateLeaf, lasting_state, marked_leaves
from ..text import listed
from ..types import Leaf, Params, PyTree
from ..weights import InsertedNode, is_adapted
from .description import (
    APART,
    DESCRIPTION,
    FORMAT,
    STAGING,
    TENSORS,
    VERSION,
    AdapterError,
    finish_earlier_save,
    method_to_json,
    node_to_json,
)
from .fingerprint import fingerprint

Value = TypeVar("Value")


def save_adapter(
    folder: str | os.PathLike[str], params: Params, method: Method, *, state: PyTree | None = None
) -> Path:
    """Saves what the method trained and the state that came of it, and nothing of the base.

    Writes `lora_jax_adapter.json` (method, axes, shapes, the base's fingerprint, checksums of both files) and
    `adapter.safetensors` (the trained leaves, named by leaf path). Both are complete on disk before either takes its
    place: a full disk, or a kill at any moment, leaves the earlier adapter in the folder or the new one. Processes that
    save to one folder wait for each other, and a process that loads meanwhile gets one of theirs, whole.

    The fingerprint covers the frozen leaves: path, shape, and a sample of values at fixed places rounded to bfloat16.
    It catches mistakes; it is no security check. State is not part of it: a base whose batch statistics have moved is
    the same base.

    State that stands in `params` (Flax Linen's `batch_stats`, say) is saved with it, except for caches and random
    streams.

    Args:
        folder: Folder to write to; made if it does not exist.
        params: Trained tree from `attach`.
        method: Method that it was trained with.
        state: Tree of arrays and random keys that the function carries from call to call beside `params`; all of it is
            saved. `load_adapter(..., state=...)` returns it.

    Returns:
        The folder.

    Raises:
        AdapterError: A trained leaf holds NaN or infinity; `params` is only the trainable part.
        FileError: The files cannot be written, because the disk is full for example.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> import jax.numpy as jnp
        >>> method = lj.BitFit()
        >>> folder = lj.save_adapter(tempfile.mkdtemp(), {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, method)
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter.safetensors', 'lora_jax_adapter.json']
    """
    return save_with(folder, params, method, {}, state=state)


def save_with(
    folder: str | os.PathLike[str],
    params: Params,
    method: Method,
    others: Mapping[str, Mapping[str, object]],
    *,
    state: PyTree | None = None,
) -> Path:
    """`save_adapter`, with other JSON files `{name: content}` that belong to the adapter: all are replaced together."""
    folder = Path(folder)
    leaves = marked_leaves(params)
    labels = dict(zip(leaves, _leaves(label_params(params, method)), strict=True))
    partial = [
        path
        for path, leaf in leaves.items()
        if is_adapted(leaf) and leaf.base is None and not isinstance(leaf, InsertedNode)
    ]
    if partial:
        raise AdapterError(
            f"`params` lacks the base weights, at {listed(partial, 5)}: save `lj.combine(trainable, frozen)`, so that "
            "the base can be told from another."
        )
    apart = {APART + path: leaf for path, leaf in state_arrays(state).items()}
    kept = sorted([*lasting_state(params), *apart])
    tensors = {name: np.asarray(array) for name, array in (saved_arrays(params, method) | apart).items()}
    require_finite(tensors, "The adapter cannot be saved", kept)
    with replacing(folder, (*others, TENSORS, DESCRIPTION), read_elsewhere=False, what="an adapter") as staging:
        write_safetensors(staging / TENSORS, tensors)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "method": method_to_json(method.resolved(leaves)),
            "adapted": {path: node_to_json(leaf) for path, leaf in leaves.items() if is_adapted(leaf)},
            "tensors": {
                name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in tensors.items()
            },
            "sha256": sha256_file(staging / TENSORS),
            "base": fingerprint(_frozen_leaves(leaves, labels)),
        } | ({"state": kept} if kept else {})
        for name, content in {**others, DESCRIPTION: description}.items():
            write_json(staging / name, with_checksum(content))
        finish_earlier_save(folder)
        for left in folder.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def saved_arrays(params: Params, method: Method) -> dict[str, Leaf]:
    """The arrays that `save_adapter` writes, by their names in the file; `params` may be abstract.

    Frozen factors belong to the adapter as trained ones do: they are not part of the base. Nor is state.
    """
    leaves, found = leaves_by_path(params), lasting_state(params)
    for (path, leaf), label in zip(leaves.items(), _leaves(label_params(params, method)), strict=True):
        if is_adapted(leaf):
            arrays = {f"{path}/{name}": getattr(leaf, name) for name in leaf.saved}
            found |= {name: array for name, array in arrays.items() if array is not None}
        elif label != FROZEN:
            found[path] = leaf
    return found


def state_arrays(state: PyTree | None) -> dict[str, Leaf]:
    """The arrays in a tree of state by path; for random keys, their data."""
    leaves = leaves_by_path(state)
    if numbers := [path for path, leaf in leaves.items() if isinstance(leaf, int | float | complex)]:
        raise AdapterError(f"`state` has Python numbers, at {listed(numbers)}: make them arrays, `jnp.asarray(...)`.")
    return {
        path: jax.random.key_data(leaf) if is_random_key(leaf) else leaf
        for path, leaf in leaves.items()
        if hasattr(leaf, "shape")
    }


def require_finite(tensors: Mapping[str, np.ndarray], what: str, state: Collection[str]) -> None:
    """Refuses NaN and infinity; state may hold infinity, which a running minimum begins with."""
    broken = [
        name for name, array in tensors.items() if (np.isnan(array) if name in state else ~np.isfinite(array)).any()
    ]
    if broken:
        raise AdapterError(f"{what}: NaN or infinity in {listed(broken, 5)}. Go back to an earlier checkpoint.")


def _leaves(tree: PyTree[Value]) -> list[Value]:
    return jax.tree.leaves(tree, is_leaf=is_adapted)


def _frozen_leaves(leaves: Mapping[str, Leaf], labels: Mapping[str, object]) -> dict[str, Leaf]:
    return {
        path: leaf.base if is_adapted(leaf) else leaf
        for path, leaf in leaves.items()
        if (is_adapted(leaf) or (labels[path] == FROZEN and not isinstance(leaf, StateLeaf)))
        and not isinstance(leaf, InsertedNode)
    }
