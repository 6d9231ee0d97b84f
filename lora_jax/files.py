"""Safe reading and atomic writing: safetensors, JSON, names inside a folder.

A file from elsewhere is a claim, not a fact: nothing is allocated before its sizes have been held against the file's
own length, and nothing is ever unpickled. A file written here is either whole or not there: an interruption at any
moment leaves the earlier one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# The format's own limit on the length of a header (github.com/huggingface/safetensors, "Format").
MAX_HEADER_BYTES = 100_000_000

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
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileError(ValueError):
    """A file that cannot be read or written; the message names the file, what is wrong with it, and the way out."""


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # in bytes, from the start of the file
    size: int  # in bytes


class _Header(NamedTuple):
    entries: dict[str, _Entry]
    metadata: dict[str, str]


# ---------------------------------------------------------------------------------------------- safetensors, reading


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The names, dtypes and shapes in a safetensors file; reads no tensor.

    Args:
        path: the file.

    Returns:
        `{name: TensorInfo(dtype, shape)}`, in the order of the header.

    Raises:
        FileError: the file is missing, is no safetensors file (a pickle, a Git LFS pointer), is truncated, or its
            header contradicts itself or the file's length.
    """
    path = Path(path)
    with _open(path) as file:
        entries = _read_header(file, path).entries
    return {name: TensorInfo(entry.dtype, entry.shape) for name, entry in entries.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, `{}` if it has none. Raises as `read_safetensors_header`."""
    path = Path(path)
    with _open(path) as file:
        return _read_header(file, path).metadata


def read_safetensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Reads tensors of a safetensors file into memory.

    Args:
        path: the file.
        names: the tensors to read; all of them if `None`.

    Returns:
        `{name: array}`, in the order of `names` or of the header; bfloat16 and float8 as `ml_dtypes`.

    Raises:
        FileError: as `read_safetensors_header`; or a name that the file doesn't hold.
    """
    return dict(iter_safetensors(path, names))


def iter_safetensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """`read_safetensors`, one tensor at a time: the caller decides how many are in memory at once."""
    path = Path(path)
    with _open(path) as file:
        entries = _read_header(file, path).entries
        wanted = list(entries) if names is None else list(names)
        if absent := [name for name in wanted if name not in entries]:
            raise FileError(f"{path} holds no tensor named {_some(absent)}; it holds {_some(entries)}.")
        for name in wanted:
            dtype, shape, start, size = entries[name]
            flat = np.empty(size, np.uint8)
            file.seek(start)
            if file.readinto(flat.data) != size:
                raise FileError(f"{path} ended inside tensor '{name}': it was changed while being read. Read it again.")
            yield name, flat.view(dtype).reshape(shape)


def _read_header(file: BufferedReader, path: Path) -> _Header:
    length = os.fstat(file.fileno()).st_size
    start = file.read(8)
    _refuse_other_formats(start, path)
    if length < 8:
        raise FileError(f"{path} is no safetensors file: it has {length} bytes, and the header alone needs 8 or more.")
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > MAX_HEADER_BYTES or header_bytes > length - 8:
        raise FileError(
            f"{path} claims a header of {header_bytes:,} bytes, but the file has {length:,} (and the format allows "
            f"{MAX_HEADER_BYTES:,}): it is truncated or is no safetensors file. Fetch or save it again."
        )
    raw = _parse_json(file.read(header_bytes), path, what="its header")
    if not isinstance(raw, dict):
        raise FileError(f"{path}: the header must be a JSON object, and it is a {type(raw).__name__}.")
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{path}: `__metadata__` must map strings to strings.")
    entries = {name: _check_entry(name, entry, 8 + header_bytes, length, path) for name, entry in raw.items()}
    _check_layout(entries, 8 + header_bytes, length, path)
    return _Header(entries, metadata)


def _refuse_other_formats(start: bytes, path: Path) -> None:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[2:] != bytes(6):
        raise FileError(
            f"{path} is a pickle (a PyTorch `.bin` or `.pt`), which can run code when it is read, so it isn't. Save "
            "the model as safetensors: `AutoModel.from_pretrained(...).save_pretrained(folder)` in transformers."
        )
    if start.startswith(b"version "):
        raise FileError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from.")


def _check_entry(name: str, entry: object, data_start: int, length: int, path: Path) -> _Entry:
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FileError(f"{where} must have `dtype`, `shape` and `data_offsets` in the header, and has {entry!r:.200}.")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise FileError(f"{where} has the unknown dtype {dtype_name!r:.50}; known are {', '.join(_DTYPES)}.")
    if not _is_sizes(shape):
        raise FileError(f"{where} has the shape {shape!r:.200}, which is no list of sizes.")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise FileError(f"{where} has `data_offsets` {offsets!r:.200}, which is no pair of offsets.")
    dtype = _DTYPES[dtype_name]
    begin, end = offsets
    if begin > end or end > length - data_start:
        raise FileError(
            f"{where} lies at bytes {begin:,} to {end:,} of the data, and the file has {length - data_start:,} bytes "
            "of data: it is truncated or corrupt. Fetch or save it again."
        )
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin:
        raise FileError(
            f"{where} of shape {tuple(shape)!r:.200} and dtype {dtype_name} needs {needed:,} bytes, and the header "
            f"gives it {end - begin:,}: the file is corrupt. Fetch or save it again."
        )
    if math.prod(size or 1 for size in shape) > 2**48:  # empty, yet of a shape that no array can have
        raise FileError(f"{where} has the shape {shape!r:.200}, which is no honest one.")
    return _Entry(dtype, tuple(shape), data_start + begin, needed)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_layout(entries: Mapping[str, _Entry], data_start: int, length: int, path: Path) -> None:
    """The format wants the data contiguous: no two tensors share a byte, and no byte belongs to none."""
    position, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            wrong = "overlap" if entry.start < position else "leave a gap"
            raise FileError(
                f"{path}: {before} and tensor '{name}' {wrong} in the data: it is corrupt. Fetch or save it again."
            )
        position, before = entry.start + entry.size, f"tensor '{name}'"
    if position != length:
        raise FileError(f"{path} has {length - position:,} bytes after its last tensor: it is corrupt. Fetch it again.")


# ---------------------------------------------------------------------------------------------- safetensors, writing


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically; equal tensors and metadata give equal bytes.

    Args:
        path: the file; its folder must exist.
        tensors: `{name: array}`, NumPy or JAX; copied to the host one at a time.
        metadata: strings to keep in the header.

    Raises:
        FileError: a dtype that the format lacks, or a full disk. An earlier file at `path` is then as it was.

    **Deviations.** The `safetensors` package writes several metadata entries in a random order; here they are sorted.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    if "__metadata__" in tensors:
        raise FileError(f"{path}: `__metadata__` is no tensor name; pass it as `metadata`.")
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise FileError(f"{path}: `metadata` must map strings to strings, and has {name!r}: {value!r:.100}.")
    dtypes = {name: _storable_dtype(name, tensor, path) for name, tensor in tensors.items()}

    # Wide dtypes first, so that every tensor lies on a multiple of its own item size.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        shape = tuple(tensors[name].shape)
        size = math.prod(shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file: BufferedWriter) -> None:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in order:
            array = np.asarray(tensors[name], dtype=dtypes[name], order="C")
            file.write(array.reshape(-1).view(np.uint8).data)

    _write_atomically(path, write, needed=8 + len(encoded) + offset)


def _storable_dtype(name: str, tensor: Any, path: Path) -> np.dtype:
    # JAX's extended dtypes (random keys) are no NumPy dtypes.
    if isinstance(tensor.dtype, np.dtype) and (dtype := tensor.dtype.newbyteorder("<")) in _DTYPE_NAMES:
        return dtype
    raise FileError(f"{path}: tensor '{name}' has dtype {tensor.dtype}, which safetensors can't hold: convert it.")


# ------------------------------------------------------------------------------------------------------ text and JSON


def read_json(path: str | os.PathLike[str], *, max_bytes: int = 64 * 2**20) -> Any:
    """Reads a JSON file of at most `max_bytes`.

    Raises:
        FileError: the file is missing, too large, not UTF-8 or not JSON (with the line and column).
    """
    path = Path(path)
    with _open(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > max_bytes:
            raise FileError(f"{path} has {length:,} bytes, and a JSON file of at most {max_bytes:,} is expected here.")
        return _parse_json(file.read(), path, what="the file")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; a NaN or an infinity, which JSON lacks, is refused."""
    try:
        text = json.dumps(obj, ensure_ascii=False, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: this can't be written as JSON: {error}") from error
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    data = text.encode()
    _write_atomically(Path(path), lambda file: file.write(data), needed=len(data))


def _parse_json(data: bytes, path: Path, *, what: str) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: {what} is not UTF-8 (byte {error.start:,}): it is corrupt or another format."
        ) from None
    except json.JSONDecodeError as error:
        raise FileError(
            f"{path}: {what} is not JSON ({error.msg}, line {error.lineno}, column {error.colno}): it is corrupt or "
            "another format."
        ) from None
    except RecursionError:
        raise FileError(f"{path}: {what} is JSON nested too deeply to be honest.") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise FileError(f"{path}: {what} is not JSON that can be read: {error}.") from None


# ----------------------------------------------------------------------------------------------- names, sums, opening


def safe_join(folder: str | os.PathLike[str], name: str, *, links_within: str | os.PathLike[str] | None = None) -> Path:
    """`folder / name`, where `name` comes out of a file and must stay inside the folder.

    Args:
        folder: the folder.
        name: a relative name with forward slashes.
        links_within: how far out symbolic links may lead; `folder` itself if `None`. (A Hugging Face cache keeps
            links to `blobs`, two levels up.)

    Raises:
        FileError: an empty or absolute name, one with `..`, a backslash, a drive or a NUL, or a link that leads out.

    Example:
        >>> safe_join("/models", "../etc/passwd")
        Traceback (most recent call last):
        ...
        lora_jax.files.FileError: The name '../etc/passwd' would leave /models: a name inside the folder is expected.
    """
    folder = Path(folder)
    bad = (
        not isinstance(name, str)
        or not name
        or "\\" in name
        or "\0" in name
        or name.startswith("/")
        or bool(PureWindowsPath(name).drive)
        or ".." in PurePosixPath(name).parts
    )
    if bad:
        raise FileError(f"The name {name!r:.200} would leave {folder}: a name inside the folder is expected.")
    path = folder / name
    limit = Path(links_within) if links_within is not None else folder
    if not path.resolve().is_relative_to(limit.resolve()):
        raise FileError(f"The name {name!r:.200} is a link that leaves {limit}: put the file itself into the folder.")
    return path


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with _open(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> BufferedReader:
    if path.is_dir():
        raise FileError(f"{path} is a folder, and a file is expected here.")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FileError(f"{path} doesn't exist.") from None
    except OSError as error:
        raise FileError(f"{path} can't be opened: {error.strerror}.") from error


def _write_atomically(path: Path, write: Callable[[BufferedWriter], object], *, needed: int) -> None:
    # In the same folder, so that `os.replace` stays within one file system; not `tempfile`, whose files are 0600
    # whatever the umask.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explain_write_error(error, path, needed) from error
        raise
    _sync_folder(path.parent)


def _explain_write_error(error: OSError, path: Path, needed: int) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError(
            f"{path} needs {needed:,} bytes, and the disk (or the quota) is full. Nothing was changed: free some space "
            "and save again."
        )
    if error.errno == errno.ENOENT:
        return FileError(f"{path} can't be written: the folder {path.parent} doesn't exist. Make it first.")
    return FileError(f"{path} can't be written: {error.strerror}. Nothing was changed.")


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the file system has a way to (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "") if names else "nothing"
