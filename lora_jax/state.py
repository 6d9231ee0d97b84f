"""Which leaves of a tree are no parameters, but state that a function carries from call to call.

State is batch statistics, caches, random streams, step counters: what a call reads and leaves changed behind. No
optimizer may train it: weight decay alone would shrink a variance to nothing. Each library has its own way to tell
state from parameters, and all of them are known here by names, so that none has to be installed.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax

from .paths import BIAS_NAMES, flatten_with_paths, in_norm, is_random_key, leaf_name, leaves_by_path, listed
from .types import Leaf, LeafPath, Params
from .weights import is_adapted


class StateWarning(UserWarning):
    """State among parameters, where a function's changes of it are lost, or what may be state or a parameter."""


class _Kind(NamedTuple):
    """What state a leaf is.

    Attributes:
        name: Its own library's word for it, for messages.
        lasts: Whether it is worth keeping with what was trained: statistics are, caches and random streams aren't.
        in_place: Whether modules change it in place, so that a pure function loses the change without a word. Other
            libraries make functions return it.
    """

    name: str
    lasts: bool
    in_place: bool = False


# What a leaf's holder may say of it beside a kind of state.
_PARAMETER = "parameter"

# Flax Linen keeps what isn't a parameter in collections beside `params`. Modules name theirs as they like; of these
# names it is plain what they mean.
_COLLECTION = re.compile(
    r"(.*_)?(caches?|intermediates|perturbations|loss(es)?|metrics|rngs?|opt(imizer)?(_state)?|steps?|axes)"
    r"|(?P<lasts>(.*_)?(stats?|statistics|state|ema|moving|running|counts?|counters?|buffers?)"
    r"|(ema|moving|running)_.*|_overwrite_with_gradient)"
)
# NNX variables that aren't worth keeping.
_PASSING = {"Cache", "Intermediate", "RngState", "OptState", "MetricState"}
# Batch statistics by the names that they have in PyTorch, Keras and Haiku, where a tree has no other sign of them.
_STATISTIC = re.compile(
    r"(.*/)?((running|moving)_(mean|var|variance)|num_batches_tracked|\w*_ema/(average|hidden|counter))"
)
_CACHE_NAMES = {"cached_key", "cached_value", "cache_index"}


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """Marks state in a table of leaves, so that no method trains it: see `marked_leaves`.

    Attributes:
        leaf: Leaf of the tree.
        kind: Kind of state, for messages.
    """

    leaf: Leaf
    kind: str


def marked_leaves(tree: Params) -> dict[LeafPath, Leaf]:
    """`{path: leaf}` as a method is to see it: a `StateLeaf` in place of each leaf that is state.

    Raises:
        ValueError, TypeError: See `leaves_by_path`.

    Example:
        >>> variables = {"params": {"bn": {"scale": 1.0}}, "batch_stats": {"bn": {"mean": 0.0}}}
        >>> marked_leaves(variables)["batch_stats/bn/mean"].kind
        'Linen collection `batch_stats`'
    """
    leaves, kinds = leaves_by_path(tree), _kinds(tree)
    return {path: StateLeaf(leaf, kinds[path].name) if path in kinds else leaf for path, leaf in leaves.items()}


def state_paths(tree: Params) -> set[str]:
    """Paths of the leaves that are state."""
    return set(_kinds(tree))


def lasting_state(tree: Params) -> dict[LeafPath, Leaf]:
    """The arrays of state that are worth keeping with what was trained, by path: no caches and no random streams."""
    leaves = leaves_by_path(tree)
    arrays = {path: leaves[path] for path, kind in _kinds(tree).items() if kind.lasts}
    return {path: leaf for path, leaf in arrays.items() if hasattr(leaf, "shape") and not is_random_key(leaf)}


def lost_state(tree: Params) -> str | None:
    """Says which state a pure function of `tree` loses its changes of, and what to do; `None` if there is none."""
    lost = [f"{path} ({kind.name})" for path, kind in _kinds(tree).items() if kind.in_place]
    if not lost:
        return None
    return (
        f"`params` holds state beside parameters: {listed(lost, most=4)}. What a module changes there in place, as "
        "Flax NNX's do, is lost: statistics stay as they are, and dropout draws the same mask at every call. Split the "
        "model in three, `graph, params, state = nnx.split(model, nnx.Param, ...)`; let the function take and return "
        '`state`, and save it with `lj.save_adapter(..., state=state)`: "State" in docs/recipes.md has the lines. If '
        "it is to stay as it is, or the function returns what it changes, filter `lj.StateWarning`"
    )


