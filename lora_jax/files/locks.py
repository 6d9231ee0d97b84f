"""Locks between processes and threads, held through the operating system, which releases them when a process ends.

So the file that a kill leaves behind blocks nobody. Where there are no such locks (Windows, some network file systems,
a folder that can't be written) nothing is locked, and nothing is refused for that.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import LoraJaxError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LONGEST_WAIT = 0.02  # seconds between two attempts
_LARGEST = 1000  # bytes to read of a lock file
_YOUNG = 60.0  # seconds in which a new file may not have been marked yet


class BusyError(LoraJaxError):
    """Another process or thread holds the lock; the message says which."""


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Holds a lock file for the block, which is made and removed here and says who holds it.

    Args:
        path: The lock file, in a folder that exists.
        seconds: Time to wait for another holder.

    Yields:
        Whether the lock is held; `False` where the system has no locks.

    Raises:
        BusyError: Another process or thread holds it.
    """
    descriptor = _acquire(path, time.monotonic() + seconds)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        try:
            # While it is held: whoever opened the file before finds it gone, and makes another.
            path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def _acquire(path: Path, deadline: float) -> int | None:
    if fcntl is None:
        return None
    wait = 0.001
    while True:
        try:
            # Not through a link, since the file is written to.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise BusyError(holder) from None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
            continue
        except OSError:
            os.close(descriptor)
            return None
        if _is_file(descriptor, path):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # its holder has released and removed it since


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except OSError:
        return False


def _sign(descriptor: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since})
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        said = json.loads(os.pread(descriptor, _LARGEST, 0))
        process, host, since = (said[name] for name in ("process", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    texts = [text for text in (host, since) if isinstance(text, str) and text.isprintable()]
    if type(process) is not int or len(texts) < 2:
        return "another process"
    return f"process {process} on {texts[0]}, since {texts[1]}"


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Marks a file as in use for the block, so that `is_abandoned` can tell it from one that a killed process left."""
    descriptor = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether nobody marks a file by `in_use` any more; `False` where that can't be told."""
    if fcntl is None:
        return False
    try:
        if time.time() - path.stat(follow_symlinks=False).st_mtime < _YOUNG:
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
