"""`lora_jax_adapter.json`, an adapter's description: its format, its checks, and methods and nodes as JSON."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoraJaxError
from ..files import read_json, read_together, without_checksum
from ..methods import Method
from ..paths import shape_text
from ..types import Leaf
from ..weights import IN, OUT, STACK, AdaptedWeight

DESCRIPTION, TENSORS = "lora_jax_adapter.json", "adapter.safetensors"
FORMAT, VERSION = "lora_jax adapter", 1
# Prefix of the tensors' names of state that stood apart from `params`; no leaf path begins with a slash.
APART = "/state/"
STAGING = ".saving-"  # of earlier versions
_LARGEST = float(np.finfo(np.float32).max)

# Its entries are checked as far as they are used; what they hold is JSON.
Description = dict[str, Any]


class AdapterError(LoraJaxError):
    """An adapter that does not fit: another base, missing or misshapen tensors, values that are not finite."""


def read_description(folder: str | os.PathLike[str]) -> Description:
    """The checked content of an adapter's `lora_jax_adapter.json`.

    Raises:
        FileError: The file is missing, not JSON, or has changed since it was written.
        AdapterError: It describes no adapter of this format, or one of a newer version.
    """
    folder = Path(folder)
    finish_earlier_save(folder)
    description = read_together(folder, (TENSORS, DESCRIPTION), lambda: checked_description(folder))
    return without_checksum(description, folder / DESCRIPTION)


def checked_description(folder: Path) -> Description:
    """The description, its checksum aside: what the other checks say is more precise."""
    path = folder / DESCRIPTION
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{path} describes no lora_jax adapter: its `format` is not {FORMAT!r}.")
    if description.get("version") != VERSION:
        raise AdapterError(
            f"{path} has the format version {description.get('version')!r}, and this lora_jax reads {VERSION}: "
            "install a newer lora_jax."
        )
    expected = {"method": dict, "adapted": dict, "tensors": dict, "sha256": str, "base": dict}
    for name, kind in expected.items():
        if not isinstance(description.get(name), kind):
            raise AdapterError(
                f"{path}: `{name}` must be a JSON {kind.__name__}, got {type(description.get(name)).__name__}."
            )
    kept = description.get("state", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise AdapterError(f"{path}: `state` must be a list of tensor names, got {kept!r:.80}.")
    for name in ("tensors", "base"):
        for leaf, entry in description[name].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
                raise AdapterError(f"{path}: `{name}` must give a `shape` for {leaf}, got {entry!r:.80}.")
    return description


def finish_earlier_save(folder: Path) -> None:
    """Moves a description to its place that a killed save of an earlier version left beside it."""
    for staging in folder.glob(f"{STAGING}*"):
        if (staging / DESCRIPTION).exists() and not (staging / TENSORS).exists():
            os.replace(staging / DESCRIPTION, folder / DESCRIPTION)
            shutil.rmtree(staging, ignore_errors=True)


def method_to_json(method: Method) -> dict[str, object]:
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if not method.saved_as:
        raise AdapterError(f"A {type(method).__name__} can't be saved: give the class a `name`.")
    return {"name": method.saved_as, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value.item() if isinstance(value, np.generic) else value


def method_from_json(content: Mapping[str, Any], folder: Path) -> Method:
    """The inverse of `method_to_json`, of content from elsewhere.

    Raises:
        AdapterError: An unknown method, or settings that it refuses.
    """
    name = content.get("name")
    cls = Method.registry.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(Method.registry))
        raise AdapterError(f"{folder}: this lora_jax has no method {name!r:.80}, only {known}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    del values["name"]
    patterns = [key for key in ("targets", "also_train") if isinstance(values.get(key), str)]
    if patterns:  # `resolved` writes paths, and a regular expression from elsewhere can run for ever
        raise AdapterError(f"{folder}: `{patterns[0]}` of the method must be a list of leaf paths.")
    try:
        return cls(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"{folder}: the description of the method {name} is not usable: {error}") from None


def node_to_json(node: AdaptedWeight) -> dict[str, object]:
    """A node without its arrays."""
    names = [field.name for field in dataclasses.fields(node)]
    settings = {name: getattr(node, name) for name in names if name not in ("base", *node.fields)}
    if not node.saved_as:
        raise AdapterError(f"A {type(node).__name__} can't be saved: give the class a name in `saved_as`.")
    return {"node": node.saved_as, **settings}


def node_class(path: str, content: object, folder: Path) -> type[AdaptedWeight]:
    """The class of a node in the description.

    Raises:
        AdapterError: A node that no method of this version makes.
    """
    name = content.get("node") if isinstance(content, dict) else None
    cls = AdaptedWeight.registry.get(name) if isinstance(name, str) else None
    if cls is None:
        raise AdapterError(f"{folder}: `{path}` is adapted in a way that this lora_jax does not know: {content!r:.80}.")
    return cls


def node_from_json(
    cls: type[AdaptedWeight], path: str, content: Mapping[str, Any], base: Leaf, folder: Path
) -> AdaptedWeight:
    """The node that `node_to_json` described, with no arrays but its base.

    Args:
        cls: Its class, see `node_class`.
        path: Its leaf path, for error messages.
        content: The description of the node.
        base: Its base; `None` if it has none.
        folder: The adapter's folder, for error messages.

    Raises:
        AdapterError: Axis labels that don't fit the base, or settings that aren't finite numbers or that it refuses.
    """
    values = {name: value for name, value in content.items() if name != "node"}
    axes = values.get("axes")
    length = None if base is None else len(base.shape)
    if not isinstance(axes, str) or set(axes) - {IN, OUT, STACK} or length not in (None, len(axes)):
        expected = "labels of an array" if base is None else f"the base's {shape_text(base)}"
        raise AdapterError(f"{folder}: the axis labels {axes!r:.80} of `{path}` do not fit {expected}.")
    numbers = {name: value for name, value in values.items() if name != "axes"}
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in numbers.values()):
        raise AdapterError(f"{folder}: `{path}` has settings that are no finite float32 numbers: {numbers!r:.200}.")
    try:
        return cls.bare(base, **values)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: the description of `{path}` does not fit {cls.__name__}: {error}") from None
