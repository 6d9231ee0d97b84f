"""Leaf paths, keys drawn from them, and the one rule by which every method selects leaves."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from .errors import ArgumentError, ArgumentTypeError, LoraJaxError
from .text import listed
from .weights import is_adapted

_COMPARED = 200  # characters of a path, and
_MOST_COMPARED = 1_000  # paths: comparing takes the product of the lengths

# A regular expression, names, or a free predicate: see `select`.
Selector = str | Sequence[str] | Callable[[str, Any], bool]

# Last words of a name that is a bias's, and of one that is a norm's scale: vectors, even where a stack or a split into
# heads gives them a second axis.
BIAS_NAMES = frozenset({"bias", "biases", "b", "beta", "offset"})
NORM_NAMES = frozenset({"scale", "gamma"})
# What a name that begins with `bias` is in truth if it ends so; and what says that it is a table over relative places.
_NO_BIAS_ENDS = frozenset(
    {*NORM_NAMES, "proj", "projection", "kernel", "weight", "weights", "w", "table", "embedding", "embeddings", "mask"}
)
# What says of a `w_beta` or a `to_gamma` that it makes one, rather than is one.
_WEIGHTS = frozenset({"w", "weight", "weights", "kernel", "to", "proj", "projection"})
_PLACES = frozenset({"rel", "relative", "pos", "position", "positional"})
# `norm`, `LayerNorm_0`, `final_layernorm`, `q_norm`, `norm1`; `ln_1`, `bn1`. Not `normal`.
_NORM = re.compile(r".*norms?(?![a-z]).*|(.*_)?[lbg]n\d*(_.*)?", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


class SelectionError(LoraJaxError):
    """A selector that matches nothing, or something that it may not match."""


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """Stands in a table of leaves where a tree has state, which no method trains: see `state.marked_leaves`.

    Attributes:
        leaf: what the tree has there.
        kind: what state it is, for messages.
    """

    leaf: Any
    kind: str


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
        TypeError: see `require_arrays`.
    """
    paths, leaves, _ = flatten_with_paths(tree)
    require_arrays(paths, leaves)
    table = dict(zip(paths, leaves, strict=True))
    if len(table) != len(paths):
        twice = sorted(path for path, count in collections.Counter(paths).items() if count > 1)
        raise ArgumentError(f"these leaf paths stand for more than one leaf: {listed(twice)}; rename one of the keys")
    return table


def require_arrays(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Refuses arrays of other libraries, which JAX converts in some places and doesn't trace in others.

    Raises:
        TypeError: a leaf is a Keras variable, a PyTorch tensor or the like; the message names it.
    """
    for path, leaf in zip(paths, leaves, strict=True):
        if _is_foreign_array(leaf):
            cls = type(leaf)
            keras = " (of a Keras variable, `leaf.value`)" if hasattr(cls, "value") else ""
            raise ArgumentTypeError(
                f"the leaf at `{path}` must be a JAX or NumPy array, got a {cls.__module__.partition('.')[0]} "
                f"{cls.__name__}: convert such leaves first, `jax.tree.map(jnp.asarray, params)`{keras}"
            )


def _is_foreign_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_adapted(leaf):
        return False
    return any(hasattr(type(leaf), name) for name in ("__jax_array__", "__array__"))


def is_random_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def require_key(key: Any, argument: str = "key") -> None:
    """Refuses what is no random key.

    Raises:
        TypeError: it is a seed, an array of keys, or another object; the message names the argument.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = is_random_key(key) and shape == ()
    older = dtype == np.uint32 and shape is not None and len(shape) == 1  # `jax.random.PRNGKey`
    if not typed and not older:
        shown = f"an array {dtype} {shape}" if shape is not None and dtype is not None else repr(key)
        raise ArgumentTypeError(f"`{argument}` must be one random key, such as `jax.random.key(0)`, got {shown:.200}")


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
        raise ArgumentError(
            f"{next(iter(new))} can't be inserted into a {type(tree).__name__}: nested dicts are expected"
        )
    below: dict[str, dict[str, Any]] = {}
    for path, leaf in new.items():
        name, _, rest = path.partition("/")
        below.setdefault(name, {})[rest] = leaf
    result = dict(tree)
    for name, leaves in below.items():
        if "" not in leaves:
            result[name] = with_leaves(tree.get(name, {}), leaves)
        elif name in tree or len(leaves) > 1:
            raise ArgumentError(f"there is something at {name!r} already")
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
    """The random key of the leaf at `path`: it depends on `key` and the path alone, so no other leaf changes it.

    Raises:
        TypeError: `key` is no random key.
    """
    require_key(key)
    digest = hashlib.blake2s(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "big"))


def leaf_name(path: str) -> str:
    return path.rpartition("/")[2]


