"""Loading an adapter onto its base: its files are checked, and so is the base."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Hashable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ..files import (
    CHECKSUM,
    read_safetensors,
    read_safetensors_header,
    read_together,
    sha256_file,
    with_checksum,
    without_checksum,
)
from ..methods import Frozen, Method
from ..paths import flatten_with_paths, is_random_key, leaves_by_path, nearest, with_leaves
from ..state import StateLeaf, lasting_state, marked_leaves, state_paths
from ..text import listed
from ..types import Leaf, Params, PyTree
from ..weights import AdaptedWeight, InsertedNode, is_adapted, placement
from .description import (
    APART,
    DESCRIPTION,
    TENSORS,
    AdapterError,
    Description,
    checked_description,
    finish_earlier_save,
    method_from_json,
    node_class,
    node_from_json,
)
from .fingerprint import CheckBase, check_fingerprint, fingerprint, require_check_base
from .save import require_finite, saved_arrays, state_arrays

_DEEPEST = 50  # levels of a tree


class Adapter(NamedTuple):
    """A loaded adapter: the adapted parameter tree and the method that labels it."""

    params: Params
    method: Method


class AdapterWithState(NamedTuple):
    """A loaded adapter with the state that was saved beside it."""

    params: Params
    method: Method
    state: PyTree


@overload
def load_adapter(
    folder: str | os.PathLike[str], base_params: Params, *, check_base: CheckBase = "error", state: None = None
) -> Adapter: ...


@overload
def load_adapter(
    folder: str | os.PathLike[str], base_params: Params, *, check_base: CheckBase = "error", state: PyTree
) -> AdapterWithState: ...


def load_adapter(
    folder: str | os.PathLike[str],
    base_params: Params,
    *,
    check_base: CheckBase = "error",
    state: PyTree | None = None,
) -> Adapter | AdapterWithState:
    """Puts a saved adapter onto its base.

    Args:
        folder: Folder that `save_adapter` wrote.
        base_params: Base parameters, in the structure they had; frozen leaves of the result are the same objects.
        check_base: Reaction to a base of another fingerprint: `"error"`, `"warn"` or `"ignore"`. Structure and shapes
            of the leaves that the adapter touches must fit in any case.
        state: Tree in the structure of the `state` that was saved, such as the model's initial one; left out if the
            adapter was saved without.

    Returns:
        `Adapter(params, method)`; `params` equals the saved tree exactly (except for caches and random streams in it,
        which are the base's). With `state`, `AdapterWithState(params, method, state)`, the state as it was saved.

    Raises:
        AdapterError: Another base (the leaves that differ are named); a tensor that is missing, extra, misshapen, of
            another dtype or not finite (each named), or float64 where JAX has no 64-bit numbers; a description that
            this version cannot read; an adapter with state and no `state`, or one that doesn't fit.
        FileError: A file is missing, truncated, corrupt, or has changed since it was written.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, method = {"kernel": jnp.ones((4, 3))}, lj.LoRA(rank=2, alpha=2, targets=("kernel",))
        >>> folder = lj.save_adapter(tempfile.mkdtemp(), lj.attach(base, method, key=jax.random.key(0)), method)
        >>> lj.load_adapter(folder, base).params["kernel"].a.shape
        (2, 4)
    """
    folder = Path(folder)
    require_check_base(check_base)
    finish_earlier_save(folder)
    description, tensors = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read(folder))
    require_dtypes(tensors, folder)
    apart = {name: tensors.pop(name) for name in list(tensors) if name.startswith(APART)}
    if state is None and apart:
        raise AdapterError(
            f"{folder} was saved with state, {listed([name.removeprefix(APART) for name in apart], 4)}: pass a tree of "
            "its structure, such as the model's initial one, and take the trained one from the result: "
            "`params, method, state = lj.load_adapter(folder, base_params, state=state)`."
        )
    leaves = leaves_by_path(base_params)
    if adapted := [path for path, leaf in leaves.items() if is_adapted(leaf)]:
        raise AdapterError(
            f"`base_params` has factors already, at {listed(adapted, 5)}: pass the base, `lj.detach(params)`."
        )
    trained = _trained(description, tensors, leaves, folder)
    state_leaves = state_paths(base_params)
    if check_base != "ignore":
        whole = {path: trained[path] for path in description["adapted"] if path in leaves}
        frozen = {path: leaf for path, leaf in leaves.items() if path in whole or path not in trained}
        # An adapter written by an earlier version may have a fingerprint of state; one written now has none.
        saved, here = (
            {path: entry for path, entry in side.items() if path not in state_leaves - whole.keys()}
            for side in (description["base"], fingerprint(frozen))
        )
        check_fingerprint(folder, saved, here, check_base)
    _, _, treedef = flatten_with_paths(base_params)
    params = jax.tree.unflatten(treedef, [trained.get(path, leaf) for path, leaf in leaves.items()])
    params = _with_inserted(params, {path: node for path, node in trained.items() if path not in leaves}, folder)
    method = _without_state(method_from_json(description["method"], folder), marked_leaves(params))
    _require_agreement(params, method, tensors.keys() - state_leaves - set(description.get("state", ())), folder)
    without_checksum(description, folder / DESCRIPTION)  # last: the other checks are more precise
    if state is None:
        return Adapter(params, method)
    return AdapterWithState(params, method, _restored(state, apart, folder))


def verify_adapter(folder: str | os.PathLike[str]) -> str:
    """Checks that an adapter's files are as they were written, without its base.

    Returns:
        A hash of its description, which contains one of its tensors.

    Raises:
        AdapterError, FileError: See `load_adapter`.
    """
    folder = Path(folder)
    finish_earlier_save(folder)
    description, _ = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read(folder))
    return with_checksum(without_checksum(description, folder / DESCRIPTION))[CHECKSUM]


def require_dtypes(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """Refuses float64 where JAX's 64-bit numbers are off, and it would silently become float32."""
    wide = [name for name, array in tensors.items() if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype]
    if wide:
        raise AdapterError(
            f"{folder}: `{wide[0]}` is {tensors[wide[0]].dtype}, and JAX's 64-bit numbers are switched off: call "
            '`jax.config.update("jax_enable_x64", True)` before the base is loaded.'
        )


def _read(folder: Path) -> tuple[Description, dict[str, np.ndarray]]:
    description = checked_description(folder)
    path = folder / TENSORS
    header = read_safetensors_header(path)
    expected, state = description["tensors"], description.get("state", ())
    missing, extra = sorted(set(expected) - set(header)), sorted(set(header) - set(expected))
    if missing or extra:
        parts = [f"{word} {listed(names)}" for word, names in (("lacks", missing), ("also has", extra)) if names]
        raise AdapterError(
            f"{path} {' and '.join(parts)}, compared with what {DESCRIPTION} lists: copy both files of the adapter "
            "again."
        )
    for name, info in header.items():
        wanted = expected[name]
        if not jnp.issubdtype(info.dtype, jnp.floating) and name not in state:
            raise AdapterError(f"{path}: `{name}` is {info.dtype}, and a trained leaf has a floating dtype.")
        if list(info.shape) != wanted.get("shape") or str(info.dtype) != wanted.get("dtype"):
            raise AdapterError(
                f"{path}: `{name}` is {info.dtype} {info.shape}, and {DESCRIPTION} says {wanted.get('dtype')} "
                f"{tuple(wanted.get('shape') or ())}: copy both files of the adapter again."
            )
    tensors = read_safetensors(path)
    require_finite(tensors, f"{path} is not usable", state)
    if sha256_file(path) != description["sha256"]:
        raise AdapterError(
            f"{path} is not the file that {DESCRIPTION} was written with: copy both files of the adapter again."
        )
    return description, tensors


def _trained(
    description: Description, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Leaf], folder: Path
) -> dict[str, Leaf]:
    """Adapted weights, and leaves that were trained in full, by path."""
    trained: dict[str, Leaf] = {}
    shared: dict[Hashable, jax.Array] = {}
    for path, content in description["adapted"].items():
        cls = node_class(path, content, folder)
        inserted = issubclass(cls, InsertedNode)
        base = _no_base(path, leaves, folder) if inserted else _base_leaf(path, leaves, folder)
        node = node_from_json(cls, path, content, base, folder)
        trained[path] = _with_arrays(node, path, tensors, folder).regrown(shared)
    used = {f"{path}/{name}" for path in description["adapted"] for name in trained[path].fields}
    for name, array in tensors.items():
        if name in used:
            continue
        if name not in leaves and name in description.get("state", ()):
            raise AdapterError(
                f"{folder} was saved with the state `{name}` in its tree, and the base has no such leaf: load it onto "
                "a tree with its state (in Flax NNX, `nnx.split(model)` in two), and save it again with `state=`."
            )
        base = _base_leaf(name, leaves, folder)
        if tuple(base.shape) != array.shape:
            raise AdapterError(
                f"{folder}: `{name}` has the shape {array.shape}, and the base's leaf has {tuple(base.shape)}."
            )
        trained[name] = _placed(array, placement(base))
    return trained


