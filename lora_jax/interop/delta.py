"""Delta files: the leaves that training changed, under Hugging Face names. The exchange format for BitFit."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters import AdapterError, require_dtypes
from ..adapters.changes import changed_leaves
from ..adapters.fingerprint import CheckBase, check_fingerprint, fingerprint, require_check_base
from ..files import (
    TensorInfo,
    read_json,
    read_safetensors,
    read_safetensors_header,
    read_together,
    replacing,
    sha256_file,
    with_checksum,
    within_folder,
    without_checksum,
    write_json,
    write_safetensors,
)
from ..paths import flatten_with_paths, leaves_by_path, nearest
from ..types import Leaf, Params, Uses
from ..weights import is_adapted, placement
from .layout import leaf_layout
from .module_names import ModuleTable, Names, kind

DESCRIPTION, TENSORS = "lora_jax_delta.json", "delta.safetensors"
FORMAT, VERSION = "lora_jax delta", 1

# Its entries are checked as far as they are used; what they hold is JSON.
Description = dict[str, Any]


def export_delta(
    folder: str | os.PathLike[str],
    params: Params,
    base_params: Params,
    *,
    names: Names,
    base_name: str | None = None,
    uses: Uses | None = None,
    fan_in_fan_out: Sequence[str] | None = None,
    absent: Collection[str] = (),
) -> Path:
    """Writes the leaves in which two trees differ, with their new values, under Hugging Face names.

    BitFit has no format of its own to exchange: this is one that needs a few lines to read anywhere. It writes
    `delta.safetensors` (`bert.encoder.layer.0.attention.self.query.bias` and so on: the new values, not differences, so
    that applying them is exact) and `lora_jax_delta.json` (shapes, checksum, a fingerprint of the values replaced).

    Args:
        folder: Folder to write to; made if it doesn't exist.
        params: Trained tree of plain arrays: BitFit's, or the result of `lj.merge_params`.
        base_params: Base parameters, in the same structure.
        names: `{leaf path: Hugging Face module}`; every leaf that has changed must be in it.
        base_name: Name of the base for the description.
        uses: Result of `trace_weights`, needed if weights of more than two axes, or stored `(out, in)`, have changed.
        fan_in_fan_out: Modules that store a weight as `(in, out)` there, see `export_peft`.
        absent: Leaves that the base as others have it lacks, such as a head that was drawn: written whether they have
            changed or not, and what they replace isn't held against anything.

    Returns:
        The folder.

    Raises:
        AdapterError: The trees differ in structure or shapes, or in nothing; an adapted weight; a changed leaf has no
            name, values that are not finite, or a layout there that isn't told (see `fan_in_fan_out`).
        FileError: The files cannot be written.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> tuned = {"dense": {"kernel": base["dense"]["kernel"], "bias": jnp.arange(3.0)}}
        >>> names = {"dense/kernel": "layer.dense", "dense/bias": "layer.dense"}
        >>> folder = lj.interop.export_delta(tempfile.mkdtemp(), tuned, base, names=names)
        >>> there = {"layer.dense.weight": np.ones((3, 2)), "layer.dense.bias": np.zeros(3)}
        >>> lj.interop.apply_delta(folder, there)["layer.dense.bias"]
        array([0., 1., 2.], dtype=float32)
        >>> lj.interop.apply_delta(folder, base, names=names)["dense"]["bias"].tolist()
        [0.0, 1.0, 2.0]
    """
    try:
        changed = changed_leaves(params, base_params)
    except TypeError:
        raise
    except ValueError as error:
        raise AdapterError(str(error)) from None
    leaves, before = leaves_by_path(params), leaves_by_path(base_params)
    changed = [path for path in leaves if path in {*changed, *absent}]
    table = ModuleTable(names, leaves, fan_in_fan_out)
    if not changed:
        raise AdapterError("`params` and `base_params` are equal: there is nothing to write")
    tensors, replaced, tied = {}, {}, {}
    for path in changed:
        module = table.module(path)
        layout = leaf_layout(path, leaves[path], uses, in_out=table.stores_in_out(module))
        tensors[table.tensor(path)] = layout.export(leaves[path])
        if path not in absent:
            replaced[table.tensor(path)] = layout.export(before[path])
        tied[table.tensor(path)] = [f"{other}.{kind(path)}" for other in table.tied_to(path)]
    _require_finite(tensors, "cannot export")
    folder = Path(folder)
    with replacing(folder, (TENSORS, DESCRIPTION), read_elsewhere=False, what="a delta") as staging:
        write_safetensors(staging / TENSORS, tensors, {"format": "pt"})
        prints = fingerprint(replaced)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "base_model_name_or_path": base_name,
            "tensors": {
                name: {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "base": prints.get(name, {}).get("sample"),
                    **({"tied": tied[name]} if tied[name] else {}),
                }
                for name, array in tensors.items()
            },
            "sha256": sha256_file(staging / TENSORS),
        }
        write_json(staging / DESCRIPTION, with_checksum(description))
    return folder


def apply_delta(
    folder: str | os.PathLike[str],
    target: Params,
    *,
    names: Names | None = None,
    uses: Uses | None = None,
    fan_in_fan_out: Sequence[str] | None = None,
    check_base: CheckBase = "error",
) -> Params:
    """Puts a delta's values in place of a base's, in a tree of ours or in a mapping of Hugging Face names.

    With `names`, `target` is a parameter tree. Without, it is a flat mapping from Hugging Face names to arrays, NumPy's
    or anything that `numpy.asarray` takes, a PyTorch `state_dict()` on the CPU included. PyTorch isn't imported: what
    comes back in place of a changed entry is a NumPy array, so load it with
    `model.load_state_dict({name: torch.as_tensor(value) for name, value in result.items()})`.

    Args:
        folder: Folder that `export_delta` wrote.
        target: Base parameters.
        names: `{leaf path: Hugging Face module}` for a tree; `None` for a mapping of Hugging Face names.
        uses, fan_in_fan_out: Same as for `export_delta`; only for a tree.
        check_base: Reaction to replaced values that differ from those of the export: `"error"`, `"warn"` or
            `"ignore"`. Names and shapes must fit in any case.

    Returns:
        A new tree, or a new dict, in which the changed entries are new and all others the same objects.

    Raises:
        AdapterError: Another base; a tensor without a place here, misshapen, not finite, or (for a tree) float64 where
            JAX has no 64-bit numbers; a description that this version cannot read.
        FileError: A file is missing, truncated or corrupt, or leads out of the folder.

    Example:
        See `export_delta`.
    """
    require_check_base(check_base)
    folder = Path(folder)
    description, header, tensors = read_together(folder, (TENSORS, DESCRIPTION), lambda: _read(folder))
    if names is None:
        if not isinstance(target, Mapping):
            raise AdapterError(
                f"`target` is a {type(target).__name__}: pass a mapping of Hugging Face names, or a tree with `names`"
            )
        places = {name: (name, None) for name in header}
        here: Mapping[str, Leaf] = target
    else:
        here = leaves_by_path(target)
        adapted = [path for path, leaf in here.items() if is_adapted(leaf)]
        if adapted:
            raise AdapterError(f"`target` has factors, at {', '.join(adapted[:5])}: pass the base, `lj.detach(params)`")
        table = ModuleTable(names, here, fan_in_fan_out)
        places = {}
        for name, info in header.items():
            module, _, part = name.rpartition(".")
            path = table.path(module, part)
            if path is None:
                raise AdapterError(
                    f"{folder} has '{name:.200}', and `names` has no leaf for it. Nearest: {table.near(module[:200])}"
                )
            in_out = table.stores_in_out(module)
            layout = leaf_layout(path, here[path], uses, in_out=in_out)
            if layout.there != info.shape:
                raise AdapterError(
                    f"{folder}: '{name}' has the shape {info.shape}, and the base's has {layout.there}"
                    f"{layout.hint(info.shape, in_out)}"
                )
            places[name] = path, layout

    replaced = {}
    for name, (place, layout) in places.items():
        if place not in here:
            near = nearest(name[:200].replace(".", "/"), [other.replace(".", "/") for other in here])
            raise AdapterError(
                f"{folder} has '{name:.200}', and the mapping hasn't. "
                f"Nearest: {', '.join(near).replace('/', '.') or 'none'}"
            )
        shape = tuple(here[place].shape)
        if layout is None and shape != header[name].shape:
            raise AdapterError(f"{folder}: '{name}' has the shape {header[name].shape}, and the base's has {shape}")
        if check_base != "ignore":
            replaced[name] = _array(name, here[place]) if layout is None else layout.export(here[place])
    if check_base != "ignore":
        entries = {name: entry for name, entry in description["tensors"].items() if entry.get("base") is not None}
        saved = {name: {"shape": entry["shape"], "sample": entry["base"]} for name, entry in entries.items()}
        check_fingerprint(folder, saved, fingerprint({name: replaced[name] for name in saved}), check_base)

    without_checksum(description, folder / DESCRIPTION)  # after all that can say more of what is wrong
    if names is None:
        listed = description["tensors"]
        tied = {other: tensors[name] for name in tensors for other in _names(listed[name].get("tied")) if other in here}
        return {**here, **tensors, **tied}
    require_dtypes(tensors, folder)
    new = {path: _leaf(layout.restore(tensors[name]), here[path]) for name, (path, layout) in places.items() if layout}
    _, _, treedef = flatten_with_paths(target)
    return jax.tree.unflatten(treedef, [new.get(path, leaf) for path, leaf in here.items()])


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _array(name: str, value: Leaf) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a bfloat16 tensor of PyTorch, or one on a GPU
        raise AdapterError(
            f"'{name}' can't be read as a NumPy array ({error}): pass `tensor.detach().cpu().float()`, or "
            '`check_base="ignore"`'
        ) from None


def _leaf(array: np.ndarray, base: Leaf) -> jax.Array:
    sharding = placement(base)
    # A copy: a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
    new = jnp.array(array, copy=True)
    return new if sharding is None else jax.device_put(new, sharding)


def _require_finite(tensors: Mapping[str, np.ndarray], what: str) -> None:
    broken = [
        name
        for name, array in tensors.items()
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all()
    ]
    if broken:
        raise AdapterError(f"{what}: NaN or infinity in {', '.join(broken[:5])}")


def _read(folder: Path) -> tuple[Description, dict[str, TensorInfo], dict[str, np.ndarray]]:
    description, header = _read_description(folder)
    tensors = read_safetensors(folder / TENSORS, header)
    _require_finite(tensors, f"{folder / TENSORS} is not usable")
    if sha256_file(folder / TENSORS) != description.get("sha256"):
        raise AdapterError(f"{folder / TENSORS} is not the file that {DESCRIPTION} was written with: copy both again")
    return description, header, tensors


def _read_description(folder: Path) -> tuple[Description, dict[str, TensorInfo]]:
    path = within_folder(folder, DESCRIPTION)
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{path} describes no lora_jax delta: its `format` is not {FORMAT!r}")
    if description.get("version") != VERSION:
        raise AdapterError(
            f"{path} has the format version {description.get('version')!r}, and this lora_jax reads {VERSION}: install "
            "a newer lora_jax"
        )
    listed = description.get("tensors")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise AdapterError(f"{path}: `tensors` must give an object for each tensor")
    header = read_safetensors_header(within_folder(folder, TENSORS))
    for name in sorted(listed.keys() ^ header.keys()):
        raise AdapterError(f"{folder / TENSORS} and {DESCRIPTION} differ at '{name:.200}': copy both files again")
    for name, info in header.items():
        entry = listed[name]
        if entry.get("shape") != list(info.shape) or entry.get("dtype") != str(info.dtype):
            raise AdapterError(
                f"{folder / TENSORS}: '{name}' is {info.dtype} {info.shape}, and {DESCRIPTION} says "
                f"{entry.get('dtype')!r:.50} {entry.get('shape')!r:.50}: copy both files again"
            )
    return description, header
