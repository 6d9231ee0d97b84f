"""How commands are parsed and explained: mistyped flags with the nearest one named, help for terminals of any width."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, overload

from lora_jax.text import clipped, nearest_name

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")  # what argparse takes for a negative number
_ARGUMENT = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")
_WIDEST = 120
Namespace = TypeVar("Namespace")


class CommandParser(argparse.ArgumentParser):
    """A parser that names the nearest flag or command for one that doesn't exist, under that command's usage."""

    @overload
    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: None = None
    ) -> tuple[argparse.Namespace, list[str]]: ...
    @overload
    def parse_known_args(self, args: Iterable[str] | None, namespace: Namespace) -> tuple[Namespace, list[str]]: ...
    @overload
    def parse_known_args(self, *, namespace: Namespace) -> tuple[Namespace, list[str]]: ...
    def parse_known_args(self, args: Iterable[str] | None = None, namespace: object = None) -> tuple[object, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands is None:
            for flag in _flags(given):
                # argparse takes the beginning of a flag for the flag.
                if not any(known.startswith(flag) for known in self._option_string_actions):
                    self._refuse("flag", flag, self._option_string_actions)
        elif given and not given[0].startswith("-") and given[0] not in commands:
            self._refuse("command", given[0], commands)
        namespace, rest = super().parse_known_args(given, namespace)
        if rest:  # argparse would show the usage of the program, not of the command
            self.error(f"unexpected arguments: {' '.join(map(clipped, rest))}")
        return namespace, rest

    def _refuse(self, kind: str, name: str, known: Mapping[str, object]) -> None:
        near = nearest_name(name if kind == "command" else f"--{name.lstrip('-')}", known)
        hint = f"the nearest is {near}" if near else f"`{self.prog} --help` lists them all"
        self.error(f"there is no {kind} {clipped(name)}; {hint}.")


def _flags(arguments: Sequence[str]) -> Iterator[str]:
    """The flags among arguments, without their values."""
    for argument in arguments:
        if argument == "--":
            return
        if argument.startswith("-") and len(argument) > 1 and " " not in argument and not _NUMBER.match(argument):
            yield argument.partition("=")[0]


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs to the terminal's width, and keeps indented lines and tables as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)
        self._width = min(self._width, _WIDEST)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else textwrap.fill(paragraph, width, initial_indent=indent)
            for paragraph in paragraphs
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The flags of a command by the names of the arguments that they set."""
    return {a.dest: next((f for f in a.option_strings if f.startswith("--")), "") for a in parser._actions}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library, which names arguments in backticks, with a command's flags in their place.

    Example:
        >>> flags = {"skip": "--skip", "kind": "--kind"}
        >>> print(in_flags("`rank` must be positive. Pass `skip=True`, or `kind='a'`.", flags))
        `rank` must be positive. Pass `--skip`, or `--kind a`.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if not flags.get(name):
            return match[0]
        if value is None or value == "True":
            return f"`{flags[name]}`"
        return f"`--no-{name.replace('_', '-')}`" if value == "False" else f"`{flags[name]} {value.strip(_QUOTES)}`"

    head, method, fields = message.partition("`method` ")
    if method and fields.partition(":")[0].replace("-", "").isalnum():  # what follows are the method's own options
        own = dict(flags)
        own |= {"dropout": flags["lora_dropout"]} if "lora_dropout" in flags else {}
        return _ARGUMENT.sub(flag, head) + f"`{flags.get('method') or 'method'}` " + in_flags(fields, own)
    return _ARGUMENT.sub(flag, message)


_QUOTES = "'\""