def _with_arrays(node: AdaptedWeight, path: str, tensors: Mapping[str, np.ndarray], folder: Path) -> AdaptedWeight:
    arrays = {name: tensors[f"{path}/{name}"] for name in node.saved if f"{path}/{name}" in tensors}
    missing = [f"{path}/{name}" for name in node.saved if name not in arrays and name not in node.optional]
    if missing:
        raise AdapterError(f"{folder} lacks {', '.join(missing)}.")
    if problem := node.misfit({name: array.shape for name, array in arrays.items()}):
        raise AdapterError(f"{folder}: `{path}`: {problem}")
    places = node.placements()
    placed: dict[str, Any] = {name: _placed(array, places.get(name)) for name, array in arrays.items()}
    return dataclasses.replace(node, **placed)


def _base_leaf(path: str, leaves: Mapping[str, Leaf], folder: Path) -> Leaf:
    if path not in leaves:
        raise AdapterError(
            f"{folder} has `{path}`, and the base has no such leaf: load the base that it was trained on. "
            f"Nearest: {listed(nearest(path, leaves)) or 'none'}."
        )
    return leaves[path]


def _no_base(path: str, leaves: Mapping[str, Leaf], folder: Path) -> None:
    if path in leaves:
        raise AdapterError(
            f"{folder} inserts `{path}`, and the base has a leaf there: load the base that it was trained on."
        )
    if path.count("/") > _DEEPEST:  # deeper than any model; inserting recurses once a level
        raise AdapterError(f"{folder} inserts an array {path.count('/')} levels deep, at `{path:.80}`….")


