"""Leaf paths, keys drawn from them, and the one rule by which every method selects leaves."""

from __future__ import annotations

import collections
import difflib
import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from .text import clipped
from .weights import is_adapted

_COMPARED = 200  # characters of a path, and
_MOST_COMPARED = 1_000  # paths: comparing takes the product of the lengths

# A regular expression, names, or a free predicate: see `select`.
Selector = str | Sequence[str] | Callable[[str, Any], bool]

# Last path segments that the JAX libraries give to biases, and to the other vectors that are no weight even when a
# stack or a split into heads gives them a second axis.
BIAS_NAMES = frozenset({"bias", "b", "beta", "offset"})
NORM_NAMES = frozenset({"scale", "gamma"})


class SelectionError(ValueError):
    """A selector that matches nothing, or something that it may not match."""


def _segment(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    return str(key).strip(".[]'\"")


def _is_box(node: Any) -> bool:
    """Flax wraps a leaf in a box: `nnx.Variable`, `nn.Partitioned`. Known by their methods, so Flax stays optional."""
    cls = type(node)
    return hasattr(cls, "get_raw_value") or hasattr(cls, "replace_boxed")


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Flattens `tree`, adapted weights being leaves, into `(paths, leaves, treedef)`.

    A path joins the keys with `"/"`; what a Flax box adds below its own place (`value`) is dropped.
    """
    paths = []
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: is_adapted(node) or _is_box(node))
    for key_path, entry in entries:
        path = "/".join(map(_segment, key_path))
        if is_adapted(entry) or not _is_box(entry):
            paths.append(path)
            continue
        inside, _ = jax.tree_util.tree_flatten_with_path(entry, is_leaf=is_adapted)
        if len(inside) == 1:
            paths.append(path)
        else:
            paths += ["/".join([path, *map(_segment, inner)]) for inner, _ in inside]
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_adapted)
    return paths, leaves, treedef


def leaf_paths(tree: Any) -> list[str]:
    """The path of every leaf of `tree`, in flattening order; an adapted weight counts as one leaf.

    Example:
        >>> leaf_paths({"layers": [{"kernel": 1.0, "bias": 2.0}]})
        ['layers/0/bias', 'layers/0/kernel']
    """
    return flatten_with_paths(tree)[0]


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` in flattening order.

    Raises:
        ValueError: two leaves share a path, so that no name could tell them apart.
    """
    paths, leaves, _ = flatten_with_paths(tree)
    table = dict(zip(paths, leaves, strict=True))
    if len(table) != len(paths):
        twice = sorted(path for path, count in collections.Counter(paths).items() if count > 1)
        raise ValueError(f"these leaf paths stand for more than one leaf: {listed(twice)}; rename one of the keys")
    return table


def with_leaves(tree: Any, new: Mapping[str, Any]) -> Any:
    """A copy of nested dicts with more leaves, by path; what was there stays the same objects.

    Raises:
        ValueError: a path leads through something that is no dict, or to something that is there already.

    Example:
        >>> with_leaves({"a": {"b": 1}}, {"a/c/d": 2})
        {'a': {'b': 1, 'c': {'d': 2}}}
    """
    if not new:
        return tree
    if not isinstance(tree, dict):
        raise ValueError(f"{next(iter(new))} can't be inserted into a {type(tree).__name__}: nested dicts are expected")
    below: dict[str, dict[str, Any]] = {}
    for path, leaf in new.items():
        name, _, rest = path.partition("/")
        below.setdefault(name, {})[rest] = leaf
    result = dict(tree)
    for name, leaves in below.items():
        if "" not in leaves:
            result[name] = with_leaves(tree.get(name, {}), leaves)
        elif name in tree or len(leaves) > 1:
            raise ValueError(f"there is something at {name!r} already")
        else:
            result[name] = leaves[""]
    return result


def without_leaves(tree: Any, drop: Callable[[Any], bool]) -> Any:
    """Nested dicts without the leaves that `drop` takes, and without the dicts that held nothing else."""
    kept = {}
    for name, child in tree.items():
        if isinstance(child, dict):
            below = without_leaves(child, drop)
            if below or not child:
                kept[name] = below
        elif not drop(child):
            kept[name] = child
    return kept


def path_key(key: jax.Array, path: str) -> jax.Array:
    """The random key of the leaf at `path`: it depends on `key` and the path alone, so no other leaf changes it."""
    digest = hashlib.blake2s(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "big"))


def leaf_name(path: str) -> str:
    return path.rpartition("/")[2]


def is_bias_name(path: str) -> bool:
    return leaf_name(path) in BIAS_NAMES


def is_weight_name(path: str) -> bool:
    return leaf_name(path) not in BIAS_NAMES | NORM_NAMES


