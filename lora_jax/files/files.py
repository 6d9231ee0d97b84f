"""Safe reading and atomic writing: safetensors, JSON, names inside a folder.

A file from elsewhere is a claim, not a fact: no tensor is read before the header has been held against the file's own
length, and nothing is ever unpickled. A file written here is either whole or not there: an interruption at any
moment leaves the earlier one as it was. So are the files of a folder that belong together, see `replacing`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from ..errors import LoraJaxError
from ..text import clipped
from .locks import BusyError, in_use, is_abandoned, locked

Result = TypeVar("Result")

# By the names that the format gives them; those that NumPy (with `ml_dtypes`) and JAX both have.
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

# More than this `safetensors` does not read either.
_LARGEST_HEADER = 100_000_000
# Of a JSON file: what is a byte or two there takes up to seventy of memory.
_MOST_VALUES = 4_000_000
_DEEPEST = 100  # levels of JSON


class FileError(LoraJaxError):
    """A file that cannot be read or written; the message names the file, what is wrong with it, and the way out."""


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The names, dtypes and shapes in a safetensors file; reads no tensor.

    Args:
        path: the file.

    Raises:
        FileError: the file is missing, truncated, corrupt, or of another format; a pickle is refused unread.
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
        path: the file.
        names: the tensors to read; all of them if `None`.

    Returns:
        `{name: array}`, in the order of `names` or of the file; bfloat16 as `ml_dtypes`.

    Raises:
        FileError: as `read_safetensors_header`; or a name that the file doesn't hold.
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
            raise FileError(f"{path} holds no tensor named {_some(absent)}; it holds {_some(held)}.")
        for name in wanted:
            info = _tensor_info(path, name, file.get_slice(name))
            try:
                yield name, file.get_tensor(name)
            except ValueError as error:  # empty, yet of a shape that no array can have
                raise FileError(f"{path}: tensor '{name}' of shape {info.shape} can't be read: {error}.") from error


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """`safetensors` checks the header against the file before it gives anything out; this adds which file, and why."""
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
    _count_values(header, f"{path}: the header")
    try:
        json.loads(header.decode(), object_pairs_hook=_once_each)
    except _RepeatedName as error:
        raise FileError(f"{path} has two entries named '{error}' in its header. Fetch or save it again.") from None
    except (ValueError, RecursionError):
        pass  # what is wrong with it otherwise, `safetensors` says


def _tensor_info(path: Path, name: str, tensor: Any) -> TensorInfo:
    if (dtype := tensor.get_dtype()) not in _DTYPES:
        raise FileError(f"{path}: tensor '{name}' has dtype {dtype}, and one of {', '.join(_DTYPES)} is expected.")
    return TensorInfo(_DTYPES[dtype], tuple(tensor.get_shape()))


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    written: Callable[[int], None] | None = None,
) -> None:
    """Writes a safetensors file, atomically; equal tensors give equal bytes.

    The `safetensors` package puts a file together in memory. This takes memory for one tensor at a time.

    Args:
        path: the file; its folder must exist.
        tensors: `{name: array}`: NumPy's, JAX's, or anything with `shape`, `dtype` and `__array__`, which is asked for
            its values when it is its turn.
        metadata: strings to keep in the header.
        written: called with the bytes of each tensor after it is written.

    Raises:
        FileError: a dtype that the format lacks, or a full disk. An earlier file at `path` is then as it was.
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

    _write_atomically(path, write, needed=len(header) + sum(info.nbytes for info in infos.values()))


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, info in infos.items():
        end = begin + info.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _storable_dtype(path: Path, name: str, tensor: Any) -> np.dtype:
    # JAX's extended dtypes (random keys) are no NumPy dtypes.
    if isinstance(tensor.dtype, np.dtype) and (dtype := tensor.dtype.newbyteorder("<")) in _DTYPES.values():
        return dtype
    raise FileError(f"{path}: tensor '{name}' has dtype {tensor.dtype}, which safetensors can't hold: convert it.")


# ------------------------------------------------------------------------------------------------------ text and JSON


