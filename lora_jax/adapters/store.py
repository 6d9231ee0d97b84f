"""What a task saves: its trained leaves, its state, its method resolved to paths and axes, its base's fingerprint."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError, LoraJaxError
from ..files import (
    CHECKSUM,
    read_json,
    read_safetensors,
    read_safetensors_header,
    read_together,
    replacing,
    sha256_file,
    with_checksum,
    without_checksum,
    write_json,
    write_safetensors,
)
from ..masks import label_params
from ..methods import Frozen, Method
from ..methods.base import FROZEN
from ..paths import flatten_with_paths, is_random_key, leaves_by_path, listed, nearest, shape_text, with_leaves
from ..state import StateLeaf, lasting_state, marked_leaves, state_paths
from ..weights import IN, OUT, STACK, AdaptedWeight, is_adapted, placement
from .fingerprint import differences as fingerprint_differences
from .fingerprint import fingerprint

DESCRIPTION, TENSORS = "lora_jax_adapter.json", "adapter.safetensors"
_STAGING = ".saving-"  # of earlier versions
# Begins the tensors' names of state that stood apart from `params`; no leaf path begins with a slash.
_APART = "/state/"
_DEEPEST = 50
_LARGEST = float(np.finfo(np.float32).max)
FORMAT, VERSION = "lora_jax adapter", 1

CheckBase = Literal["error", "warn", "ignore"]


class AdapterError(LoraJaxError):
    """An adapter that does not fit: another base, missing or misshapen tensors, values that are not finite."""


class Adapter(NamedTuple):
    """A loaded adapter: the adapted parameter tree and the method that labels it."""

    params: Any
    method: Method


class AdapterWithState(NamedTuple):
    """A loaded adapter with the state that was saved beside it."""

    params: Any
    method: Method
    state: Any


def save_adapter(folder: str | os.PathLike[str], params: Any, method: Method, *, state: Any = None) -> Path:
    """Saves what the method trained and the state that came of it, and nothing of the base.

    Writes `lora_jax_adapter.json` (method, axes, shapes, the base's fingerprint, checksums of both files) and
    `adapter.safetensors` (the trained leaves, named by leaf path). Both are complete on disk before either takes its
    place: a full disk, or a kill at any moment, leaves the earlier adapter in the folder or the new one. Savers of one
    folder wait for each other, and who loads meanwhile gets one of theirs, whole.

    The fingerprint covers the frozen leaves: path, shape, and a sample of values at fixed places rounded to bfloat16.
    It catches mistakes; it is no security check. State is no part of it: a base whose batch statistics have moved is
    the same base.

    State that stands in `params` (Flax Linen's `batch_stats`, say) is saved with it, but for caches and random streams.

    Args:
        folder: made if it does not exist.
        params: the tree from `attach`, trained.
        method: the method that it was trained with.
        state: what the function carries from call to call beside `params`, a tree of arrays and random keys; all of it
            is saved. `load_adapter(..., state=...)` gives it back.

    Returns:
        The folder.

    Raises:
        AdapterError: a trained leaf holds NaN or infinity; `params` is the trainable part only.
        FileError: the files cannot be written, a full disk for example.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> method = lj.BitFit()
        >>> folder = lj.save_adapter(tempfile.mkdtemp(), {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, method)
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter.safetensors', 'lora_jax_adapter.json']
    """
    folder = Path(folder)
    leaves = marked_leaves(params)
    labels = dict(zip(leaves, _leaves(label_params(params, method)), strict=True))
    partial = [path for path, leaf in leaves.items() if is_adapted(leaf) and leaf.has_base and leaf.base is None]
    if partial:
        raise AdapterError(
            f"`params` lacks the base weights, at {', '.join(partial[:5])}: save `lj.combine(trainable, frozen)`, so "
            "that the base can be told from another"
        )
    apart = {_APART + path: leaf for path, leaf in _state_arrays(state).items()}
    kept = sorted([*lasting_state(params), *apart])
    tensors = {name: np.asarray(array) for name, array in (saved_arrays(params, method) | apart).items()}
    _require_finite(tensors, "cannot save", kept)
    with replacing(folder, (TENSORS, DESCRIPTION), read_elsewhere=False, what="an adapter") as staging:
        write_safetensors(staging / TENSORS, tensors)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "method": _method_to_json(method.resolved(leaves)),
            "adapted": {path: _static(leaf) for path, leaf in leaves.items() if is_adapted(leaf)},
            "tensors": {
                name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in tensors.items()
            },
            "sha256": sha256_file(staging / TENSORS),
            "base": fingerprint(_frozen_leaves(leaves, labels)),
        } | ({"state": kept} if kept else {})
        write_json(staging / DESCRIPTION, with_checksum(description))
        _finish_earlier_save(folder)
        for left in folder.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
    return folder


@overload
def load_adapter(
    folder: str | os.PathLike[str], base_params: Any, *, check_base: CheckBase = "error", state: None = None
) -> Adapter: ...


@overload
def load_adapter(
    folder: str | os.PathLike[str], base_params: Any, *, check_base: CheckBase = "error", state: Any
) -> AdapterWithState: ...


def load_adapter(
    folder: str | os.PathLike[str],
    base_params: Any,
    *,
    check_base: CheckBase = "error",
    state: Any = None,
) -> Adapter | AdapterWithState:
    """Puts a saved adapter onto its base.

    Args:
        folder: written by `save_adapter`.
        base_params: the base parameters, in the structure they had; frozen leaves of the result are the same objects.
        check_base: what to do when the fingerprint does not fit: `"error"`, `"warn"` or `"ignore"`. Structure and
            shapes of what the adapter touches must fit in any case.
        state: a tree in the structure of the `state` that was saved, the model's initial one say; where the adapter
            was saved without, leave it out.

    Returns:
        `Adapter(params, method)`; `params` equals the saved tree exactly (of state that stands in it, caches and random
        streams are the base's). With `state`, `AdapterWithState(params, method, state)`, the state as it was saved.

    Raises:
        AdapterError: another base (the leaves that differ are named); a tensor is missing, extra, misshapen, of
            another dtype or not finite (each named), or float64 where JAX has no 64-bit numbers; a description that
            this version cannot read; `state` isn't given and the adapter has some, or it doesn't fit.
        FileError: a file is missing, truncated, corrupt, or changed since it was written.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, method = {"kernel": jnp.ones((4, 3))}, lj.LoRA(rank=2, alpha=2, targets=("kernel",))
        >>> folder = lj.save_adapter(tempfile.mkdtemp(), lj.attach(base, method, key=jax.random.key(0)), method)
        >>> lj.load_adapter(folder, base).params["kernel"].a.shape
        (2, 4)
    """
    folder = Path(folder)
    if check_base not in ("error", "warn", "ignore"):
        raise ArgumentError(f'`check_base` must be "error", "warn" or "ignore", got {check_base!r}')
    _finish_earlier_save(folder)
    description, tensors = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read(folder))
    require_held(tensors, folder)
    apart = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_APART)}
    if state is None and apart:
        raise AdapterError(
            f"{folder} was saved with state, {listed([name.removeprefix(_APART) for name in apart], most=4)}: pass a "
            "tree of its structure, the model's initial one say, and take the trained one from the result: "
            "`params, method, state = lj.load_adapter(folder, base_params, state=state)`"
        )
    leaves = leaves_by_path(base_params)
    adapted = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if adapted:
        raise AdapterError(
            f"`base_params` has factors already, at {', '.join(adapted[:5])}: pass the base, `lj.detach(params)`"
        )

    trained: dict[str, Any] = {}
    shared: dict[Any, Any] = {}
    for path, static in description["adapted"].items():
        cls = _node_class(path, static, folder)
        base = _base_leaf(path, leaves, folder) if cls.has_base else _no_base(path, leaves, folder)
        trained[path] = _node(cls, path, static, base, tensors, folder).regrown(shared)
    used = {f"{path}/{name}" for path in description["adapted"] for name in trained[path].fields}
    for name, array in tensors.items():
        if name in used:
            continue
        if name not in leaves and name in description.get("state", ()):
            raise AdapterError(
                f"{folder} was saved with the state `{name}` in its tree, and the base has no such leaf: load it onto "
                "a tree with its state (of Flax NNX, `nnx.split(model)` in two), and save it again with `state=`"
            )
        base = _base_leaf(name, leaves, folder)
        if tuple(base.shape) != array.shape:
            raise AdapterError(
                f"{folder}: `{name}` has the shape {array.shape}, and the base's leaf has {tuple(base.shape)}"
            )
        trained[name] = _placed(array, placement(base))

    state_leaves = state_paths(base_params)
    if check_base != "ignore":
        whole = {path: trained[path] for path in description["adapted"] if trained[path].has_base}
        frozen = {path: leaf for path, leaf in leaves.items() if path in whole or path not in trained}
        # Of state, an adapter written by an earlier version may have a fingerprint, and one written now has none.
        saved_base, here = (
            {path: entry for path, entry in side.items() if path not in state_leaves - whole.keys()}
            for side in (description["base"], fingerprint(frozen))
        )
        found = fingerprint_differences(saved_base, here)
        if found:
            message = f"{folder} was trained on another base: {'; '.join(found[:8])}" + (
                f"; and {len(found) - 8} more" if len(found) > 8 else ""
            )
            if check_base == "error":
                raise AdapterError(f'{message}. Load the base that it was trained on, or pass `check_base="warn"`')
            warnings.warn(message, stacklevel=2)
    _, _, treedef = flatten_with_paths(base_params)
    params = jax.tree.unflatten(treedef, [trained.get(path, leaf) for path, leaf in leaves.items()])
    params = _with_inserted(params, {path: node for path, node in trained.items() if path not in leaves}, folder)
    method = _without_state(_method_from_json(description["method"], folder), marked_leaves(params))
    _require_agreement(params, method, tensors.keys() - state_leaves - set(description.get("state", ())), folder)
    # After all that can say more of what is wrong.
    without_checksum(description, folder / DESCRIPTION)
    if state is None:
        return Adapter(params, method)
    return AdapterWithState(params, method, _restored(state, apart, folder))


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of an adapter's `lora_jax_adapter.json`.

    Raises:
        FileError: the file is missing, no JSON, or changed since it was written.
        AdapterError: it is no adapter of this format, or one of a newer version.
    """
    folder = Path(folder)
    _finish_earlier_save(folder)
    description = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read_description(folder))
    return without_checksum(description, folder / DESCRIPTION)


def verify_adapter(folder: str | os.PathLike[str]) -> str:
    """Whether an adapter is as it was written, its base aside.

    Returns:
        What tells it from any other: a hash of its description, in which there is one of its tensors.

    Raises:
        AdapterError, FileError: as `load_adapter`.
    """
    folder = Path(folder)
    _finish_earlier_save(folder)
    description, _ = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read(folder))
    return with_checksum(without_checksum(description, folder / DESCRIPTION))[CHECKSUM]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    description = _read_description(folder)
    return description, _read_tensors(folder, description)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{path} describes no lora_jax adapter: its `format` is not {FORMAT!r}")
    if description.get("version") != VERSION:
        raise AdapterError(
            f"{path} has the format version {description.get('version')!r}, and this lora_jax reads {VERSION}: "
            "install a newer lora_jax"
        )
    expected = {"method": dict, "adapted": dict, "tensors": dict, "sha256": str, "base": dict}
    for name, kind in expected.items():
        if not isinstance(description.get(name), kind):
            raise AdapterError(
                f"{path}: `{name}` must be a JSON {kind.__name__}, got {type(description.get(name)).__name__}"
            )
    kept = description.get("state", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise AdapterError(f"{path}: `state` must be a list of tensors' names, got {kept!r:.80}")
    for name in ("tensors", "base"):
        for leaf, entry in description[name].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
                raise AdapterError(f"{path}: `{name}` must give a `shape` for {leaf}, got {entry!r:.80}")
    return description


def _finish_earlier_save(folder: Path) -> None:
    """Puts the description in its place that a save of an earlier version, cut short, left waiting for it."""
    for staging in folder.glob(f"{_STAGING}*"):
        if (staging / DESCRIPTION).exists() and not (staging / TENSORS).exists():
            os.replace(staging / DESCRIPTION, folder / DESCRIPTION)
            shutil.rmtree(staging, ignore_errors=True)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_adapted)


def saved_arrays(params: Any, method: Method) -> dict[str, Any]:
    """What `save_adapter` writes of `params`, by the names in the file; `params` may be abstract.

    A frozen factor belongs to the adapter as a trained one does: it is no part of the base. Nor is state.
    """
    leaves, found = leaves_by_path(params), lasting_state(params)
    for (path, leaf), label in zip(leaves.items(), _leaves(label_params(params, method)), strict=True):
        if is_adapted(leaf):
            arrays = {f"{path}/{name}": getattr(leaf, name) for name in leaf.saved}
            found |= {name: array for name, array in arrays.items() if array is not None}
        elif label != FROZEN:
            found[path] = leaf
    return found


def _frozen_leaves(leaves: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: leaf.base if is_adapted(leaf) else leaf
        for path, leaf in leaves.items()
        if (leaf.has_base if is_adapted(leaf) else labels[path] == FROZEN and not isinstance(leaf, StateLeaf))
    }


def _state_arrays(state: Any) -> dict[str, Any]:
    """The arrays of a tree of state by path; of random keys, their data."""
    leaves = leaves_by_path(state)
    if numbers := [path for path, leaf in leaves.items() if isinstance(leaf, int | float | complex)]:
        raise AdapterError(f"`state` holds Python numbers, at {listed(numbers)}: make them arrays, `jnp.asarray(...)`")
    arrays = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}
    return {path: jax.random.key_data(leaf) if is_random_key(leaf) else leaf for path, leaf in arrays.items()}


def _restored(state: Any, saved: Mapping[str, np.ndarray], folder: Path) -> Any:
    """`state` with the values that were saved."""
    leaves, expected = leaves_by_path(state), _state_arrays(state)
    values = {name.removeprefix(_APART): array for name, array in saved.items()}
    if differing := sorted(values.keys() ^ expected.keys()):
        raise AdapterError(
            f"{folder}: `state` doesn't have the structure of what was saved with the adapter; they differ at "
            f"{listed(differing)}" + ("" if values else ". It was saved without any: leave `state` out")
        )
    for path, array in values.items():
        if array.shape != expected[path].shape:
            raise AdapterError(
                f"{folder}: the state `{path}` has the shape {array.shape}, and that of `state` has "
                f"{tuple(expected[path].shape)}"
            )
        leaf = leaves[path]
        if is_random_key(leaf):
            if array.dtype != np.uint32:
                raise AdapterError(f"{folder}: the random key `{path}` of the state is {array.dtype}, not uint32")
            leaves[path] = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        else:
            leaves[path] = _placed(array, placement(leaf))
    _, _, treedef = flatten_with_paths(state)
    return jax.tree.unflatten(treedef, list(leaves.values()))


def _without_state(method: Method, leaves: Mapping[str, Any]) -> Method:
    """An earlier version could label state as trained; its file has the values, and the method no longer names them."""
    state = {"/" + path for path, leaf in leaves.items() if isinstance(leaf, StateLeaf)}
    named = {
        field: tuple(entry for entry in getattr(method, field) if entry not in state)
        for field in ("targets", "also_train")
        if isinstance(getattr(method, field, None), tuple)
    }
    changed = {field: entries for field, entries in named.items() if entries != getattr(method, field)}
    if changed.get("targets") == ():  # of a method that trained nothing else
        return Frozen(also_train=changed.get("also_train", method.also_train))
    return dataclasses.replace(method, **changed) if changed else method


def _require_finite(tensors: Mapping[str, np.ndarray], what: str, state: Collection[str]) -> None:
    """Of state, infinity is allowed: a running minimum begins with it."""
    broken = [
        name
        for name, array in tensors.items()
        if (np.isnan if name in state else lambda values: ~np.isfinite(values))(array).any()
    ]
    if broken:
        raise AdapterError(f"{what}: NaN or infinity in {', '.join(broken[:5])}; go back to an earlier checkpoint")


def _read_tensors(folder: Path, description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    path = folder / TENSORS
    header = read_safetensors_header(path)
    expected = description["tensors"]
    missing, extra = sorted(set(expected) - set(header)), sorted(set(header) - set(expected))
    if missing or extra:
        parts = [
            f"{word} {', '.join(names[:8])}"
            for word, names in (("lacks", missing), ("has, unannounced,", extra))
            if names
        ]
        raise AdapterError(
            f"{path} {' and '.join(parts)}, by what {DESCRIPTION} lists: copy both files of the adapter again"
        )
    for name, info in header.items():
        wanted = expected[name]
        if not jnp.issubdtype(info.dtype, jnp.floating) and name not in description.get("state", ()):
            raise AdapterError(f"{path}: `{name}` is {info.dtype}, and what is trained is of a floating type")
        if list(info.shape) != wanted.get("shape") or str(info.dtype) != wanted.get("dtype"):
            raise AdapterError(
                f"{path}: `{name}` is {info.dtype} {info.shape}, and {DESCRIPTION} says {wanted.get('dtype')} "
                f"{tuple(wanted.get('shape') or ())}: copy both files of the adapter again"
            )
    tensors = read_safetensors(path)
    _require_finite(tensors, f"{path} is not usable", description.get("state", ()))
    if sha256_file(path) != description["sha256"]:
        raise AdapterError(
            f"{path} is not the file that {DESCRIPTION} was written with: copy both files of the adapter again"
        )
    return tensors


def require_held(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """JAX makes float32 of float64 without a word where 64-bit numbers are switched off."""
    wide = [name for name, array in tensors.items() if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype]
    if wide:
        raise AdapterError(
            f"{folder}: `{wide[0]}` is {tensors[wide[0]].dtype}, and JAX's 64-bit numbers are switched off: call "
            '`jax.config.update("jax_enable_x64", True)` before the base is loaded'
        )


def _require_agreement(params: Any, method: Method, tensors: Set[str], folder: Path) -> None:
    """What is on disk must be what the method trains: a description may have been edited."""
    try:
        saved = saved_arrays(params, method).keys() - lasting_state(params).keys()
        settled = method.resolved(marked_leaves(params))
    except ValueError as error:
        raise AdapterError(f"{folder}: its method does not fit the base: {error}") from None
    differing = sorted(saved ^ tensors)
    if differing:
        raise AdapterError(
            f"{folder}: its method does not train what its tensors are; they differ at {', '.join(differing[:8])}"
        )
    # A method is saved with the ranks and scales that its factors have: what they are now must be what it says.
    for what in ("rank", "alpha"):
        said, found = (getattr(m, f"{what}_overrides", {}) for m in (method, settled))
        for path in {**said, **found}:
            wanted, own = (overrides.get(path, getattr(method, what)) for overrides in (said, found))
            if not _is_close(wanted, own):
                raise AdapterError(
                    f"{folder}: `{path.removeprefix('/')}` has the {what} {own:g} by its tensors and its scale, and "
                    f"the method says {wanted!r:.20}: put back the file {DESCRIPTION} as it was written"
                )


def _is_close(one: float, other: float) -> bool:
    try:
        return math.isclose(one, other, rel_tol=1e-6)
    except OverflowError:  # an integer beyond all floats
        return False


def _base_leaf(path: str, leaves: Mapping[str, Any], folder: Path) -> Any:
    if path not in leaves:
        near = nearest(path, leaves)
        raise AdapterError(
            f"{folder} has `{path}`, and the base has no such leaf: load the base that it was trained on. "
            f"Nearest: {', '.join(near) or 'none'}"
        )
    return leaves[path]


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _no_base(path: str, leaves: Mapping[str, Any], folder: Path) -> None:
    if path in leaves:
        raise AdapterError(f"{folder} inserts `{path}`, and the base has a leaf there: load the base it was trained on")
    if path.count("/") > _DEEPEST:  # no model's; and to insert it takes a call a level
        raise AdapterError(f"{folder} inserts an array {path.count('/')} levels deep, at `{path:.80}`…")


def _with_inserted(params: Any, nodes: Mapping[str, AdaptedWeight], folder: Path) -> Any:
    try:
        return with_leaves(params, nodes)
    except ValueError as error:
        raise AdapterError(f"{folder} doesn't fit this base: {error}") from None


def _node_class(path: str, static: Any, folder: Path) -> type[AdaptedWeight]:
    name = static.get("node") if isinstance(static, dict) else None
    cls = AdaptedWeight.registry.get(name) if isinstance(name, str) else None
    if cls is None or not cls.saved:
        raise AdapterError(f"{folder}: `{path}` is adapted in a way that this lora_jax does not know: {static!r:.80}")
    return cls


def _node(
    cls: type[AdaptedWeight],
    path: str,
    static: Any,
    base: Any,
    tensors: Mapping[str, np.ndarray],
    folder: Path,
) -> AdaptedWeight:
    values = {name: value for name, value in static.items() if name != "node"}
    axes = values.get("axes")
    length = None if base is None else len(base.shape)
    if not isinstance(axes, str) or set(axes) - {IN, OUT, STACK} or length not in (None, len(axes)):
        expected = "labels of an array" if base is None else f"the base's {shape_text(base)}"
        raise AdapterError(f"{folder}: the axis labels {axes!r} of `{path}` do not fit {expected}")
    numbers = {name: value for name, value in values.items() if name != "axes"}
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in numbers.values()):
        raise AdapterError(f"{folder}: `{path}` has settings that are no finite float32 numbers: {numbers!r:.200}")
    try:
        node = cls(base, **dict.fromkeys(cls.fields), **values)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: the description of `{path}` does not fit {cls.__name__}: {error}") from None
    arrays = {name: tensors[f"{path}/{name}"] for name in cls.saved if f"{path}/{name}" in tensors}
    missing = [f"{path}/{name}" for name in cls.saved if name not in arrays and name not in cls.optional]
    if missing:
        raise AdapterError(f"{folder} lacks {', '.join(missing)}")
    problem = node.misfit({name: array.shape for name, array in arrays.items()})
    if problem:
        raise AdapterError(f"{folder}: `{path}`: {problem}")
    places = node.placements()
    return dataclasses.replace(node, **{name: _placed(array, places.get(name)) for name, array in arrays.items()})


def _static(node: AdaptedWeight) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(node) if field.name not in ("base", *node.fields)]  # type: ignore[arg-type]
    return {"node": type(node).__name__, **{name: getattr(node, name) for name in names}}


def _method_to_json(method: Method) -> dict[str, Any]:
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"name": type(method).__name__, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value.item() if isinstance(value, np.generic) else value


def _method_from_json(description: Mapping[str, Any], folder: Path) -> Method:
    name = description.get("name")
    cls = Method.registry.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(Method.registry))
        raise AdapterError(f"{folder}: this lora_jax has no method {name!r}, only {known}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in description.items() if key != "name"}
    patterns = [key for key in ("targets", "also_train") if isinstance(values.get(key), str)]
    if patterns:  # `resolved` writes paths, and a regular expression from elsewhere can run for ever
        raise AdapterError(f"{folder}: `{patterns[0]}` of the method must be a list of leaf paths")
    try:
        return cls(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"{folder}: the description of the method {name} is not usable: {error}") from None
