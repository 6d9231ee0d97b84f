"""A trial: a good folder, damaged, and read; and a process to do trials in, with limits.

A trial is a kind and a seed, and the same whenever it is done. Whatever the folder holds then, it is read or refused:
refused means one of `REFUSALS`, whose message names the folder. All else is a finding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from . import kinds
from .mutations import choice, mutate

GOOD = 4  # good folders of each kind
LONGEST = 5_000  # characters of a refusal
SECONDS = 10.0
MEMORY = 2**30  # bytes


class Outcome(NamedTuple):
    """What became of a trial.

    Attributes:
        was_read: whether the folder was read.
        message: of the refusal, if it wasn't; or what was found.
        damage: what was done to the folder.
        is_finding: whether it was neither read as it should nor refused as it should.
    """

    was_read: bool
    message: str
    damage: list[str]
    is_finding: bool = False


def make_case(kind: str, seed: int, folder: Path) -> list[str]:
    """Writes the folder of a trial, anew; tells its damage, nothing for one in four."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    _remove(folder)
    folder.mkdir(parents=True)
    number = int(rng.integers(GOOD))
    for name, data in _good(kind, number).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    damage = []
    for _ in range(choice(rng, (0, 1, 1, 2))):
        held = [path for path in _held(folder, choice(rng, kinds.KINDS[kind].files)) if path.is_file()]
        if held:
            damage.append(mutate(choice(rng, held), rng))
    return damage


def read_case(kind: str, seed: int, folder: Path, damage: list[str]) -> Outcome:
    """Reads a folder that `make_case` wrote."""
    spec = kinds.KINDS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    good = _good(kind, int(rng.integers(GOOD)))
    changed = {name for name, data in good.items() if not _holds(folder / name, data)}
    covered = {str(path.relative_to(folder)) for pattern in spec.summed for path in _held(folder, pattern)} & changed
    covered = {name for name in covered if not _has_lost_its_checksum(folder / name, good[name])}
    value, message = None, ""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            value = spec.read(folder)
        except kinds.REFUSALS as error:
            message = str(error)
        except (Exception, _panic()) as error:
            return Outcome(False, _told(error), damage, is_finding=True)
        if message:
            problem = _problem_of_refusal(spec, message, folder, damage)
            return Outcome(False, problem or message, damage, is_finding=problem is not None)
        try:
            if spec.is_finite:
                _require_finite(value)
            spec.check(folder, value)
        except Exception as error:
            return Outcome(True, _told(error), damage, is_finding=True)
    if covered and not set(map(digest, spec.pieces(value))) <= _good_digests(kind, _number(kind, seed)):
        what = f"{', '.join(sorted(covered))} was changed, a checksum covers it, and other values were read"
        return Outcome(True, what, damage, is_finding=True)
    return Outcome(True, "", damage)


def _has_lost_its_checksum(path: Path, good: bytes) -> bool:
    """Without that entry, a description is one of an earlier version."""
    entry = b'"checksum"'
    return path.suffix == ".json" and entry in good and path.is_file() and entry not in path.read_bytes()


def _told(error: BaseException) -> str:
    """An error, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error} ({places})"


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """A trial in this process, without limits."""
    return read_case(kind, seed, folder, make_case(kind, seed, folder))


def _number(kind: str, seed: int) -> int:
    return int(np.random.default_rng([seed, zlib.crc32(kind.encode())]).integers(GOOD))


def _problem_of_refusal(spec: kinds.Kind, message: str, folder: Path, damage: list[str]) -> str | None:
    if not damage:
        return f"a good folder is refused: {message}"
    if spec.is_named and str(folder) not in message:
        return f"the message doesn't name the folder: {message:.{LONGEST}}"
    return "the message is endless" if len(message) > LONGEST else None


def _require_finite(value: Any) -> None:
    for leaf in jax.tree.leaves(value):  # the factors; what they merge to may be beyond float32
        if isinstance(leaf, np.ndarray | jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), "not all of it is finite"


def _panic() -> type[BaseException]:
    """What Rust's own failures are raised as is no `Exception`, and has no module to import it from."""
    from tokenizers import Tokenizer, models

    try:
        Tokenizer(models.BPE()).enable_truncation(1, stride=2)
    except BaseException as error:
        return type(error) if not isinstance(error, Exception) else AssertionError
    return AssertionError