def read_json(path: str | os.PathLike[str], *, max_bytes: int = 64 * 2**20) -> Any:
    """Reads a JSON file of at most `max_bytes`.

    Raises:
        FileError: the file is missing, no regular file, too large, not UTF-8 or not JSON (with the line and column).
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes, kind="a JSON file"), f"{path}: the file")


def read_text(path: str | os.PathLike[str], *, max_bytes: int) -> str:
    """Reads a text file in UTF-8, of at most `max_bytes`.

    Raises:
        FileError: as `read_bytes`; or not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 (byte {error.start:,}): it is corrupt or another format.") from None


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int, kind: str = "a file") -> bytes:
    """Reads a file of at most `max_bytes`; `kind` is what a message calls it.

    Raises:
        FileError: the file is missing, too large, or no regular file: a folder, a pipe, a device.
    """
    path = Path(path)
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > max_bytes:
            raise FileError(f"{path} has {length:,} bytes, and {kind} of at most {max_bytes:,} is expected here.")
        return file.read(length)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; a NaN or an infinity, which JSON lacks, is refused."""
    try:
        text = json.dumps(obj, ensure_ascii=False, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: this can't be written as JSON: {error}") from error
    write_text(path, text + "\n")


CHECKSUM = "checksum"


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with an entry `checksum` over all others: for what is written here and read back.

    It tells damage and changes by hand; it is no security check, since anybody can compute it.

    Example:
        >>> with_checksum({"rank": 8})["checksum"][:20]
        'sha256:fd6fa1f57597d'
    """
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, CHECKSUM: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


def without_checksum(content: Mapping[str, Any], where: str | os.PathLike[str]) -> dict[str, Any]:
    """What `with_checksum` was given; an object without a checksum, as earlier versions wrote it, is taken as it is.

    Args:
        content: The object as it was read.
        where: The file, and the place in it, for the message.

    Raises:
        FileError: The checksum is of other content.
    """
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    if CHECKSUM in content and content[CHECKSUM] != with_checksum(rest)[CHECKSUM]:
        raise FileError(
            f"{os.fspath(where)} isn't what its `{CHECKSUM}` was written for: it is damaged, or was changed by hand. "
            f"Put back the original; or, if the change is meant, remove the entry `{CHECKSUM}`."
        )
    return rest


def array_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of arrays on the host: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically; half a character, which that has no place for, is refused."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: this can't be written as UTF-8: {error}") from error
    _write_atomically(Path(path), lambda file: file.write(data), needed=len(data))


def parse_json(data: bytes | str, what: str) -> Any:
    """JSON from elsewhere: entries twice, half a character, too many values or levels, endless numbers are refused.

    Args:
        data: the JSON.
        what: what it is, for messages: `"table.jsonl, line 3"`.

    Raises:
        FileError: it can't be read; the message begins with `what`.

    Example:
        >>> parse_json('{"rank": 4, "rank": 8}', "method.json")
        Traceback (most recent call last):
        ...
        lora_jax.files.FileError: method.json has two entries named 'rank', and one of each name is expected.
    """
    count = _count_values(data, what)
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_once_each)
        if count > _DEEPEST and _is_deep(value):
            raise RecursionError
        if _ESCAPED_HALF.search(text):  # of a pair, as a rule
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except _RepeatedName as error:
        raise FileError(f"{what} has two entries named '{error}', and one of each name is expected.") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8 (byte {error.start:,}): it is corrupt or another format.") from None
    except UnicodeEncodeError:
        raise FileError(f"{what} has half a character, which no text can hold: it is corrupt.") from None
    except json.JSONDecodeError as error:
        raise FileError(
            f"{what} is not JSON ({error.msg}, line {error.lineno}, column {error.colno}): it is corrupt or "
            "another format."
        ) from None
    except RecursionError:
        raise FileError(f"{what} is JSON nested too deeply to be honest.") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise FileError(f"{what} is not JSON that can be read: {error}.") from None


def _count_values(data: bytes | str, what: str) -> int:
    """Before they are made: each value but the first comes after one of these, which are counted in no time."""
    marks = (b",", b"[", b"{") if isinstance(data, bytes) else (",", "[", "{")
    if (count := sum(data.count(mark) for mark in marks)) > _MOST_VALUES:  # pyright: ignore[reportArgumentType]
        raise FileError(f"{what} is JSON of some {count:,} values, and at most {_MOST_VALUES:,} are expected.")
    return count


