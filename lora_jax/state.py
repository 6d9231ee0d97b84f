"""Which leaves of a tree are no parameters, but state that a function carries from call to call.

State is batch statistics, caches, random streams, step counters: what a call reads and leaves changed behind. No
optimizer may train it: weight decay alone would shrink a variance to nothing. Each library has its own way to tell state
from parameters, and all of them are known here by names, so none has to be installed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .paths import BIAS_NAMES, NORM_NAMES, StateLeaf, flatten_with_paths, leaf_name, leaves_by_path, listed
from .weights import is_adapted


class StateWarning(UserWarning):
    """State stands among parameters, where a function's changes of it are lost, or where it can't be told from them."""


class _Kind(NamedTuple):
    """Of a leaf of state.

    Attributes:
        name: what its own library calls it, for messages.
        lasts: whether it is worth keeping with what was trained: statistics are, caches and random streams aren't.
        in_place: whether a call changes it in place, so that a pure function loses the change without a word.
    """

    name: str
    lasts: bool
    in_place: bool = False


# Flax Linen keeps what isn't a parameter in collections beside `params`. Modules name theirs as they like; of these it
# is plain what they are.
_COLLECTION = re.compile(
    r"(.*_)?(caches?|intermediates|perturbations|loss(es)?|metrics|rngs?|opt(imizer)?(_state)?|steps?|axes)"
    r"|(?P<lasts>(.*_)?(stats?|statistics|state|ema|moving|running|counts?|counters?|buffers?)"
    r"|(ema|moving|running)_.*|_overwrite_with_gradient)"
)
# NNX variables that aren't worth keeping.
_PASSING = {"Cache", "Intermediate", "RngState", "OptState", "MetricState"}
# Statistics by the names that they have wherever a tree has no other sign of them: PyTorch's, Keras', Haiku's.
_STATISTIC = re.compile(
    r"(.*/)?((running|moving)_(mean|var|variance)|num_batches_tracked|\w*_ema/(average|hidden|counter))"
)
_CACHE_NAMES = {"cached_key", "cached_value", "cache_index"}
_NORM_MODULE = re.compile(r"norm|(^|_)bn(\d|_|$)", re.IGNORECASE)


def marked_leaves(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` as a method is to see it: a `StateLeaf` in place of each leaf that is state.

    Raises:
        ValueError, TypeError: see `leaves_by_path`.

    Example:
        >>> variables = {"params": {"bn": {"scale": 1.0}}, "batch_stats": {"bn": {"mean": 0.0}}}
        >>> marked_leaves(variables)["batch_stats/bn/mean"].kind
        'Linen collection `batch_stats`'
    """
    leaves = leaves_by_path(tree)
    kinds = _kinds(tree)
    return {path: StateLeaf(leaf, kinds[path].name) if path in kinds else leaf for path, leaf in leaves.items()}


def state_paths(tree: Any) -> set[str]:
    """Paths of the leaves that are state."""
    return set(_kinds(tree))


def lasting_state(tree: Any) -> dict[str, Any]:
    """The state that is worth keeping with what was trained, by path: its arrays, without caches and random streams."""
    leaves = leaves_by_path(tree)
    return {path: leaves[path] for path, kind in _kinds(tree).items() if kind.lasts and hasattr(leaves[path], "shape")}


def lost_state(tree: Any) -> str | None:
    """Says which state a pure function of `tree` would lose its changes of, and what to do; `None` if there is none."""
    lost = {path: kind.name for path, kind in _kinds(tree).items() if kind.in_place}
    if not lost:
        return None
    shown = listed([f"{path} ({name})" for path, name in lost.items()], most=4)
    return (
        f"`params` has state beside parameters: {shown}. A function of `params` can't hand back what it changes there: "
        "statistics stay as they are, and dropout draws the same mask at every call. Split the model in three, "
        "`graph, params, state = nnx.split(model, nnx.Param, ...)`, let the function take and return `state`, and save it "
        'with `lj.save_adapter(..., state=state)`: docs/recipes.md, "State", has the lines. Where it is to stay as it '
        "is, pass it apart all the same, or filter `lj.StateWarning`"
    )