@functools.cache
def _good(kind: str, number: int) -> dict[str, bytes]:
    """The files of a good folder: made once, since to make it takes longer than to read it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "good"
        folder.mkdir()
        kinds.KINDS[kind].write(folder, np.random.default_rng([number, 1]))
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }


@functools.cache
def _good_digests(kind: str, number: int) -> set[str]:
    with tempfile.TemporaryDirectory() as name:
        for file, data in _good(kind, number).items():
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / file).write_bytes(data)
        return set(map(digest, kinds.KINDS[kind].pieces(kinds.KINDS[kind].read(Path(name)))))


def digest(value: Any) -> str:
    """Equal for equal values, whatever they are made of."""
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{zlib.crc32(array.tobytes()):08x}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{key!r}:{digest(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(digest, value)) + "]"
    return repr(value)


def _held(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if not path.is_dir() or path.is_symlink()]


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == data


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- process with limits


class Worker:
    """A process that does one trial after another, each within limits of time and memory; a new one after a kill.

    JAX alone reserves more than a gigabyte of addresses, so the limit is of memory that can be written to, and of what
    a trial takes beyond what the process has when it begins (`RLIMIT_DATA`, set anew for each). The process is not
    forked for a trial: JAX's threads wouldn't be there in the copy. The damage is done before the clock starts; the
    clock is the parent's, so a reader that holds the interpreter in C code is ended too.

    Args:
        seconds: that a trial may take.
        memory: bytes that it may take.
        program: what the process runs, for tests.
    """

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY, program: str | None = None) -> None:
        self._seconds, self._memory = seconds, memory
        self._program = program or f"from {__name__} import serve; serve()"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, kind: str, seed: int, folder: Path) -> Outcome:
        """A trial, in the process."""
        process = self._started()
        assert process.stdin is not None
        request = {"kind": kind, "seed": seed, "folder": str(folder), "memory": self._memory}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        damage = self._answer(300)  # to make a kind's good folders takes its time
        if damage is None:
            return self._ended("the process ended before the reader was called", [])
        if "broken" in damage:
            return Outcome(False, damage["broken"], [], is_finding=True)
        answer = self._answer(self._seconds)
        if answer is None:
            return self._ended(None, damage["damage"])
        return Outcome(**answer)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            root = Path(__file__).parents[2]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=root,
                env=environment,
            )
            self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def _ended(self, what: str | None, damage: list[str]) -> Outcome:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        if what is None:
            hung = process.poll() is None
            what = f"it took more than {self._seconds:g} s" if hung else f"the process died (exit {process.poll()})"
        self.stop()
        return Outcome(False, what, damage, is_finding=True)


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def serve() -> None:
    """Does the trials that standard input asks for: a line of what was damaged, then a line of what came of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    for line in sys.stdin:
        request = json.loads(line)
        kind, seed, folder = request["kind"], request["seed"], Path(request["folder"])
        try:
            damage = make_case(kind, seed, folder)
            if kinds.KINDS[kind].summed:
                _good_digests(kind, _number(kind, seed))
        except BaseException as error:
            answer({"broken": f"the case can't be made: {type(error).__name__}: {error}"})
            continue
        with _limited(request["memory"], hard):
            answer({"damage": damage})
            outcome = read_case(kind, seed, folder, damage)
        answer(outcome._replace(message=outcome.message[:LONGEST])._asdict())


@contextlib.contextmanager
def _limited(memory: int, hard: int) -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
