"""How an option of a run is described: once, at its field of `TrainConfig`; flags and help are derived."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
TaskKind = Literal["classification", "regression", "causal-lm"]
TASKS: tuple[str, ...] = get_args(TaskKind)
LABELLED: tuple[str, ...] = ("classification", "regression")
CAUSAL_LM: tuple[str, ...] = ("causal-lm",)

Group = Literal["data", "model", "method", "optimization", "evaluation", "output"]
GROUPS: tuple[str, ...] = get_args(Group)


@dataclass(frozen=True)
class About:
    """Description of an option; `about` puts it into its field's metadata.

    Attributes:
        group: Group that the option is listed in.
        text: Noun phrase that describes it, with the unit where there is one; `"Whether to …"` for a switch.
        unit: Name of its value on the command line: `"N"`, `"COLUMN"`.
        shown: Default in words, where the field's own says too little.
        tasks: Tasks that it has a meaning for.
        rare: Whether it is listed after the common ones.
        changes_result: Whether runs with other values are other runs.
        least: Smallest value of an integer.
        below: Exclusive upper limit of a float; every float is at least 0.
    """

    group: Group
    text: str
    unit: str = ""
    shown: str = ""
    tasks: tuple[str, ...] = TASKS
    rare: bool = False
    changes_result: bool = True
    least: int = 1
    below: float = float("inf")


def about(group: Group, text: str, **details: Any) -> dict[str, About]:
    """Metadata of an option's field; see `About`."""
    return {"about": About(group, text, **details)}


def option(default: T, group: Group, text: str, **details: Any) -> T:
    """The field of an option that has a default; see `About`."""
    return dataclasses.field(default=default, metadata=about(group, text, **details))


class Option(NamedTuple):
    """An option of a run, read from its field.

    Attributes:
        name: Name of the field.
        about: Its description.
        types: Types of its value; a mapping as `Mapping`, a choice as `str`.
        choices: Texts that it may be; empty for any.
        default: Default; `dataclasses.MISSING` where it must be given.
    """

    name: str
    about: About
    types: frozenset[object]
    choices: tuple[str, ...]
    default: object

    @property
    def is_optional(self) -> bool:
        return types.NoneType in self.types

    def describe(self) -> str:
        """The text, the choices and the default, in sentences."""
        text = self.about.text
        if self.choices:
            text = f"{text} Choices: {', '.join(self.choices)}."
        default = self.about.shown
        if not default and not isinstance(self.default, bool) and self.default not in (None, dataclasses.MISSING):
            default = f"{self.default:g}" if isinstance(self.default, float) else str(self.default)
        elif self.default is True:
            default = "yes"
        return f"{text} Default: {default}." if default else text


def options_of(config: type) -> dict[str, Option]:
    """The options of a config class by name, in the order of its fields."""
    hints = get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        kinds, choices = set(), ()
        for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
            if get_origin(kind) is Literal:
                choices = get_args(kind)
                kinds.add(str)
            else:
                kinds.add(get_origin(kind) or kind)
        found[field.name] = Option(field.name, field.metadata["about"], frozenset(kinds), choices, field.default)
    return found


def documentation(options: Mapping[str, Option]) -> str:
    """The options as the `Attributes` of a docstring, by group."""
    return "\n".join(
        line
        for group in GROUPS
        for line in (
            f"    Attributes of {group}:",
            *(f"        {name}: {o.describe()}" for name, o in options.items() if o.about.group == group),
            "",
        )
    )
