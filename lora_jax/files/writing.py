"""One file, written whole or not at all: an interruption at any moment leaves the earlier one as it was."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from .locks import in_use, is_abandoned
from .reading import FileError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically.

    Raises:
        FileError: Half a character, which UTF-8 lacks; or see `write_bytes`.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: this can't be written as UTF-8: {error}") from error
    write_bytes(path, data)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically.

    Raises:
        FileError: A full disk, a missing folder, or another failure to write. An earlier file is then unchanged.
    """
    write_atomically(Path(path), lambda file: file.write(data), needed=len(data))


class _Figure(Protocol):
    """A Matplotlib figure."""

    def savefig(self, fname: BinaryIO, /, *, format: str, **options: Any) -> None: ...


def write_figure(path: Path, figure: _Figure, **options: object) -> None:
    """Writes a figure atomically, in the format of the path's ending; `options` are those of `savefig`.

    Raises:
        FileError: See `write_bytes`.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), **options)
    write_bytes(path, buffer.getvalue())


def write_atomically(path: Path, write: Callable[[BufferedWriter], object], *, needed: int) -> None:
    """Has `write` fill a file beside `path`, which takes its place once it is on disk.

    Args:
        path: The file; its folder must exist.
        write: Writes the content.
        needed: Size in bytes, for the message about a full disk.

    Raises:
        FileError: See `write_bytes`.
    """
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
            raise _explained(error, path, needed) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the file system has a way to (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers of this file left behind."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            is_temporary = entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp")
            if is_temporary and entry.is_file(follow_symlinks=False) and is_abandoned(Path(entry.path)):
                os.unlink(entry.path)


def _explained(error: OSError, path: Path, needed: int) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError(
            f"{path} needs {needed:,} bytes, and the disk (or the quota) is full. Nothing was changed: free some space "
            "and save again."
        )
    if error.errno == errno.ENOENT:
        return FileError(f"{path} can't be written: the folder {path.parent} doesn't exist. Make it first.")
    return FileError(f"{path} can't be written: {error.strerror}. Nothing was changed.")