def words(name: str) -> list[str]:
    """The words of a path's segment, without numbers, in small letters; but for single letters, `B` is not `b`.

    Example:
        >>> words("bias_ih_l0"), words("dtBias"), words("B1"), words("debias")
        (['bias', 'ih', 'l'], ['dt', 'bias'], ['B'], ['debias'])
    """
    return [word.lower() if len(word) > 1 else word for word in _WORD.findall(name)]


def is_bias_name(path: str) -> bool:
    """Whether a leaf is named as biases are: by the words of the last segment of its path.

    It is one whose last word is `bias`, `beta` or `offset` (`q_bias`, `dtBias`, `norm_beta`), or whose first word is
    `bias` (`bias_n`, `bias_ih_l0`), or that is `b` with or without a number (`b`, `b1`). It is none if it ends like a
    weight (`bias_proj`) or a norm's scale, or if it speaks of positions: `rel_pos_bias` is a table.

    Example:
        >>> [name for name in ("q_bias", "bias_n", "b2", "b_in", "bias_proj", "rel_pos_bias", "debias") if
        ...  is_bias_name(f"layer/{name}")]
        ['q_bias', 'bias_n', 'b2']
    """
    named = words(leaf_name(path))
    if not named or _PLACES.intersection(named):
        return False
    if named[-1] in BIAS_NAMES:
        return (named[-1] != "b" or len(named) == 1) and (
            named[-1].startswith("bias") or not _speaks_of_a_weight(named)
        )
    return named[0] in ("bias", "biases") and named[-1] not in _NO_BIAS_ENDS


def is_scale_name(path: str) -> bool:
    """Whether a leaf is named as a norm's scale is: `scale`, `gamma`, `ln_scale`; not `w_gamma`, a weight."""
    named = words(leaf_name(path))
    return bool(NORM_NAMES.intersection(named[-1:])) and not _speaks_of_a_weight(named)


def _speaks_of_a_weight(named: list[str]) -> bool:
    return not _WEIGHTS.isdisjoint(word.lower() for word in named[:-1])


def is_weight_name(path: str) -> bool:
    return not is_bias_name(path) and not is_scale_name(path)


def in_norm(path: str) -> bool:
    """Whether a leaf's module is named as normalizations are."""
    segments = [segment for segment in path.split("/")[:-1] if not segment.isdecimal()]  # `norms/0` is one, too
    return bool(segments) and _NORM.fullmatch(segments[-1]) is not None


def matches_entry(path: str, entry: str, *, below: bool = False) -> bool:
    """Whether a name of a selector's sequence means the leaf at `path`.

    An entry is a whole-segment suffix of the leaf path or of its module path; with `below`, also of any other path
    above the leaf. A leading `"/"` anchors the entry at the root. The segments that Haiku puts between a module and
    one that it made elsewhere than in its call (`~`, `~encode`) may be left out, unless the entry is anchored.

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
    """Which leaves an entry may mean, so that each entry isn't held against each leaf: saved methods name every one."""

    def __init__(self, leaves: Iterable[str], *, below: bool) -> None:
        self._below = below
        self._rooted: dict[str, list[str]] = {}
        self._by_segment: dict[str, list[str]] = {}
        for path in leaves:
            segments = path.split("/")
            ends = range(1 if below else max(1, len(segments) - 1), len(segments) + 1)
            for end in ends:
                self._rooted.setdefault("/".join(segments[:end]), []).append(path)
            near = {segments[end - 1] for end in ends}
            if "~" in path:  # an entry may leave these out
                short = [segment for segment in segments if not segment.startswith("~")]
                near.update(short if below else short[-2:])
            for segment in near:
                self._by_segment.setdefault(segment, []).append(path)

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
        matched = {path for path, leaf in leaves.items() if selector(path, unmarked(leaf))}
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
            shown = [f"{path} {_described(leaves[path])}" for path in sorted(matched)]
            is_state = any(isinstance(leaves[path], StateLeaf) for path in matched)
            hint = ". State changes by what a function does, and no optimizer trains it" if is_state else ""
            raise SelectionError(f"`{argument}` entry {name} matches no {kind}, only {listed(shown)}{hint}")
        chosen |= usable
    return [path for path in leaves if path in chosen]


def unmarked(leaf: Any) -> Any:
    """What the tree has in a leaf's place, be it marked as state or not."""
    return leaf.leaf if isinstance(leaf, StateLeaf) else leaf


def shape_text(leaf: Any) -> str:
    if isinstance(leaf, StateLeaf):
        return f"{shape_text(leaf.leaf)} (state: {leaf.kind})"
    return str(tuple(leaf.shape)) if hasattr(leaf, "shape") else type(leaf).__name__


def _described(leaf: Any) -> str:
    """The shape, and the dtype where that may be why the leaf wasn't taken."""
    dtype = getattr(leaf, "dtype", None)
    return shape_text(leaf) if dtype is None or jnp.issubdtype(dtype, jnp.inexact) else f"{shape_text(leaf)} {dtype}"


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