def _placed(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _with_inserted(params: Params, nodes: Mapping[str, AdaptedWeight], folder: Path) -> Params:
    try:
        return with_leaves(params, nodes)
    except ValueError as error:
        raise AdapterError(f"{folder} doesn't fit this base: {error}") from None


def _without_state(method: Method, leaves: Mapping[str, Leaf]) -> Method:
    """The method without the names of state, which an earlier version could train; its values are in the file."""
    state = {"/" + path for path, leaf in leaves.items() if isinstance(leaf, StateLeaf)}
    named = {
        field: tuple(entry for entry in getattr(method, field) if entry not in state)
        for field in ("targets", "also_train")
        if isinstance(getattr(method, field, None), tuple)
    }
    changed: dict[str, Any] = {field: names for field, names in named.items() if names != getattr(method, field)}
    if changed.get("targets") == ():  # the method trained nothing else
        return Frozen(also_train=changed.get("also_train", method.also_train))
    return dataclasses.replace(method, **changed) if changed else method


def _require_agreement(params: Params, method: Method, tensors: Set[str], folder: Path) -> None:
    """Refuses tensors that aren't those that the method trains: a description may have been edited."""
    try:
        saved = saved_arrays(params, method).keys() - lasting_state(params).keys()
        settled = method.resolved(marked_leaves(params))
    except TypeError:
        raise
    except ValueError as error:
        raise AdapterError(f"{folder}: its method does not fit the base: {error}") from None
    if differing := sorted(saved ^ tensors):
        raise AdapterError(f"{folder}: its tensors aren't those that its method trains, at {listed(differing)}.")
    # A method is saved with the ranks and scales of its factors: they must be what it says.
    for what in ("rank", "alpha"):
        said, found = (getattr(m, f"{what}_overrides", {}) for m in (method, settled))
        for path in {**said, **found}:
            wanted, own = (overrides.get(path, getattr(method, what)) for overrides in (said, found))
            if not _is_close(wanted, own):
                raise AdapterError(
                    f"{folder}: `{path.removeprefix('/')}` has the {what} {own:g} by its tensors and its scale, and "
                    f"the method says {wanted!r:.20}: put back the file {DESCRIPTION} as it was written."
                )


def _is_close(one: float, other: float) -> bool:
    try:
        return math.isclose(one, other, rel_tol=1e-6)
    except OverflowError:  # an integer beyond all floats
        return False


def _restored(state: PyTree, saved: Mapping[str, np.ndarray], folder: Path) -> PyTree:
    """`state` with the values that were saved."""
    leaves, expected = leaves_by_path(state), state_arrays(state)
    values = {name.removeprefix(APART): array for name, array in saved.items()}
    if differing := sorted(values.keys() ^ expected.keys()):
        raise AdapterError(
            f"{folder}: `state` doesn't have the structure of what was saved with the adapter; they differ at "
            f"{listed(differing)}." + ("" if values else " It was saved without any: leave `state` out.")
        )
    for path, array in values.items():
        if array.shape != (shape := tuple(expected[path].shape)):
            raise AdapterError(
                f"{folder}: the state `{path}` has the shape {array.shape}, and that of `state` has {shape}."
            )
        leaf = leaves[path]
        if is_random_key(leaf):
            if array.dtype != np.uint32:
                raise AdapterError(f"{folder}: the random key `{path}` of the state is {array.dtype}, not uint32.")
            leaves[path] = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        else:
            leaves[path] = _placed(array, placement(leaf))
    _, _, treedef = flatten_with_paths(state)
    return jax.tree.unflatten(treedef, list(leaves.values()))
