"""`adapt`: a function of parameters takes adapted parameters, and computes with their factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ..errors import ArgumentError
from ..matmul import STRATEGIES, Strategy
from ..paths import flatten_with_paths
from ..types import Leaf, LeafPath, PyTree, TreeDef
from ..weights import MergedOnEntry, is_adapted, merge_on_entry
from . import jax_compat
from .rules import RULES
from .walk import Encounter, OnMaterialize, Traced, Walker


def walk_function(
    fn: Callable[..., PyTree], walker: Walker, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> PyTree:
    """`fn(*args, **kwargs)`, computed with the factors of the adapted weights anywhere in its arguments."""
    paths, leaves, treedef = _flatten_arguments(args, kwargs)
    if not any(map(is_adapted, leaves)):
        return fn(*args, **kwargs)
    _report_entering(walker, paths, leaves)
    leaves = merge_on_entry(leaves)
    places = [index for index, leaf in enumerate(leaves) if is_adapted(leaf)]
    if not places:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        return fn(*args, **kwargs)
    result: dict[str, PyTree] = {}

    def on_bases(bases: list[Leaf]) -> list[Leaf]:
        filled = list(leaves)
        for place, base in zip(places, bases, strict=True):
            filled[place] = base
        args, kwargs = jax.tree.unflatten(treedef, filled)
        outputs, result["treedef"] = jax.tree.flatten(fn(*args, **kwargs))
        # What is no array passes by: strings, callables, Python numbers.
        result["outputs"] = [None if is_array(output) else output for output in outputs]
        result["places"] = [index for index, output in enumerate(outputs) if is_array(output)]
        return [outputs[index] for index in result["places"]]

    body = jax_compat.trace(on_bases, [leaves[place].base for place in places])
    outputs = walker.run(body, [Traced(leaves[place].prepared(), paths[place]) for place in places])
    whole = result["outputs"]
    for place, output in zip(result["places"], outputs, strict=True):
        whole[place] = walker.materialize(output, None, "the function returns it")
    return jax.tree.unflatten(result["treedef"], whole)


def _report_entering(walker: Walker, paths: Sequence[LeafPath], leaves: Sequence[Leaf]) -> None:
    """A merge that is the method's own way is reported, and isn't warned of."""
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, MergedOnEntry):
            reason = f"a {type(leaf).__name__} is merged before the function is called"
            walker.report(Encounter(path, "call", False, "the function's call", reason))


def is_array(value: object) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _flatten_arguments(
    args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> tuple[list[LeafPath], list[Leaf], TreeDef]:
    """Paths within each argument, so that a leaf has the path it has in its own tree."""
    paths: list[LeafPath] = []
    for argument in [*args, *dict(sorted(kwargs.items())).values()]:
        paths += flatten_with_paths(argument)[0]
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_adapted)
    return paths, leaves, treedef


def adapt(
    fn: Callable[..., PyTree], *, on_materialize: OnMaterialize = "warn", matmul: Strategy | None = None
) -> Callable[..., PyTree]:
    """Makes a function of parameters take adapted parameters, and compute with their factors.

    `adapt(f)(params, *args) == f(merge_params(params), *args)`: the right side says what is computed, the left side
    computes it without a gradient of a frozen weight and without a merged copy of the tree. The function is not changed
    or patched; it is traced over the base weights, and each operation that meets an adapted weight is replaced by its
    factored form.

    Adapted weights may sit in any positional or keyword argument. Everything else is passed as it is: Python numbers
    stay Python numbers, so `deterministic=True` works; branching on *values computed from weights* fails as under
    `jit`. Tracing happens at every call, so call the result under `jit`.

    Stays factored: matmuls and einsums (the weight on either side, stacked or not), ragged matmuls, embedding lookups,
    convolutions; through transposes, reshapes, slices, casts, scalar multiples; inside `jit`, `scan`, `while_loop`,
    `cond`, `checkpoint`, `shard_map`. Anything else, a `custom_vjp` on the weight itself included, gets the merged
    weight: right, sometimes slower, never silent.

    Args:
        fn: Any function of pytrees that JAX can trace.
        on_materialize: What happens where a weight has to be merged: `"warn"` (`MaterializeWarning`, with the leaf
            path, the operation and the source line), `"error"` (`MaterializeError`) or `"silent"`. `explain` shows all.
            Methods that have no other way (`RandomMask`, `RandomSubspace`) say so themselves, and don't warn.
        matmul: For experiments, the strategy of every matmul that can follow it: `"low_rank_first"` or
            `"merged_weight"`. By default `matmul.choose_strategy` decides by sizes, dtype and backend.

    Returns:
        A function with `fn`'s signature.

    Raises:
        ValueError: `on_materialize` is none of the three, or `matmul` none of the two.

    Example:
        >>> import lora_jax as lj
        >>> apply = lambda params, x: x @ params["w"]
        >>> node = lj.LoRAWeight(jnp.zeros((2, 3)), jnp.ones((1, 2)), jnp.ones((1, 3)), scale=0.5, axes="io")
        >>> lj.adapt(apply)({"w": node}, jnp.ones((1, 2))).tolist()
        [[1.0, 1.0, 1.0]]
    """
    if on_materialize not in ("warn", "error", "silent"):
        raise ArgumentError(f'`on_materialize` must be "warn", "error" or "silent", got {on_materialize!r}')
    if matmul is not None and matmul not in STRATEGIES:
        raise ArgumentError(f"`matmul` must be one of {STRATEGIES} or None, got {matmul!r}")

    @functools.wraps(fn)
    def adapted(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return walk_function(fn, new_walker(on_materialize=on_materialize, matmul=matmul), args, kwargs)

    return adapted


def new_walker(
    report: Callable[[Encounter], None] = lambda encounter: None,
    on_materialize: OnMaterialize = "silent",
    matmul: Strategy | None = None,
) -> Walker:
    return Walker(RULES, report, on_materialize, matmul)
