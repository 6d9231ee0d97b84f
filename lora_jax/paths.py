"""Leaf paths: trees to tables by path and back, random keys from paths, and what the names in a path say of a leaf."""

from __future__ import annotations

import collections
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

from .errors import ArgumentError, ArgumentTypeError
from .text import listed
from .types import Leaf, LeafPath, PyTree, TreeDef
from .weights import is_adapted

# Limits on what `nearest` compares, since comparing takes the product of the lengths: characters of a path, and paths.
_MAX_CHARACTERS = 200
_MAX_PATHS = 1_000

# Last words of the names of biases and of norms' scales: vectors, even where a stack or a split into heads gives them a
# second axis.
BIAS_NAMES = frozenset({"bias", "biases", "b", "beta", "offset"})
NORM_NAMES = frozenset({"scale", "gamma"})
# Last words of names that begin with `bias` without naming one: `bias_proj` is a weight.
_NO_BIAS_ENDS = frozenset(
    {*NORM_NAMES, "proj", "projection", "kernel", "weight", "weights", "w", "table", "embedding", "embeddings", "mask"}
)
# Words before the last one that make a name a weight's: `w_beta` and `to_gamma` project to a shift and a scale.
_WEIGHTS = frozenset({"w", "weight", "weights", "kernel", "to", "proj", "projection"})
# Words of tables over positions: `rel_pos_bias` is one.
_POSITIONS = frozenset({"rel", "relative", "pos", "position", "positional"})
# Modules that normalize: `norm`, `LayerNorm_0`, `final_layernorm`, `q_norm`, `norm1`, `ln_1`, `bn1`; not `normal`.
_NORM = re.compile(r".*norms?(?![a-z]).*|(.*_)?[lbg]n\d*(_.*)?", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def _segment(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    return str(key).strip(".[]'\"")


def _is_box(node: object) -> bool:
    """Whether Flax has wrapped a leaf: `nnx.Variable`, `nn.Partitioned`. Methods tell, so that Flax stays optional."""
    cls = type(node)
    return hasattr(cls, "get_raw_value") or hasattr(cls, "replace_boxed")


def flatten_with_paths(tree: PyTree) -> tuple[list[LeafPath], list[Leaf], TreeDef]:
    """Flattens `tree` into `(paths, leaves, treedef)`; an adapted weight is one leaf.

    A path joins the keys with `"/"`, without the key of a Flax box (`value`).
    """
    paths: list[LeafPath] = []
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


def leaf_paths(tree: PyTree) -> list[LeafPath]:
    """Paths of the leaves of `tree`, in flattening order; an adapted weight is one leaf.

    Example:
        >>> leaf_paths({"layers": [{"kernel": 1.0, "bias": 2.0}]})
        ['layers/0/bias', 'layers/0/kernel']
    """
    return flatten_with_paths(tree)[0]


def leaves_by_path(tree: PyTree) -> dict[LeafPath, Leaf]:
    """`{path: leaf}` in flattening order.

    Raises:
        ValueError: Two leaves share a path, so that no name could tell them apart.
        TypeError: See `require_arrays`.
    """
    paths, leaves, _ = flatten_with_paths(tree)
    require_arrays(paths, leaves)
    table = dict(zip(paths, leaves, strict=True))
    if len(table) != len(paths):
        twice = sorted(path for path, count in collections.Counter(paths).items() if count > 1)
        raise ArgumentError(f"more than one leaf has the path {listed(twice)}: rename one of the keys")
    return table


def require_arrays(paths: Sequence[LeafPath], leaves: Sequence[Leaf]) -> None:
    """Refuses arrays of other libraries, which JAX converts in some places and doesn't trace in others.

    Raises:
        TypeError: A leaf is a Keras variable, a PyTorch tensor or the like; the message names it.
    """
    for path, leaf in zip(paths, leaves, strict=True):
        if _is_foreign_array(leaf):
            cls = type(leaf)
            keras = " (for a Keras variable, `leaf.value`)" if hasattr(cls, "value") else ""
            raise ArgumentTypeError(
                f"the leaf at `{path}` must be a JAX or NumPy array, got a {cls.__module__.partition('.')[0]} "
                f"{cls.__name__}: convert such leaves first, `jax.tree.map(jnp.asarray, params)`{keras}"
            )


def _is_foreign_array(leaf: Leaf) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_adapted(leaf):
        return False
    return any(hasattr(type(leaf), name) for name in ("__jax_array__", "__array__"))


def is_random_key(leaf: Leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def require_key(key: object, argument: str = "key") -> None:
    """Refuses anything but one random key.

    Raises:
        TypeError: `key` is a seed, an array of keys, or another object; the message names the argument.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = is_random_key(key) and shape == ()
    older = dtype == np.uint32 and shape is not None and len(shape) == 1  # `jax.random.PRNGKey`
    if not typed and not older:
        shown = f"an array {dtype} {shape}" if shape is not None and dtype is not None else repr(key)
        raise ArgumentTypeError(f"`{argument}` must be one random key, such as `jax.random.key(0)`, got {shown:.200}")


def with_leaves(tree: PyTree, new: Mapping[LeafPath, Leaf]) -> PyTree:
    """A copy of nested dicts with the leaves of `new` added; the tree's own leaves stay the same objects.

    Raises:
        ValueError: A path leads through something that is no dict, or to something that exists already.

    Example:
        >>> with_leaves({"a": {"b": 1}}, {"a/c/d": 2})
        {'a': {'b': 1, 'c': {'d': 2}}}
    """
    if not new:
        return tree
    if not isinstance(tree, dict):
        raise ArgumentError(
            f"`{next(iter(new))}` can't be inserted into a {type(tree).__name__}: only nested dicts take new leaves"
        )
    below: dict[str, dict[LeafPath, Leaf]] = {}
    for path, leaf in new.items():
        name, _, rest = path.partition("/")
        below.setdefault(name, {})[rest] = leaf
    result = dict(tree)
    for name, leaves in below.items():
        if "" not in leaves:
            result[name] = with_leaves(tree.get(name, {}), leaves)
        elif name in tree or len(leaves) > 1:
            raise ArgumentError(f"`{name}` exists already")
        else:
            result[name] = leaves[""]
    return result


def without_leaves(tree: PyTree, drop: Callable[[Leaf], bool]) -> PyTree:
    """Nested dicts without the leaves for which `drop` is true, and without the dicts that held nothing else."""
    kept = {}
    for name, child in tree.items():
        if isinstance(child, dict):
            below = without_leaves(child, drop)
            if below or not child:
                kept[name] = below
        elif not drop(child):
            kept[name] = child
    return kept


def path_key(key: jax.Array, path: LeafPath) -> jax.Array:
    """The random key of the leaf at `path`: it depends on `key` and the path alone, so no other leaf changes it.

    Raises:
        TypeError: `key` is no random key.
    """
    require_key(key)
    digest = hashlib.blake2s(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "big"))


def leaf_name(path: LeafPath) -> str:
    return path.rpartition("/")[2]


def words(name: str) -> list[str]:
    """The words of a path's segment, without numbers and in lower case; single letters keep their case.

    Example:
        >>> words("bias_ih_l0"), words("dtBias"), words("B1"), words("debias")
        (['bias', 'ih', 'l'], ['dt', 'bias'], ['B'], ['debias'])
    """
    return [word.lower() if len(word) > 1 else word for word in _WORD.findall(name)]


def is_bias_name(path: LeafPath) -> bool:
    """Whether a leaf has a bias's name, judged by the words of the last segment of its path.

    A bias's name ends in `bias`, `beta` or `offset` (`q_bias`, `dtBias`, `norm_beta`), begins with `bias` (`bias_n`,
    `bias_ih_l0`), or is `b` with or without a number (`b`, `b1`). It doesn't end like a weight's (`bias_proj`) or a
    norm's scale, and doesn't speak of positions: `rel_pos_bias` is a table.

    Example:
        >>> [name for name in ("q_bias", "bias_n", "b2", "b_in", "bias_proj", "rel_pos_bias", "debias") if
        ...  is_bias_name(f"layer/{name}")]
        ['q_bias', 'bias_n', 'b2']
    """
    named = words(leaf_name(path))
    if not named or _POSITIONS.intersection(named):
        return False
    if named[-1] in BIAS_NAMES:
        return (named[-1] != "b" or len(named) == 1) and (
            named[-1].startswith("bias") or not _speaks_of_a_weight(named)
        )
    return named[0] in ("bias", "biases") and named[-1] not in _NO_BIAS_ENDS


def is_scale_name(path: LeafPath) -> bool:
    """Whether a leaf has the name of a norm's scale: `scale`, `gamma`, `ln_scale`; not `w_gamma`, which is a weight."""
    named = words(leaf_name(path))
    return bool(NORM_NAMES.intersection(named[-1:])) and not _speaks_of_a_weight(named)


def _speaks_of_a_weight(named: list[str]) -> bool:
    return not _WEIGHTS.isdisjoint(word.lower() for word in named[:-1])


def is_weight_name(path: LeafPath) -> bool:
    return not is_bias_name(path) and not is_scale_name(path)


def in_norm(path: LeafPath) -> bool:
    """Whether a leaf's module has the name of a normalization."""
    segments = [segment for segment in path.split("/")[:-1] if not segment.isdecimal()]  # `norms/0` is one too
    return bool(segments) and _NORM.fullmatch(segments[-1]) is not None


def shape_text(leaf: Leaf) -> str:
    """The shape of an array, or the type of anything else, for messages."""
    return str(tuple(leaf.shape)) if hasattr(leaf, "shape") else type(leaf).__name__


def nearest(name: str, paths: Iterable[LeafPath], count: int = 5) -> list[LeafPath]:
    """The paths most similar to `name`, which is compared with their suffixes of as many segments.

    Among too many paths, only those that share most segments with `name` are compared; of long ones, only the ends.
    """
    name = name.strip("/")[-_MAX_CHARACTERS:]
    wanted = set(name.split("/"))
    paths = list(paths)
    if len(paths) > _MAX_PATHS:
        paths = heapq.nlargest(_MAX_PATHS, paths, key=lambda path: len(wanted.intersection(path.split("/"))))
    depth = name.count("/") + 1

    def likeness(path: str) -> float:
        segments = path[-_MAX_CHARACTERS:].split("/")
        tails = {"/".join(segments[i : i + depth]) for i in range(max(1, len(segments) - depth + 1))}
        return max(difflib.SequenceMatcher(None, name, tail).ratio() for tail in tails)

    scored = heapq.nsmallest(count, ((-likeness(path), path) for path in paths))
    return [path for score, path in scored if -score > 0.5]
