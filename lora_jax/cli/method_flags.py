"""Flags for the options of methods, read from the registered methods' classes."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lora_jax.methods import Method


class _Option(NamedTuple):
    """A method's option that has a flag."""

    method: type[Method]
    field: dataclasses.Field[object]

    @property
    def flag(self) -> str:
        return self.field.metadata["flag"] or self.field.name.replace("_", "-")

    @property
    def default(self) -> object:
        declared = None if self.field.default is dataclasses.MISSING else self.field.default
        return self.method.task_defaults("classification").get(self.field.name, declared)


# Options that most methods have, or most runs set; the others are listed last.
_COMMON = ("rank", "alpha", "targets", "also_train")


def method_choices() -> dict[str, Any]:
    """The choices and the help of `--method`, for `add_argument`."""
    known = sorted(Method.by_name)
    summaries = (f"{name}, {Method.by_name[name].summary or Method.by_name[name].title}" for name in known)
    return {"choices": known, "help": f"Fine-tuning method: {'; '.join(summaries)}. Default: lora.".replace("%", "%%")}


def add_method_flags(parser: argparse._ActionsContainer, *, rare: bool) -> None:
    """A flag for every option of every method that says so in its field's metadata; the common ones, or the rare."""
    for flag, options in _options().items():
        if (options[0].field.name in _COMMON) is not rare:
            argument = _argument(options[0])  # one field, one type
            parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=_help(options), **argument)


def method_options(from_file: object, given: dict[str, Any]) -> dict[str, object]:
    """The method's options: its flags, taken out of `given`, over those of a file if that has the same method."""
    options = dict(from_file) if isinstance(from_file, Mapping) else {"name": from_file}
    name = given.pop("method", options.get("name", "lora"))
    if name != options.get("name", "lora"):
        options = {}
    flags: dict[str, object] = {}
    for flag, (option, *_) in _options().items():
        if (key := flag.replace("-", "_")) in given:
            flags[option.field.name] = given.pop(key)
    if "targets" in flags:
        flags["targets"] = preset_or_names(typing.cast(list[str], flags["targets"]))
    return {**options, "name": name, **flags}


def preset_or_names(targets: list[str]) -> str | list[str]:
    """The value of `--targets`: a single word that is a preset of some method, or else a list of names."""
    presets = {preset for cls in Method.by_name.values() for preset in cls.presets}
    return targets[0] if len(targets) == 1 and targets[0] in presets else targets


def _options() -> dict[str, list[_Option]]:
    """The methods' options by flag."""
    found: dict[str, list[_Option]] = {}
    for name in sorted(Method.by_name, key=lambda name: (name != "lora", name)):
        for field in dataclasses.fields(Method.by_name[name]):
            if "flag" in field.metadata:
                option = _Option(Method.by_name[name], field)
                found.setdefault(option.flag, []).append(option)
    return found


def _help(options: Sequence[_Option]) -> str:
    """The text of a flag: what it is for each method, and its default there."""
    names: dict[str, list[str]] = {}
    for option in options:
        default = option.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        text = f"{option.field.metadata['help']}."
        if default is not None and default is not False:
            text += f" Default: {shown}."
        names.setdefault(text, []).append(option.method.name)
    if len(names) == 1 and len(options) == len(Method.by_name):
        return next(iter(names)).replace("%", "%%")
    return "\n".join(f"{', '.join(methods)}: {text}" for text, methods in names.items()).replace("%", "%%")


def _argument(option: _Option) -> dict[str, Any]:
    """How argparse reads an option, by the type of its field."""
    declared = typing.get_type_hints(option.method)[option.field.name]
    parts = typing.get_args(declared) if typing.get_origin(declared) in (types.UnionType, typing.Union) else (declared,)
    kinds = [part for part in parts if part is not type(None)]
    metavar = option.field.name.upper()
    if typing.get_origin(kinds[0]) is Literal:
        return {"choices": typing.get_args(kinds[0])}
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction if len(parts) > 1 else "store_true"}
    if any(isinstance(typing.get_origin(kind), type) for kind in kinds):  # a sequence of names, whatever else it may be
        return {"nargs": "+" if option.field.name == "targets" else "*", "metavar": "NAME"}
    return {"type": _reader([kind for kind in kinds if kind is not str], type(None) in parts), "metavar": metavar}


def _reader(kinds: Sequence[Callable[[str], object]], optional: bool) -> Callable[[str], object]:
    """Reads a value as the first of some types that takes it, and `none` if it may be absent."""

    def read(text: str) -> object:
        if optional and text.lower() == "none":
            return None
        for kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
        if str in kinds or len(kinds) != 1:
            return text  # the method refuses what it doesn't know
        raise ValueError(text)

    read.__name__ = " or ".join(getattr(kind, "__name__", "value") for kind in kinds) or "str"  # for argparse's message
    return read