def unknown_collections(tree: Params) -> dict[str, str]:
    """`{path: collection}` of the leaves beside `params`, where Linen keeps state, in collections of another name.

    These may be a task's head just as well, so they count as parameters. A module with an attribute `params` has none.
    """
    if not isinstance(tree, Mapping):
        return {}
    paths, _, _ = flatten_with_paths(tree)
    free = [path for path, held in zip(paths, _held(tree), strict=True) if held is None]
    return {path: name for path, name in _collections(free) if not _COLLECTION.fullmatch(name)}


def _kinds(tree: Params) -> dict[str, _Kind]:
    """What state each leaf is that is any, by path. An adapted weight isn't, whatever it stands for."""
    paths, leaves, _ = flatten_with_paths(tree)
    named = _named(dict(zip(paths, leaves, strict=True)))
    kinds = {}
    for path, leaf, held in zip(paths, leaves, _held(tree), strict=True):
        kind = named.get(path) if held is None else held
        if isinstance(kind, _Kind) and not is_adapted(leaf):
            kinds[path] = kind
    return kinds


# By the object that holds a leaf.


def _held(tree: Params) -> Iterator[_Kind | str | None]:
    """For each leaf what its holder says of it; `None` where there is no holder that would know."""
    entries = jax.tree.leaves(tree, is_leaf=lambda node: is_adapted(node) or _holder(node) is not None)
    for entry in entries:
        count = 1 if is_adapted(entry) else len(jax.tree.leaves(entry, is_leaf=is_adapted))
        yield from itertools.repeat(_holder(entry), count)


def _holder(node: object) -> _Kind | str | None:
    cls = type(node)
    name, library = cls.__name__, cls.__module__.partition(".")[0]
    if library == "equinox" and name in ("State", "StateIndex"):
        return _Kind(f"equinox.nn.{name}", lasts=name == "State")  # an index holds what its `State` begins with
    if library == "optax" and name.endswith("State"):
        return _Kind(f"optax.{name}", lasts=False)
    bases = {base.__name__ for base in cls.__mro__ if base.__module__.startswith("flax.nnx.")}
    if "Variable" not in bases:
        return None
    return _PARAMETER if "Param" in bases else _Kind(f"nnx.{name}", lasts=not bases & _PASSING, in_place=True)


# By its path and what is beside it.


def _named(leaves: Mapping[LeafPath, Leaf]) -> dict[str, _Kind]:
    kinds = {path: _Kind("a random key", lasts=False) for path, leaf in leaves.items() if is_random_key(leaf)}
    kinds |= {path: _Kind("batch statistics", lasts=True) for path in leaves if _STATISTIC.fullmatch(path)}
    kinds |= {path: _Kind("a cache", lasts=False) for path in leaves if leaf_name(path) in _CACHE_NAMES}
    # An NNX state as plain dicts: its types are gone, and the names are left.
    for module, own in _modules(leaves).items():
        if "params" not in module.split("/"):
            kinds |= dict.fromkeys(_moments(module, own), _Kind("batch statistics", lasts=True, in_place=True))
        if {"key", "count"} <= own.keys() and is_random_key(leaves[own["key"]]):
            kinds |= dict.fromkeys((own["key"], own["count"]), _Kind("a random stream", lasts=False, in_place=True))
    for path, collection in _collections(leaves):
        if match := _COLLECTION.fullmatch(collection):
            kinds[path] = _Kind(f"Linen collection `{collection}`", lasts=match["lasts"] is not None)
    return kinds


def _collections(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each path below something that stands beside `params`, with that one's name."""
    paths = list(paths)
    roots = {path[: match.start()] for path in paths for match in re.finditer(r"(?<![^/])params/", path)}
    for path in paths:
        for start in (0, *(match.end() for match in re.finditer("/", path))):
            name = path[start:].partition("/")[0]
            if path[:start] in roots and name != "params":
                yield path, name


def _modules(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """`{module: {name: path}}` of the leaves at each module's own level."""
    modules: dict[str, dict[str, str]] = {}
    for path in paths:
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = path
    return modules


def _moments(module: str, own: Mapping[str, str]) -> list[str]:
    """Mean and variance of a module that is plainly a normalization, and no distribution that learns them."""
    is_norm = in_norm(f"{module}/mean") or own.keys() & BIAS_NAMES
    variances = [own[name] for name in ("var", "variance") if name in own]
    return [own["mean"], *variances] if is_norm and variances and "mean" in own else []
