"""Registries: classes by the names that adapter files and the command line have for them."""

from __future__ import annotations

import re
from typing import TypeVar

from .errors import ArgumentError

Class = TypeVar("Class", bound=type)


class Registry(dict[str, Class]):
    """Classes by name; a name that another class has is refused, since files written under it would change meaning.

    The same definition may come again (a notebook's cell, a reloaded module, `dataclass(slots=True)`): the later class
    takes the earlier one's place.

    Args:
        attribute: Name of the class attribute that holds the name, for messages.
        pattern: Regular expression that a name has to match as a whole.
    """

    def __init__(self, attribute: str, pattern: str) -> None:
        super().__init__()
        self.attribute, self.pattern = attribute, pattern

    def add(self, name: str, cls: Class) -> None:
        """Registers a class; see `check`."""
        self.check(name, cls)
        self[name] = cls

    def check(self, name: str, cls: Class) -> None:
        """Refuses a name that a class can't have.

        Raises:
            ArgumentError: Another class has the name, or it doesn't match the pattern.
        """
        if not re.fullmatch(self.pattern, name):
            raise ArgumentError(f"`{self.attribute}` of {_place(cls)} must match {self.pattern}, got {name!r}.")
        taken = self.get(name)
        if taken is not None and _place(taken) != _place(cls):
            raise ArgumentError(
                f"`{self.attribute}` {name!r} of {_place(cls)} is taken by {_place(taken)}: choose another one."
            )


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