def _is_deep(value: Any) -> bool:
    """Deeper than what takes a call a level, `repr` for one, can follow."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        level = [child for entry in containers for child in (entry.values() if isinstance(entry, dict) else entry)]
        if not level:
            return False
    return True


_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _RepeatedName(Exception):
    """Of an entry in a JSON object. No `ValueError`, as which it would pass for malformed JSON."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise _RepeatedName(f"{name:.200}")
        names[name] = value
    return names


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
    if not _resolved(path).is_relative_to(_resolved(limit)):
        raise FileError(f"The name {name!r:.200} is a link that leaves {limit}: put the file itself into the folder.")
    return path


def within_folder(folder: str | os.PathLike[str], name: str) -> Path:
    """`safe_join` for a model folder, which may be a Hugging Face cache's: its files are links to `blobs`, two up.

    Files that were fetched into another folder may be links into such a cache as well.
    """
    folder = Path(folder)
    real = _resolved(folder)
    target = _resolved(folder / name) if isinstance(name, str) and "\0" not in name else folder
    if real.parent.name == "snapshots":
        return safe_join(folder, name, links_within=real.parent.parent)
    is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return safe_join(folder, name, links_within=target.parent if is_blob and (folder / name).is_symlink() else folder)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # Python before 3.13 has the latter
        raise FileError(f"{path} is a link that leads to itself: put the file itself there.") from None


# ------------------------------------------------------------------------------------ files that belong together
#
# A write goes into a folder of its own, `.writing-…`, inside the folder that it is for. Its name becomes `.written-…`
# when every file in it is whole: with that one rename the new files are those of the folder, and it is left to move
# them to their places, by the writer, or by whoever reads or writes there next if that one was killed. One writer at a
# time holds the folder's lock, so what another `.writing-…` holds was left by a kill.

