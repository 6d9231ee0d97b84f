"""`lora-jax COMMAND ...`: finds the command; a mistake of the user's is one line, a defect a traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import LoraJaxError
from ..host_memory import keep_freed_memory
from ..text import printable
from . import analyze, compare, convert, demo, evaluate, inspect, merge, predict, train
from .parser import CommandParser, HelpFormatter, flags_of, in_flags

# Errors of the operating system that the user can fix.
_USERS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
# What a command needs beyond the core comes with an extra; without it Python's own message would name one package.
_EXTRAS = {
    "datasets",
    "flax",
    "grain",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "orbax",
    "rich",
    "sklearn",
    "tokenizers",
    "yaml",
}

_EPILOG = """\
examples:
  lora-jax demo
  lora-jax train --train data.tsv --dev dev.tsv --output out
  lora-jax predict --adapter out messages.txt
  lora-jax merge --adapter out --output merged
  lora-jax convert --adapter out --to peft --output out_peft
  lora-jax inspect --method bitfit
  lora-jax compare --train data.tsv --output study
  lora-jax analyze out --output figures

`lora-jax COMMAND --help` explains a command and its flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 after a mistake of the user's, 130 when interrupted."""
    if argv is None:  # the process is this command's own
        keep_freed_memory()
        _write_utf8()
    parser = make_parser()
    args = parser.parse_args(argv)
    name = f"lora-jax {args.command}"
    try:
        with contextlib.nullcontext() if args.traceback else _one_line_each():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `lora-jax predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted. Run the same command to resume a training run from its last checkpoint.",
            file=sys.stderr,
        )
        return 130
    except ModuleNotFoundError as error:
        if args.traceback or (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        extras = "train,study" if error.name == "matplotlib" else "train"
        print(f"{name}: {error.name} is not installed: pip install 'lora_jax[{extras}]'", file=sys.stderr)
        return 2
    except Exception as error:
        if args.traceback or not _is_users(error):
            raise
        print(f"{name}: error: {printable(in_flags(str(error), args.flags))}", file=sys.stderr)
        return 2
    return 0


def _write_utf8() -> None:
    """What is printed is what was read, UTF-8, also where the locale (`LC_ALL=C`) has no letters but ASCII's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _one_line_each() -> Iterator[None]:
    """Warnings are one line each; and a failed save is one error, not also pages from Orbax's threads and its log."""
    logger = logging.getLogger("absl")
    before = threading.excepthook, sys.unraisablehook, warnings.formatwarning

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if not _is_orbax(args.exc_traceback):
            before[0](args)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if not _is_orbax(args.exc_traceback):
            before[1](args)

    threading.excepthook, sys.unraisablehook, warnings.formatwarning = of_thread, unraisable, _formatted_warning
    logger.addFilter(_is_not_orbax)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook, warnings.formatwarning = before
        logger.removeFilter(_is_not_orbax)


def _is_orbax(trace: TracebackType | None) -> bool:
    """Whether an exception was raised in Orbax, TensorStore or the event loops that they alone have.

    What goes wrong there reaches the command as a `CheckpointError` too.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    return any(module.partition(".")[0] in ("asyncio", "orbax", "tensorstore") for module in modules)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _formatted_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line; it may quote a name from elsewhere."""
    del category, filename, lineno, line
    return f"lora-jax: warning: {printable(message)}\n"


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lora-jax",
        description="Trains, uses and inspects parameter-efficient adapters.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for module in (train, evaluate, predict, merge, convert, inspect, compare, analyze, demo):
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=HelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="Show the traceback of an error.")
        command.set_defaults(run=module.run, flags=flags_of(command))
        if module.USAGE:
            command.usage = f"lora-jax {module.NAME} {module.USAGE}"
    return parser


def _is_users(error: Exception) -> bool:
    """Whether it tells the user what to fix; any other error is a defect, to be seen with its traceback."""
    return isinstance(error, LoraJaxError) or (isinstance(error, OSError) and error.errno in _USERS)
