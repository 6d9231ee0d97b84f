"""The files of a large checkpoint: which tensor goes where, and the index that says so."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import ArgumentError
from lora_jax.files import TensorInfo

from .weight_files import WEIGHTS

_PART = "model-{:05}-of-{:05}.safetensors"
_UNITS = {"": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True, eq=False)
class HostTensor:
    """A leaf as a tensor of a checkpoint, brought to the host when its values are asked for.

    Attributes:
        leaf: an array.
        layer: which part of a stacked leaf; `None` for the whole.
        is_transposed: whether the tensor is the transpose.
    """

    leaf: Any
    layer: int | None = None
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.leaf.shape if self.layer is None else self.leaf.shape[1:])
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> Any:
        return self.leaf.dtype

    @property
    def nbytes(self) -> int:
        return TensorInfo(np.dtype(self.dtype), self.shape).nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        array = self.leaf if self.layer is None else self.leaf[self.layer]
        if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
            array = jnp.array(array, copy=True)  # JAX keeps a host copy as long as its array: let it be this one's
        host = np.asarray(array, dtype=dtype)
        return host.T if self.is_transposed else host


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, or `"5GB"`, `"200MB"`, `"8kB"`: in powers of 1,000, as transformers has it.

    Raises:
        ValueError: neither, or none at all.

    Example:
        >>> size_in_bytes("1.5MB"), size_in_bytes(4096)
        (1500000, 4096)
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([kKMGT]?B)?", size) if isinstance(size, str) else None
    if match is not None:
        count = int(float(match[1]) * {**_UNITS, "B": 1}[match[2] or ""])
    else:
        count = size if type(size) is int else 0
    if count < 1:
        raise ArgumentError(
            f'`max_shard_size` must be a number of bytes, or such as "5GB" or "200MB", not {size!r:.50}.'
        )
    return count


def shard(tensors: Mapping[str, Any], max_bytes: int) -> dict[str, dict[str, Any]]:
    """`{file: {name: tensor}}`: one file, or several of `max_bytes` at most, a tensor that is larger in one of its own.

    Args:
        tensors: with `nbytes`.
        max_bytes: of the tensors of a file.

    Example:
        >>> list(shard({"a": np.zeros(2), "b": np.zeros(1)}, 20))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
        >>> list(shard({"a": np.zeros(2), "b": np.zeros(1)}, 24))
        ['model.safetensors']
    """
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {_PART.format(number, len(parts)): part for number, part in enumerate(parts, start=1)}


def index(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    total = sum(tensor.nbytes for part in files.values() for tensor in part.values())
    places = {name: file for file, part in files.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def is_weights_file(name: str) -> bool:
    """Whether a folder's file is one that `shard` or `index` gives, of however many parts.

    Example:
        >>> is_weights_file("model-00002-of-00003.safetensors"), is_weights_file("adapter_model.safetensors")
        (True, False)
    """
    return re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name) is not None
