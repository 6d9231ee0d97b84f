"""Files of a folder that belong together, written as one: the folder holds the earlier files or the new ones.

A write goes into a folder of its own, `.writing-…`, inside the folder that it is for. When every file in it is whole,
it is renamed to `.written-…`. With that one rename the new files are in force; moving them to their places is left to
the writer or, if that was killed, to whoever reads or writes there next. One writer at a time holds the folder's lock,
so any other `.writing-…` was left by a kill.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from .json_files import read_json, write_json
from .locks import BusyError, locked
from .reading import FileError
from .writing import sync_folder

Result = TypeVar("Result")

_WRITING, _WRITTEN, _LOCK, _PLAN = ".writing-", ".written-", ".lora_jax.lock", ".plan.json"
_PATIENCE = 300.0  # seconds to wait for another writer
_TRIES = 200  # of a reader that meets one writer after another
_TOKEN = "[0-9a-f]{12}"  # in a temporary name, from `secrets.token_hex(6)`


class _Plan(NamedTuple):
    """What a write that is whole moves to its place, and what it removes."""

    names: list[str]
    obsolete: list[str]
    read_elsewhere: bool


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str],
    names: Sequence[str],
    *,
    obsolete: Callable[[str], bool] | None = None,
    read_elsewhere: bool = True,
    what: str = "files",
) -> Iterator[Path]:
    """A new folder in which to write the files `names`; at the end of the block they take their places in `folder`.

    If the process is killed at any moment, the earlier files are left, or the new ones: readers here begin with
    `settle`, which moves files of a finished write that are not in their places yet. Writers of one folder wait for
    each other.

    Args:
        folder: The folder; made if it doesn't exist.
        names: Names of the files that the block writes.
        obsolete: Whether a file of this name, left by an earlier write, would be read beside the new ones; it is
            removed.
        read_elsewhere: Whether programs read the folder that don't know `settle`. The last of `names` is the file they
            read first: it is removed first and put back last, so that a kill in between leaves a folder that they can't
            load, rather than files of two writes.
        what: Noun for what the folder holds, for error messages.

    Raises:
        FileError: `folder` cannot be made, or cannot hold files; or another writer doesn't finish.
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
            write_json(staging / _PLAN, _Plan(list(names), gone, read_elsewhere)._asdict())
            written = folder / staging.name.replace(_WRITING, _WRITTEN)
            os.rename(staging, written)
            sync_folder(folder)
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
    """Moves the files of a finished write to their places; files that were moved before stay there."""
    if not (written / _PLAN).exists():  # removed last: every file is in its place
        shutil.rmtree(written, ignore_errors=True)
        return
    plan = _read_plan(written)
    last = plan.names[-1]
    if plan.read_elsewhere and (written / last).exists():
        (folder / last).unlink(missing_ok=True)
    for name in plan.obsolete:
        (folder / name).unlink(missing_ok=True)
    for name in plan.names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(written / name, folder / name)
    sync_folder(folder)
    shutil.rmtree(written, ignore_errors=True)


def _read_plan(written: Path) -> _Plan:
    content = read_json(written / _PLAN)
    if isinstance(content, dict) and content.keys() >= set(_Plan._fields):
        names, obsolete, read_elsewhere = (content[field] for field in _Plan._fields)
        if _are_names(names) and names and _are_names(obsolete) and isinstance(read_elsewhere, bool):
            return _Plan(names, obsolete, read_elsewhere)
    raise FileError(f"{written / _PLAN} is no plan of a write. Remove the folder {written}.")


def _are_names(value: object) -> bool:
    """Whether it is a list of names of files in a folder, not beyond it."""
    return isinstance(value, list) and all(
        isinstance(name, str) and name not in ("", ".", "..", _LOCK) and not any(part in name for part in "/\\\0")
        for name in value
    )


def _withdraw(written: Path, staging: Path, names: Sequence[str]) -> None:
    """Takes back a write that failed before any of its files was moved."""
    if all((written / name).exists() for name in names):
        with contextlib.suppress(OSError):
            os.rename(written, staging)
            shutil.rmtree(staging, ignore_errors=True)


def settle(folder: str | os.PathLike[str]) -> None:
    """Moves the files of a finished write to their places if its writer was killed before: readers begin with this.

    Raises:
        FileError: The files can't be moved; or another writer doesn't finish.
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
            continue  # another process has moved them, where there are no locks
        except OSError as error:
            raise FileError(
                f"{folder}: the writer of its files was killed, and those in {written.name}, which are whole, can't be "
                f"moved to their places: {error.strerror}. Make the folder writable."
            ) from error


def _waiting(folder: Path) -> list[Path]:
    return _folders_in(folder, _WRITTEN)


def _folders_in(folder: Path, prefix: str, suffix: str = "", middle: str = ".*") -> list[Path]:
    """Folders by the parts of their names; no links, which lead elsewhere.

    Args:
        folder: The folder to look in.
        prefix, suffix: The ends of their names.
        middle: A regular expression for the rest: `.out.` also begins the names of what is written for `out.v2`.
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
    """Removes what killed writers left behind, while the lock is held."""
    for left in _folders_in(folder, prefix, suffix, middle):
        shutil.rmtree(left, ignore_errors=True)


def read_together(
    folder: str | os.PathLike[str], names: Sequence[str], read: Callable[[], Result], *, tries: int = _TRIES
) -> Result:
    """The result of `read()`, from files of one write: it is called again where another write comes in between.

    Args:
        folder: The folder that holds the files.
        names: Names of the files that belong together.
        read: Reads them.
        tries: Number of attempts before giving up on a folder that never comes to rest.

    Raises:
        FileError: See `settle`; or the folder never comes to rest.
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
        FileError: `folder` isn't new or empty; the message names `argument`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"`{argument}` {folder} isn't a new or empty folder: choose another.")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], argument: str) -> Iterator[Path]:
    """A folder beside `folder` to write in, which takes its place at the end of the block: whole, or not at all.

    What a killed writer left beside it is removed by the next one.

    Args:
        folder: The folder; new or empty.
        argument: The caller's name for it, for error messages.

    Raises:
        FileError: `folder` isn't new or empty, or can't be made; or another process is writing it.
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
        sync_folder(folder.parent)
