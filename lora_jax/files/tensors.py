"""Safetensors files: the header is checked against the file before a tensor is read, and nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from ..text import listed
from .json_files import RepeatedNameError, count_values, unique_names
from .reading import FileError, open_regular
from .writing import write_atomically

# By the format's names; those that NumPy (with `ml_dtypes`) and JAX both have.
_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_QUOTED = "'{}'"
_LARGEST_HEADER = 100_000_000  # bytes; `safetensors` reads no more either


class ArrayLike(Protocol):
    """What can be written as a tensor: an array of NumPy's or JAX's, or what becomes one when its values are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...

    def __array__(self) -> np.ndarray: ...


class _Slice(Protocol):
    """A tensor that isn't read yet, as `safetensors` gives it."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class TensorInfo(NamedTuple):
    """A tensor according to a safetensors header."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The names, dtypes and shapes in a safetensors file; reads no tensor.

    Raises:
        FileError: The file is missing, truncated, corrupt, or of another format; a pickle is refused unread.
    """
    with _open_safetensors(Path(path)) as file:
        return {name: _tensor_info(Path(path), name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118, no dict


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, `{}` if it has none. Raises as `read_safetensors_header`."""
    with _open_safetensors(Path(path)) as file:
        return dict(file.metadata() or {})


def read_safetensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Reads tensors of a safetensors file into memory.

    Args:
        path: The file.
        names: Names of the tensors to read; all of them if `None`.

    Returns:
        `{name: array}`, in the order of `names` or of the file; bfloat16 as `ml_dtypes`.

    Raises:
        FileError: See `read_safetensors_header`; or a name that the file doesn't hold.
    """
    return dict(iter_safetensors(path, names))


def iter_safetensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """`read_safetensors`, one tensor at a time: the caller decides how many are in memory at once."""
    path = Path(path)
    with _open_safetensors(path) as file:
        held = dict.fromkeys(file.keys())
        wanted = list(held if names is None else names)
        if absent := [name for name in wanted if name not in held]:
            raise FileError(
                f"{path} holds no tensor named {listed(absent, form=_QUOTED)}; "
                f"it holds {listed(held, form=_QUOTED) or 'nothing'}."
            )
        for name in wanted:
            info = _tensor_info(path, name, file.get_slice(name))
            try:
                yield name, file.get_tensor(name)
            except ValueError as error:  # empty, yet of a shape that no array can have
                raise FileError(f"{path}: tensor '{name}' of shape {info.shape} can't be read: {error}.") from error


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[safetensors.safe_open]:
    """`safetensors` checks the header against the file; this refuses other formats first, and says why."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        start = file.read(8)
        claimed = int.from_bytes(start, "little")
        _refuse_repeated_names(path, file.read(claimed) if claimed <= min(length - 8, _LARGEST_HEADER) else b"")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[2:] != bytes(6):
        raise FileError(
            f"{path} is a pickle (a PyTorch `.bin` or `.pt`), which can run code when it is read, so it isn't. Save "
            "the model as safetensors: `AutoModel.from_pretrained(...).save_pretrained(folder)` in transformers."
        )
    if start.startswith(b"version "):
        raise FileError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from.")
    if length < 8 or claimed > length - 8:
        raise FileError(
            f"{path} is truncated or no safetensors file: it claims a header of {claimed:,} bytes, and has {length:,} "
            "in all. Fetch or save it again."
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise FileError(f"{path} is no whole safetensors file ({error}). Fetch or save it again.") from error


def _refuse_repeated_names(path: Path, header: bytes) -> None:
    """`safetensors` takes the last of two entries of one name, other readers the first: neither is to be trusted."""
    count_values(header, f"{path}: the header")
    try:
        json.loads(header.decode(), object_pairs_hook=unique_names)
    except RepeatedNameError as error:
        raise FileError(f"{path} has two entries named '{error}' in its header. Fetch or save it again.") from None
    except (ValueError, RecursionError):
        pass  # `safetensors` reports what else is wrong


def _tensor_info(path: Path, name: str, tensor: _Slice) -> TensorInfo:
    if (dtype := tensor.get_dtype()) not in _DTYPES:
        raise FileError(f"{path}: tensor '{name}' has dtype {dtype}, and one of {', '.join(_DTYPES)} is expected.")
    return TensorInfo(_DTYPES[dtype], tuple(tensor.get_shape()))


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] | None = None,
    *,
    written: Callable[[int], None] | None = None,
) -> None:
    """Writes a safetensors file, atomically; equal tensors give equal bytes.

    The `safetensors` package builds a file in memory. This needs memory for one tensor at a time.

    Args:
        path: The file; its folder must exist.
        tensors: `{name: array}`; an array's values are asked for when it is written.
        metadata: Strings to keep in the header.
        written: Called with the number of bytes after each tensor.

    Raises:
        FileError: A dtype that the format lacks, or a full disk. An earlier file at `path` is then unchanged.
    """
    path = Path(path)
    if "__metadata__" in tensors:
        raise FileError(f"{path}: `__metadata__` is no tensor name; pass it as `metadata`.")
    dtypes = {name: _storable_dtype(path, name, tensor) for name, tensor in tensors.items()}
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise FileError(f"{path}: `metadata` must map strings to strings, not {metadata!r:.200}.")
    # The widest first, so that every tensor starts at a multiple of its dtype's size.
    infos = {name: TensorInfo(dtypes[name], tuple(tensors[name].shape)) for name in tensors}
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header = _header({name: infos[name] for name in order}, metadata)

    def write(file: BufferedWriter) -> None:
        file.write(header)
        for name in order:
            array = np.asarray(tensors[name], dtype=dtypes[name], order="C")
            if array.shape != infos[name].shape:
                raise FileError(f"{path}: tensor '{name}' has values of shape {array.shape}, not {infos[name].shape}.")
            file.write(array.reshape(-1).view(np.uint8).data)  # NumPy hands out no bfloat16 as a buffer
            if written is not None:
                written(array.nbytes)

    write_atomically(path, write, needed=len(header) + sum(info.nbytes for info in infos.values()))


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, info in infos.items():
        end = begin + info.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _storable_dtype(path: Path, name: str, tensor: ArrayLike) -> np.dtype:
    # JAX's extended dtypes (random keys) are no NumPy dtypes.
    if isinstance(tensor.dtype, np.dtype) and (dtype := tensor.dtype.newbyteorder("<")) in _DTYPES.values():
        return dtype
    raise FileError(f"{path}: tensor '{name}' has dtype {tensor.dtype}, which safetensors can't hold: convert it.")
