"""Splits a large checkpoint into files, and makes their index."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.errors import ArgumentError
from lora_jax.files import TensorInfo

from .weight_files import WEIGHTS

_PART = "model-{:05}-of-{:05}.safetensors"
_UNITS = {"": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@runtime_checkable
class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Tensor = TypeVar("_Tensor", bound=_Sized)


@dataclasses.dataclass(frozen=True, eq=False)
class HostTensor:
    """A leaf as a tensor of a checkpoint, moved to the host only when its values are read.

    Attributes:
        leaf: The array.
        layer: Index of the layer in a stacked leaf; `None` for the whole leaf.
        is_transposed: Whether the tensor is the transpose of the leaf.
    """

    leaf: jax.Array | np.ndarray
    layer: int | None = None
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.leaf.shape if self.layer is None else self.leaf.shape[1:])
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.leaf.dtype)

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.dtype, self.shape).nbytes

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        array = self.leaf if self.layer is None else self.leaf[self.layer]
        if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
            array = jnp.array(array, copy=True)  # JAX keeps the host copy of an array alive with it: use a copy
        host = np.asarray(array, dtype=dtype)
        return host.T if self.is_transposed else host


def size_in_bytes(size: int | str) -> int:
    """Parses a size: a number of bytes, or text such as `"5GB"`, in powers of 1,000 as in transformers.

    Raises:
        ValueError: The size is neither, or less than one byte.

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
            f'`max_shard_size` must be a positive number of bytes, or text such as "5GB" or "200MB", got {size!r:.50}.'
        )
    return count


def shard(tensors: Mapping[str, _Tensor], max_bytes: int) -> dict[str, dict[str, _Tensor]]:
    """Splits tensors into files: `{file: {name: tensor}}`. A tensor larger than `max_bytes` gets a file of its own.

    Args:
        tensors: Tensors by name.
        max_bytes: Maximum size of the tensors in a file, in bytes.

    Example:
        >>> list(shard({"a": np.zeros(2), "b": np.zeros(1)}, 20))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
        >>> list(shard({"a": np.zeros(2), "b": np.zeros(1)}, 24))
        ['model.safetensors']
    """
    parts: list[dict[str, _Tensor]] = [{}]
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


def total_size(files: Mapping[str, Mapping[str, _Sized]]) -> int:
    """Bytes of all tensors in the files from `shard`."""
    return sum(tensor.nbytes for part in files.values() for tensor in part.values())


def index(files: Mapping[str, Mapping[str, _Sized]]) -> dict[str, object]:
    """The content of `model.safetensors.index.json` for the files from `shard`."""
    file_of = {name: file for file, part in files.items() for name in part}
    return {"metadata": {"total_size": total_size(files)}, "weight_map": dict(sorted(file_of.items()))}


def is_weights_file(name: str) -> bool:
    """Whether a file has a name that `shard` or `index` gives, for any number of files.

    Example:
        >>> is_weights_file("model-00002-of-00003.safetensors"), is_weights_file("adapter_model.safetensors")
        (True, False)
    """
    return re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name) is not None
