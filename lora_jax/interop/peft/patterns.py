"""The keys of `rank_pattern` and `alpha_pattern`, matched without a regular expression being run.

PEFT takes a key as a regular expression: `(.*\\.)?(key)$` must match the module's name, and the first key that does
wins. A stranger's expression may be built to run for ever, so here a key is understood when it is a name: characters,
dots (any character, as in an expression), escaped characters, and `^` or `$` at the ends. That covers what PEFT writes,
and takes time in proportion to the name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lora_jax.errors import LoraJaxError

_SPECIAL = frozenset(".^$*+?{}[]|()\\")
_ANY = ""


class _Name(NamedTuple):
    characters: list[str]
    anchored: bool


class PatternError(LoraJaxError):
    """A key that is a real regular expression, and so is not run."""


class Patterns:
    """The keys of one pattern table, each taken apart once.

    Example:
        >>> patterns = Patterns(["^layer.0.query", "layer.1.query", "query"])
        >>> [patterns.first(f"encoder.layer.{number}.query") for number in range(2)]
        ['query', 'layer.1.query']
        >>> patterns.first("encoder.subquery") is None
        True
        >>> Patterns(["(a+)+"]).first("aaaa")
        Traceback (most recent call last):
        ...
        lora_jax.interop.peft.patterns.PatternError: '(a+)+' is a regular expression
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [(key, _parse(key)) for key in keys]

    def first(self, module: str) -> str | None:
        """The key that decides for a module, `None` if no key means it.

        Raises:
            PatternError: A key that is more than a name comes before any that matches, so it might be the one.
        """
        return next((key for key, name in self._keys if _means(key, name, module)), None)


def literal(name: str) -> str:
    """A key that means the module `name` alone.

    Example:
        >>> literal("layer.0")
        '^layer\\\\.0'
    """
    return "^" + "".join(f"\\{character}" if character in _SPECIAL else character for character in name)


def _means(key: str, name: _Name | None, module: str) -> bool:
    if name is None:
        raise PatternError(f"{key!r:.200} is a regular expression")
    start = len(module) - len(name.characters)
    if start < 0 or (start > 0 and (name.anchored or module[start - 1] != ".")):
        return False
    return all(wanted in (_ANY, found) for wanted, found in zip(name.characters, module[start:], strict=True))


def _parse(key: str) -> _Name | None:
    """The name that a key is, `None` if it is more."""
    body = key.removeprefix("^")
    characters: list[str] = []
    place = 0
    while place < len(body):
        character = body[place]
        following = body[place + 1 : place + 2]
        if character == "\\" and following and not following.isalnum():
            characters.append(following)
            place += 1
        elif character == ".":
            characters.append(_ANY)
        elif character in _SPECIAL and (character != "$" or following):
            return None
        elif character != "$":
            characters.append(character)
        place += 1
    return _Name(characters, key.startswith("^")) if characters else None