def matches_entry(path: str, entry: str, *, below: bool = False) -> bool:
    """Whether a name of a selector's sequence means the leaf at `path`.

    An entry is a whole-segment suffix of the leaf path or of its module path; with `below`, also of any other path
    above the leaf. A leading `"/"` anchors the entry at the root.

    Example:
        >>> matches_entry("encoder/attention/query/kernel", "attention/query")
        True
        >>> matches_entry("encoder/attention/subquery/kernel", "query")
        False
        >>> matches_entry("head/dense/out/kernel", "head"), matches_entry("head/dense/out/kernel", "head", below=True)
        (False, True)
    """
    segments = path.split("/")
    wanted = entry.strip("/").split("/")
    shortest = 1 if below else max(1, len(segments) - 1)
    for end in range(shortest, len(segments) + 1):
        start = end - len(wanted)
        if start >= 0 and segments[start:end] == wanted and (start == 0 or not entry.startswith("/")):
            return True
    return False


class _Index:
    """Which leaves an entry may mean, so that each entry isn't held against each leaf: saved methods name every one."""

    def __init__(self, leaves: Iterable[str], *, below: bool) -> None:
        self._below = below
        self._rooted: dict[str, list[str]] = {}
        self._by_segment: dict[str, list[str]] = {}
        for path in leaves:
            segments = path.split("/")
            for end in range(1 if below else max(1, len(segments) - 1), len(segments) + 1):
                self._rooted.setdefault("/".join(segments[:end]), []).append(path)
                self._by_segment.setdefault(segments[end - 1], []).append(path)

    def matches(self, entry: str) -> set[str]:
        name = entry.strip("/")
        near = self._rooted.get(name) if entry.startswith("/") else self._by_segment.get(name.rpartition("/")[2])
        return {path for path in near or () if matches_entry(path, entry, below=self._below)}


def select(
    leaves: Mapping[str, Any],
    selector: Selector,
    *,
    argument: str,
    eligible: Callable[[str, Any], bool],
    kind: str,
    below: bool = False,
) -> list[str]:
    """The paths that `selector` chooses among the eligible leaves, in tree order.

    One rule for every method. A **string** is a regular expression that must match the *whole* leaf path. A **sequence
    of strings** names things: see `matches_entry`. A **callable** `(path, leaf) -> bool` is free. Every entry must
    match something.

    Args:
        leaves: the tree's leaves by path.
        selector: what to choose.
        argument: the argument's name, for messages.
        eligible: which leaves may be chosen at all.
        kind: what an eligible leaf is called, for messages: "weight", "bias", "leaf".
        below: names choose everything at or below them.

    Raises:
        SelectionError: an entry matches nothing, or nothing that is eligible.
    """
    if callable(selector):
        matched = {path for path, leaf in leaves.items() if selector(path, leaf)}
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
    chosen: set[str] = set()
    for name, matched in entries:
        usable = {path for path in matched if eligible(path, leaves[path])}
        if not matched:
            raise SelectionError(_nothing_matched(argument, name, selector, leaves, eligible))
        if not usable:
            shown = [f"{path} {shape_text(leaves[path])}" for path in sorted(matched)]
            raise SelectionError(f"`{argument}` entry {name} matches no {kind}, only {listed(shown)}")
        chosen |= usable
    return [path for path in leaves if path in chosen]


def shape_text(leaf: Any) -> str:
    return str(tuple(leaf.shape)) if hasattr(leaf, "shape") else type(leaf).__name__


def _nothing_matched(
    argument: str,
    name: str,
    selector: Selector,
    leaves: Mapping[str, Any],
    eligible: Callable[[str, Any], bool],
) -> str:
    paths = [path for path, leaf in leaves.items() if eligible(path, leaf)] or list(leaves)
    near = nearest(name.strip("'\""), paths) or paths
    hint = ""
    if isinstance(selector, str):
        hint = (
            "; a string is a regular expression for the whole leaf path, "
            f"to choose by name write a sequence: ({selector!r},)"
        )
    return f"`{argument}` entry {name} matches no leaf{hint}. Nearest paths: {listed(near)}"


def nearest(name: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """The paths that look most like `name`, compared with each of their suffixes of the same number of segments.

    Of many paths, those are compared that share most segments with it; of long ones, the ends.
    """
    name = name.strip("/")[-_COMPARED:]
    wanted = set(name.split("/"))
    paths = list(paths)
    if len(paths) > _MOST_COMPARED:
        paths = heapq.nlargest(_MOST_COMPARED, paths, key=lambda path: len(wanted.intersection(path.split("/"))))
    depth = name.count("/") + 1

    def likeness(path: str) -> float:
        segments = path[-_COMPARED:].split("/")
        tails = {"/".join(segments[i : i + depth]) for i in range(max(1, len(segments) - depth + 1))}
        return max(difflib.SequenceMatcher(None, name, tail).ratio() for tail in tails)

    scored = heapq.nsmallest(count, ((-likeness(path), path) for path in paths))
    return [path for score, path in scored if -score > 0.5]


def listed(items: Sequence[str], most: int = 8) -> str:
    """The first of `items`, long ones without their middle, and how many more there are."""
    rest = len(items) - most
    return ", ".join(map(clipped, items[:most])) + (f" and {rest} more" if rest > 0 else "")
