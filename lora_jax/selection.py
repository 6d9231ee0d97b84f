"""The one rule by which every method selects leaves: from patterns, names or a predicate to leaf paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from .errors import LoraJaxError
from .paths import listed, nearest, shape_text
from .state import StateLeaf
from .types import Leaf, LeafPath, has_shape

# A regular expression, names, or a predicate: see `select`.
Selector: TypeAlias = str | Sequence[str] | Callable[[LeafPath, Leaf], bool]


class SelectionError(LoraJaxError):
    """A selector matches nothing, or only leaves that it must not select."""


def matches_entry(path: LeafPath, entry: str, *, below: bool = False) -> bool:
    """Whether an entry of a selector's sequence selects the leaf at `path`.

    An entry is a whole-segment suffix of the leaf's path or of its module's path; with `below`, of any path above the
    leaf too. A leading `"/"` anchors the entry at the root. The segments `~` and `~method`, which Haiku puts between
    a module and those that it creates outside its call, may be left out unless the entry is anchored.

    Example:
        >>> matches_entry("encoder/attention/query/kernel", "attention/query")
        True
        >>> matches_entry("mlp_0/~/linear_0/w", "mlp_0/linear_0")
        True
        >>> matches_entry("encoder/attention/subquery/kernel", "query")
        False
        >>> matches_entry("head/dense/out/kernel", "head"), matches_entry("head/dense/out/kernel", "head", below=True)
        (False, True)
    """
    segments = path.split("/")
    wanted = entry.strip("/").split("/")
    if "~" in path and "~" not in entry and not entry.startswith("/"):
        segments = [segment for segment in segments if not segment.startswith("~")]
    shortest = 1 if below else max(1, len(segments) - 1)
    for end in range(shortest, len(segments) + 1):
        start = end - len(wanted)
        if start >= 0 and segments[start:end] == wanted and (start == 0 or not entry.startswith("/")):
            return True
    return False


class _Index:
    """Leaves by the entries that may select them: a saved method names every leaf, and there are too many pairs."""

    def __init__(self, paths: Iterable[LeafPath], *, below: bool) -> None:
        self._below = below
        self._rooted: dict[str, list[LeafPath]] = {}
        self._by_segment: dict[str, list[LeafPath]] = {}
        for path in paths:
            segments = path.split("/")
            ends = range(1 if below else max(1, len(segments) - 1), len(segments) + 1)
            for end in ends:
                self._rooted.setdefault("/".join(segments[:end]), []).append(path)
            last = {segments[end - 1] for end in ends}
            if "~" in path:  # an entry may leave out Haiku's segments
                short = [segment for segment in segments if not segment.startswith("~")]
                last.update(short if below else short[-2:])
            for segment in last:
                self._by_segment.setdefault(segment, []).append(path)

    def matches(self, entry: str) -> set[LeafPath]:
        name = entry.strip("/")
        likely = self._rooted.get(name) if entry.startswith("/") else self._by_segment.get(name.rpartition("/")[2])
        return {path for path in likely or () if matches_entry(path, entry, below=self._below)}


def select(
    leaves: Mapping[LeafPath, Leaf],
    selector: Selector,
    *,
    argument: str,
    eligible: Callable[[LeafPath, Leaf], bool],
    kind: str,
    below: bool = False,
) -> list[LeafPath]:
    """The paths of the eligible leaves that `selector` matches, in tree order.

    All methods share this rule. A **string** is a regular expression that must match the *whole* leaf path. The entries
    of a **sequence of strings** are names: see `matches_entry`. A **callable** `(path, leaf) -> bool` decides leaf by
    leaf. Every entry must match something.

    Args:
        leaves: Leaves of the tree by path, state marked: see `state.marked_leaves`.
        selector: Regular expression, names, or predicate.
        argument: Name of the caller's argument, for messages.
        eligible: Predicate of the leaves that may be selected at all.
        kind: Word for an eligible leaf, for messages: "weight", "bias", "leaf".
        below: Whether a name selects everything at or below it.

    Raises:
        SelectionError: An entry matches nothing, or nothing eligible.
    """
    if callable(selector):
        matched = {
            path for path, leaf in leaves.items() if selector(path, leaf.leaf if isinstance(leaf, StateLeaf) else leaf)
        }
        entries = [("the callable", matched)]
    elif isinstance(selector, str):
        try:
            pattern = re.compile(selector)
        except re.error as error:
            raise SelectionError(f"`{argument}={selector!r}` is no valid regular expression: {error}") from None
        entries = [(repr(selector), {path for path in leaves if pattern.fullmatch(path)})]
    else:
        index = _Index(leaves, below=below)
        entries = [(repr(entry), index.matches(entry)) for entry in selector]
    selected: set[LeafPath] = set()
    for name, matched in entries:
        usable = {path for path in matched if eligible(path, leaves[path])}
        if not matched:
            raise SelectionError(_nothing_matched(argument, name, selector, leaves, eligible))
        if not usable:
            shown = [f"{path} {_described(leaves[path])}" for path in sorted(matched)]
            is_state = any(isinstance(leaves[path], StateLeaf) for path in matched)
            hint = ". State is changed by the function itself, and no optimizer trains it" if is_state else ""
            raise SelectionError(f"`{argument}` entry {name} matches no {kind}, only {listed(shown)}{hint}")
        selected |= usable
    return [path for path in leaves if path in selected]


def _described(leaf: Leaf) -> str:
    """The shape, and the dtype where it may be the reason why the leaf isn't eligible."""
    if isinstance(leaf, StateLeaf):
        return f"{shape_text(leaf.leaf)} (state: {leaf.kind})"
    shown = shape_text(leaf)
    return f"{shown} {leaf.dtype}" if has_shape(leaf) and not jnp.issubdtype(leaf.dtype, jnp.inexact) else shown


def _nothing_matched(
    argument: str,
    name: str,
    selector: Selector,
    leaves: Mapping[LeafPath, Leaf],
    eligible: Callable[[LeafPath, Leaf], bool],
) -> str:
    paths = [path for path, leaf in leaves.items() if eligible(path, leaf)] or list(leaves)
    near = nearest(name.strip("'\""), paths) or paths
    hint = ""
    if isinstance(selector, str):
        hint = (
            "; a string is a regular expression for the whole leaf path: to select by name, write a sequence, "
            f"({selector!r},)"
        )
    return f"`{argument}` entry {name} matches no leaf{hint}. Nearest paths: {listed(near)}"