_WRITING, _WRITTEN, _LOCK, _PLAN = ".writing-", ".written-", ".lora_jax.lock", ".plan.json"
_PATIENCE = 300.0  # seconds that a writer or a reader waits for another writer
_TRIES = 200  # of a reader that meets one writer after the other
_TOKEN = "[0-9a-f]{12}"  # in a temporary name, of `secrets.token_hex(6)`


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str],
    names: Sequence[str],
    *,
    obsolete: Callable[[str], bool] | None = None,
    read_elsewhere: bool = True,
    what: str = "files",
) -> Iterator[Path]:
    """A new folder to write the files `names` in; at the end of the block they take their places in `folder`.

    Killed at any moment, it leaves the earlier files or the new ones, whole: readers here begin with `settle`, which
    moves what was complete and not in its place yet. Writers of one folder wait for each other.

    Args:
        folder: made if it doesn't exist.
        names: of the files that the block writes.
        obsolete: tells by its name a file of an earlier write that would be read beside or before the new ones: it
            goes.
        read_elsewhere: whether others' programs read the folder, which know nothing of `settle`. The last of `names`
            is the one that they begin with: it goes first and comes last, so that a kill in between leaves them a
            folder that doesn't load, rather than files of two writes.
        what: the folder holds, for messages.

    Raises:
        FileError: `folder` cannot be made, or cannot hold files; or another is writing there, and doesn't end.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_hold(folder, what, error) from error
    with _alone(folder) as is_alone:
        _place_all(folder)
        if is_alone:
            _remove_left(folder, _WRITING)
        staging = folder / f"{_WRITING}{secrets.token_hex(4)}"
        try:
            staging.mkdir()
        except OSError as error:
            raise _cannot_hold(folder, what, error) from error
        try:
            yield staging
            held = [entry.name for entry in os.scandir(folder)] if obsolete is not None else []
            gone = [name for name in held if obsolete is not None and name not in names and obsolete(name)]
            write_json(staging / _PLAN, {"names": list(names), "obsolete": gone, "read_elsewhere": read_elsewhere})
            written = folder / staging.name.replace(_WRITING, _WRITTEN)
            os.rename(staging, written)
            _sync_folder(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        try:
            _place(written, folder)
        except BaseException as error:
            if not read_elsewhere and not gone:
                _withdraw(written, staging, names)
            if isinstance(error, OSError):
                raise FileError(f"{folder} can't be written: {error.strerror}.") from error
            raise


def _cannot_hold(folder: Path, what: str, error: OSError) -> FileError:
    return FileError(f"{folder} cannot hold {what}: {error.strerror}. Choose another folder.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    with contextlib.ExitStack() as stack:
        try:
            is_alone = stack.enter_context(locked(folder / _LOCK, seconds=_PATIENCE))
        except BusyError as holder:
            raise FileError(f"{folder} is being written by {holder}. Wait for it, or choose another folder.") from None
        yield is_alone


def _place(written: Path, folder: Path) -> None:
    """Moves the files of a whole write to their places; what has been moved before stays there."""
    if not (written / _PLAN).exists():  # it goes last: all is in its place
        shutil.rmtree(written, ignore_errors=True)
        return
    plan = _read_plan(written)
    *_, last = names = plan["names"]
    if plan["read_elsewhere"] and (written / last).exists():
        (folder / last).unlink(missing_ok=True)
    for name in plan["obsolete"]:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(written / name, folder / name)
    _sync_folder(folder)
    shutil.rmtree(written, ignore_errors=True)


def _read_plan(written: Path) -> dict[str, Any]:
    plan = read_json(written / _PLAN)
    names = [name for part in ("names", "obsolete") for name in plan[part]] if _is_plan(plan) else None
    if not names or not all(isinstance(name, str) and _is_plain_name(name) for name in names):
        raise FileError(f"{written / _PLAN} is no plan of a write. Remove the folder {written}.")
    return plan


def _is_plan(plan: Any) -> bool:
    kinds = {"names": list, "obsolete": list, "read_elsewhere": bool}
    return isinstance(plan, dict) and all(isinstance(plan.get(name), kind) for name, kind in kinds.items())


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..", _LOCK) and not any(part in name for part in "/\\\0")


def _withdraw(written: Path, staging: Path, names: Sequence[str]) -> None:
    """Takes back a write that was interrupted, by no kill, before any of it was in its place."""
    if all((written / name).exists() for name in names):
        with contextlib.suppress(OSError):
            os.rename(written, staging)
            shutil.rmtree(staging, ignore_errors=True)


def settle(folder: str | os.PathLike[str]) -> None:
    """Moves the files of a write that was killed when it was whole to their places: what a reader begins with.

    Raises:
        FileError: they can't be moved; or another is writing there, and doesn't end.
    """
    folder = Path(folder)
    if not _waiting(folder):
        return
    with _alone(folder):
        _place_all(folder)


def _place_all(folder: Path) -> None:
    for written in _waiting(folder):
        try:
            _place(written, folder)
        except FileNotFoundError:
            continue  # another has, where there are no locks
        except OSError as error:
            raise FileError(
                f"{folder}: the writer of its files was killed, and those in {written.name}, which are whole, can't be "
                f"moved to their places: {error.strerror}. Make the folder writable."
            ) from error


def _waiting(folder: Path) -> list[Path]:
    return _folders_in(folder, _WRITTEN)


def _folders_in(folder: Path, prefix: str, suffix: str = "", middle: str = ".*") -> list[Path]:
    """No links, which lead elsewhere.

    Args:
        folder: that they are in.
        prefix, suffix: of their names.
        middle: what stands between, as a regular expression: `.out.` begins the names of what is written for `out.v2`.
    """
    name = re.compile(f"{re.escape(prefix)}{middle}{re.escape(suffix)}", re.DOTALL)
    try:
        with os.scandir(folder) as entries:
            return sorted(
                Path(entry.path)
                for entry in entries
                if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except OSError:
        return []


def _remove_left(folder: Path, prefix: str, suffix: str = "", middle: str = ".*") -> None:
    """Removes what killed writers left, while the lock is held."""
    for left in _folders_in(folder, prefix, suffix, middle):
        shutil.rmtree(left, ignore_errors=True)


def read_together(
    folder: str | os.PathLike[str], names: Sequence[str], read: Callable[[], Result], *, tries: int = _TRIES
) -> Result:
    """What `read()` gives of files that belong together, all of one write: read again where another takes its place.

    Args:
        folder: that holds them.
        names: of the files.
        read: reads them.
        tries: before a folder that is written over and over is given up.

    Raises:
        FileError: see `settle`; or the folder never comes to rest.
    """
    folder = Path(folder)
    for _ in range(tries):
        settle(folder)
        before = _states(folder, names)
        try:
            result = read()
        except Exception:
            if _states(folder, names) == before and not _waiting(folder):
                raise
            continue
        if _states(folder, names) == before:
            return result
    raise FileError(f"{folder} is written over and over: it can't be read. Stop the writers.")


def _states(folder: Path, names: Sequence[str]) -> list[tuple[int, ...] | None]:
    return [_state(folder / name) for name in names]


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def require_new_folder(folder: str | os.PathLike[str], argument: str) -> None:
    """Refuses a folder that holds anything, so that nobody's files are overwritten.

    Raises:
        FileError: it isn't new or empty; the message names `argument`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"`{argument}` {folder} isn't a new or empty folder: choose another.")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], argument: str) -> Iterator[Path]:
    """A folder beside `folder` to write in, which takes its place at the end of the block: whole, or not there.

    What a killed write left beside it goes with the next one.

    Raises:
        FileError: `folder` isn't new or empty, or can't be made; or another is writing it.
    """
    require_new_folder(folder, argument)
    folder = Path(folder).resolve()
    before, after = f".{folder.name}.", ".tmp"
    staging = folder.with_name(f"{before}{secrets.token_hex(6)}{after}")
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(locked(folder.with_name(f".{folder.name}{_LOCK}"))):
                _remove_left(folder.parent, before, after, _TOKEN)
            staging.mkdir()
        except BusyError as holder:
            raise FileError(f"`{argument}` {folder} is being written by {holder}: choose another folder.") from None
        except OSError as error:
            raise FileError(f"`{argument}` {folder} can't be made: {error.strerror}. Choose another folder.") from error
        try:
            yield staging
            require_new_folder(folder, argument)
            if folder.exists():
                folder.rmdir()
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _sync_folder(folder.parent)


