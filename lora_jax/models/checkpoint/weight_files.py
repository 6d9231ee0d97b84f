"""Finds and reads the tensors of a Hugging Face model folder: one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.files import FileError, TensorInfo, iter_safetensors, read_json, read_safetensors_header, within_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Located(NamedTuple):
    """A tensor's file, dtype and shape."""

    file: Path
    info: TensorInfo


def read_config(folder: Path) -> dict[str, object]:
    """The content of `config.json`.

    Raises:
        FileError: The file is missing, or isn't a JSON object.
    """
    config = read_json(within_folder(folder, "config.json"))
    if not isinstance(config, dict):
        raise FileError(f"{folder / 'config.json'} must be a JSON object, got {type(config).__name__}.")
    return config


def locate_tensors(folder: Path) -> dict[str, Located]:
    """Locates every tensor of the folder's checkpoint by the headers of its files.

    Raises:
        FileError: There is no safetensors file (a pickle is refused) or a malformed one, a link leads out of the
            folder, or the index names files outside it or tensors that aren't in the file it gives.
    """
    if (folder / WEIGHTS).exists():
        path = within_folder(folder, WEIGHTS)
        return {name: Located(path, info) for name, info in read_safetensors_header(path).items()}
    if (folder / INDEX).exists():
        return _locate_in_parts(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise FileError(
            f"{folder} has its weights only as a pickle ({', '.join(pickles[:3])}), which isn't read because it can "
            "run code. Save the model as safetensors: `AutoModel.from_pretrained(folder).save_pretrained(folder)` in "
            "transformers."
        )
    raise FileError(f"{folder} has no weights: neither `{WEIGHTS}` nor `{INDEX}`.")


def _locate_in_parts(folder: Path) -> dict[str, Located]:
    index = within_folder(folder, INDEX)
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(file, str) for file in parts.values()):
        raise FileError(f"{index} must have a `weight_map` from tensor names to file names.")
    files: dict[str, Path] = {}
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(parts.values())):
        if not file.endswith(".safetensors"):
            raise FileError(f"{index} must name safetensors files only, got {file!r:.200}.")
        files[file] = within_folder(folder, file)
        headers[file] = read_safetensors_header(files[file])  # raises for a missing file before the next is opened
    for name, file in parts.items():
        if name not in headers[file]:
            raise FileError(f"{index} says that {file} holds the tensor '{name}', but it doesn't.")
    return {name: Located(files[file], headers[file][name]) for name, file in parts.items()}


def read_tensors(tensors: Mapping[str, Located], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the named tensors one at a time, file by file."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(tensors[name].file, []).append(name)
    for file, wanted in by_file.items():
        yield from iter_safetensors(file, wanted)