def unknown_collections(paths: Mapping[str, Any]) -> dict[str, str]:
    """`{path: collection}` of the leaves that stand beside `params`, where Linen keeps state, under a name of their own.

    They may be a task's head just as well, so they count as parameters.
    """
    found = dict(_collections(paths))
    return {path: name for path, name in found.items() if not _COLLECTION.fullmatch(name)}


def _kinds(tree: Any) -> dict[str, _Kind]:
    """What each leaf of state is, by path. An adapted weight is none, whatever it stands for."""
    paths, leaves, _ = flatten_with_paths(tree)
    held = _held(tree)
    named = _named(dict(zip(paths, leaves, strict=True)))
    kinds = {}
    for path, leaf, holder in zip(paths, leaves, held, strict=True):
        kind = holder if holder is not None else named.get(path)
        if isinstance(kind, _Kind) and not is_adapted(leaf):
            kinds[path] = kind
    return kinds


# By the object that holds a leaf.


def _held(tree: Any) -> Iterator[_Kind | str | None]:
    """For each leaf what its holder says of it: a kind of state, "parameter", or `None` where there is no such holder."""
    entries, _ = jax.tree.flatten(tree, is_leaf=lambda node: is_adapted(node) or _holder(node) is not None)
    return itertools.chain.from_iterable(
        itertools.repeat(None if is_adapted(entry) else _holder(entry), len(jax.tree.leaves(entry, is_leaf=is_adapted)))
        for entry in entries
    )


def _holder(node: Any) -> _Kind | str | None:
    cls = type(node)
    library = cls.__module__.partition(".")[0]
    if library == "equinox" and cls.__name__ in ("State", "StateIndex"):
        # What an index holds is the value that a `State` begins with.
        return _Kind(f"equinox.nn.{cls.__name__}", lasts=cls.__name__ == "State")
    if library == "optax" and cls.__name__.endswith("State"):
        return _Kind(f"optax.{cls.__name__}", lasts=False)
    bases = {base.__name__ for base in cls.__mro__ if base.__module__.startswith("flax.nnx.")}
    if "Variable" not in bases:
        return None
    if "Param" in bases:
        return "parameter"
    return _Kind(f"nnx.{cls.__name__}", lasts=not bases & _PASSING, in_place=True)


# By its path and what is beside it.


def _named(leaves: Mapping[str, Any]) -> dict[str, _Kind]:
    kinds = {path: _Kind("batch statistics", lasts=True) for path in leaves if _STATISTIC.fullmatch(path)}
    kinds |= {path: _Kind("a cache", lasts=False) for path in leaves if leaf_name(path) in _CACHE_NAMES}
    for path, collection in _collections(leaves):
        if match := _COLLECTION.fullmatch(collection):
            kinds[path] = _Kind(f"Linen collection `{collection}`", lasts=match["lasts"] is not None)
    for module, names in _modules(leaves).items():
        # An NNX state as plain dicts: its types are gone, and the names are left.
        for name in () if "params" in module.split("/") else _moments(module, names):
            kinds[names[name]] = _Kind("batch statistics", lasts=True, in_place=True)
        for name in ("key", "count"):
            if "count" in names and "key" in names and _is_random_key(leaves[names["key"]]):
                kinds[names[name]] = _Kind("a random stream", lasts=False, in_place=True)
    random = [path for path, leaf in leaves.items() if path not in kinds and _is_random_key(leaf)]
    return kinds | dict.fromkeys(random, _Kind("a random key", lasts=False))


def _collections(paths: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each path below something that stands beside `params`, with that one's name."""
    roots = {path[: match.start()] for path in paths for match in re.finditer(r"(?<![^/])params/", path)}
    for path in paths if roots else ():
        segments = path.split("/")
        for depth, segment in enumerate(segments):
            above = "".join(name + "/" for name in segments[:depth])
            if above in roots and segment != "params":
                yield path, segment


def _modules(leaves: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`{module: {name: path}}` of what lies at its own level."""
    modules: dict[str, dict[str, str]] = {}
    for path in leaves:
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = path
    return modules


def _moments(module: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """`mean` and `var` of a module that is plainly a normalization, not a distribution's parameters."""
    variance = next((name for name in ("var", "variance") if name in names), None)
    if "mean" not in names or variance is None:
        return ()
    is_norm = _NORM_MODULE.search(leaf_name(module)) or names.keys() & (BIAS_NAMES | NORM_NAMES)
    return ("mean", variance) if is_norm else ()


def _is_random_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