@contextlib.contextmanager
def plainly_named(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name of a file or folder, for the block, without the characters that some libraries read as patterns (`[1]`,
    `*`) or schemes (`gs:`, `::`): a link to it, if its own has any.

    Raises:
        OSError: links can't be made, or only under such a name too.
    """
    path = Path(path)
    if _PLAIN.fullmatch(str(path.absolute())):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as folder:
        link = Path(folder) / f"link{path.suffix if _PLAIN.fullmatch(path.suffix) else ''}"
        if not _PLAIN.fullmatch(str(link)):
            raise OSError(errno.EINVAL, f"characters of {path} are read as a pattern or a scheme: rename it")
        link.symlink_to(path.absolute())
        yield link


_PLAIN = re.compile(r"[\w/. @+=,~^-]*")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to be read, if it is one: a pipe would be waited for, a device could be read without end.

    Raises:
        FileError: the file is missing, can't be opened, or is no regular file.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe itself waits.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileError(f"{path} doesn't exist.") from None
    except (OSError, ValueError) as error:  # a NUL in its name, for one
        if os.path.isdir(path):
            raise FileError(f"{path} is a folder, and a file is expected here.") from None
        raise FileError(f"{path} can't be opened: {getattr(error, 'strerror', error)}.") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise FileError(f"{path} is a folder, and a file is expected here.")
    kind = next((kind for is_kind, kind in _NO_FILES if is_kind(mode)), "something else")
    raise FileError(f"{path} is {kind}, and a regular file is expected here.")


_NO_FILES = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def _write_atomically(path: Path, write: Callable[[BufferedWriter], object], *, needed: int) -> None:
    # In the same folder, so that `os.replace` stays within one file system; not `tempfile`, whose files are 0600
    # whatever the umask.
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with contextlib.ExitStack() as stack:
            with temporary.open("xb") as file:
                stack.enter_context(in_use(temporary))
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


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers of this file left."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            is_temporary = entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp")
            if is_temporary and entry.is_file(follow_symlinks=False) and is_abandoned(Path(entry.path)):
                os.unlink(entry.path)


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
    shown = ", ".join(f"'{clipped(name)}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "") if names else "nothing"
