"""Files from elsewhere: only regular files are opened, sizes are checked first, and no name leaves its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import LoraJaxError

_NO_FILES = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
_PLAIN = re.compile(r"[\w/. @+=,~^-]*")


class FileError(LoraJaxError):
    """A file that cannot be read or written; the message names the file, what is wrong with it, and the way out."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file for reading: a pipe would block, and a device may have no end.

    Raises:
        FileError: The file is missing, can't be opened, or isn't a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe blocks.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileError(f"{path} doesn't exist.") from None
    except (OSError, ValueError) as error:  # a ValueError: a NUL in its name
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


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int, kind: str = "a file") -> bytes:
    """Reads a file of at most `max_bytes`.

    Args:
        path: The file.
        max_bytes: Largest size to read.
        kind: What error messages call the file.

    Raises:
        FileError: The file is missing, too large, or not a regular file: a folder, a pipe, a device.
    """
    path = Path(path)
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > max_bytes:
            raise FileError(f"{path} has {length:,} bytes, and {kind} of at most {max_bytes:,} is expected here.")
        return file.read(length)


def read_text(path: str | os.PathLike[str], *, max_bytes: int) -> str:
    """Reads a UTF-8 text file of at most `max_bytes`.

    Raises:
        FileError: See `read_bytes`; or the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 (byte {error.start:,}): it is corrupt or another format.") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(
    folder: str | os.PathLike[str], name: object, *, links_within: str | os.PathLike[str] | None = None
) -> Path:
    """`folder / name`, where `name` was read from a file and must stay inside the folder.

    Args:
        folder: The folder.
        name: A relative name with forward slashes.
        links_within: The folder that symbolic links may not leave; `folder` itself if `None`. (A Hugging Face cache
            keeps links to `blobs`, two levels up.)

    Raises:
        FileError: `name` is no text, empty or absolute, has `..`, a backslash, a drive or a NUL, or is a link that
            leads out of the folder.

    Example:
        >>> safe_join("/models", "../x")
        Traceback (most recent call last):
        ...
        lora_jax.files.reading.FileError: The name '../x' would leave /models: a name inside the folder is expected.
    """
    folder = Path(folder)
    if (
        not isinstance(name, str)
        or not name
        or "\\" in name
        or "\0" in name
        or name.startswith("/")
        or PureWindowsPath(name).drive
        or ".." in PurePosixPath(name).parts
    ):
        raise FileError(f"The name {name!r:.200} would leave {folder}: a name inside the folder is expected.")
    path = folder / name
    limit = Path(links_within) if links_within is not None else folder
    if not _resolved(path).is_relative_to(_resolved(limit)):
        raise FileError(f"The name {name!r:.200} is a link that leaves {limit}: put the file itself into the folder.")
    return path


def within_folder(folder: str | os.PathLike[str], name: object) -> Path:
    """`safe_join` for a model folder, whose files may be links into a Hugging Face cache.

    A snapshot in such a cache links to `blobs`, two levels up; so may files fetched into any other folder.
    """
    folder = Path(folder)
    real = _resolved(folder)
    if real.parent.name == "snapshots":
        return safe_join(folder, name, links_within=real.parent.parent)
    if isinstance(name, str) and "\0" not in name and (folder / name).is_symlink():
        blobs = _resolved(folder / name).parent
        if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
            return safe_join(folder, name, links_within=blobs)
    return safe_join(folder, name)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # Python before 3.13 raises RuntimeError
        raise FileError(f"{path} is a link that leads to itself: put the file itself there.") from None


@contextlib.contextmanager
def plainly_named(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name for a file or folder that no library reads as a pattern (`[1]`, `*`) or a scheme (`gs:`, `::`).

    `path` itself, or a link to it that lasts for the block.

    Raises:
        FileError: The folder for temporary files has such a name too.
        OSError: No link can be made.
    """
    path = Path(path)
    if _PLAIN.fullmatch(str(path.absolute())):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as folder:
        link = Path(folder) / f"link{path.suffix if _PLAIN.fullmatch(path.suffix) else ''}"
        if not _PLAIN.fullmatch(str(link)):
            raise FileError(f"{path} has characters that are read as a pattern or a scheme: rename it.")
        link.symlink_to(path.absolute())
        yield link
