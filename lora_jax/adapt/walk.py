"""One walk over a traced function, carrying adapted weights as values."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ..matmul import STRATEGIES, Strategy
from ..paths import flatten_with_paths
from ..weights import AdaptedWeight, Unfactorable, is_adapted, merge_on_entry
from . import jax_compat
from .jax_compat import Equation, Program

OnMaterialize = Literal["warn", "error", "silent"]


class MaterializeWarning(UserWarning):
    """A weight had to be merged inside the function: right, but slower and larger than the factored form."""


class MaterializeError(ValueError):
    """As `MaterializeWarning`, for `on_materialize="error"`."""


class Traced(NamedTuple):
    """An adapted weight on its way through a trace."""

    node: AdaptedWeight
    path: str


class Encounter(NamedTuple):
    """One meeting of a weight with an operation."""

    path: str
    op: str
    factored: bool
    source: str
    reason: str = ""


class Walker:
    """Runs a jaxpr whose inputs may be adapted weights.

    Args:
        rules: what to do with a primitive that meets an adapted weight, by its name: `rules.RULES`.
        report: told of every encounter.
        on_materialize: what to do, beyond reporting, where a weight has to be merged.
        matmul: the strategy of every matmul that can follow it; `None` chooses by sizes.
        enclosing: the equations whose body this is, outermost first.
    """

    def __init__(
        self,
        rules: dict[str, Any],
        report: Callable[[Encounter], None],
        on_materialize: OnMaterialize,
        matmul: Strategy | None = None,
        enclosing: tuple[Equation, ...] = (),
    ):
        self.rules = rules
        self.report = report
        self.on_materialize: OnMaterialize = on_materialize
        self.matmul: Strategy | None = matmul
        self.enclosing = enclosing
        self.uses: Counter[str] = Counter()

    def inner(self, eqn: Equation) -> Walker:
        """A walker for the body of a loop or branch. It counts uses anew: JAX may trace a body more than once."""
        return Walker(self.rules, self.report, self.on_materialize, self.matmul, (*self.enclosing, eqn))

    def inlined(self, eqn: Equation) -> Walker:
        """A walker for a body that becomes part of this one."""
        walker = self.inner(eqn)
        walker.uses = self.uses
        return walker

    def run(self, body: Program, operands: Sequence[Any]) -> list[Any]:
        """The outputs for `operands`; weights that only pass through come out as `Traced`."""
        jaxpr = body.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        values |= dict(zip(jaxpr.invars, operands, strict=True))
        last_use = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if not jax_compat.is_literal(atom)}
        outputs = {atom for atom in jaxpr.outvars if not jax_compat.is_literal(atom)}

        def read(atom: Any) -> Any:
            return atom.val if jax_compat.is_literal(atom) else values[atom]

        for eqn in jaxpr.eqns:
            results = self._step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
            for atom in eqn.invars:
                # Outside `jit` values are real arrays: drop them as soon as Python would.
                if not jax_compat.is_literal(atom) and last_use[atom] is eqn and atom not in outputs:
                    values.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Equation, operands: list[Any]) -> list[Any]:
        if not any(isinstance(value, Traced) for value in operands):
            return jax_compat.run_equation(eqn, operands)
        name = eqn.primitive.name
        entry = self.rules.get(name)
        try:
            if entry is None:
                raise Unfactorable("there is no rule for this operation")
            unknown = sorted(eqn.params.keys() - entry.params)
            if unknown:
                raise Unfactorable(
                    f"this version of JAX gives {name} a parameter that its rule does not know, {unknown[0]}"
                )
            return entry.rule(self, eqn, operands)
        except Unfactorable as reason:
            distinct = {id(value): value for value in operands}
            merged = {key: self.materialize(value, eqn, str(reason)) for key, value in distinct.items()}
            return jax_compat.run_equation(eqn, [merged[id(value)] for value in operands])

    def counted(self, value: Any) -> Any:
        """A node as its next use sees it."""
        number = self.uses[value.path]
        self.uses[value.path] += 1
        return value._replace(node=value.node.for_use(number))

    def factored(self, value: Traced, eqn: Equation) -> None:
        self.report(Encounter(value.path, eqn.primitive.name, True, self.source(eqn)))

    def source(self, eqn: Equation) -> str:
        """The source line of an equation; the caller's where it lies within a function of JAX's own."""
        return next(filter(None, map(jax_compat.source_line, (eqn, *reversed(self.enclosing)))), "unknown source")

    def materialize(self, value: Any, eqn: Equation | None, reason: str) -> Any:
        """The merged weight in place of a node, announced; other values as they are."""
        if not isinstance(value, Traced):
            return value
        op, source = ("return", "the function's result") if eqn is None else (eqn.primitive.name, self.source(eqn))
        self.report(Encounter(value.path, op, False, source, reason))
        message = f"`{value.path}` is merged into one array at {op} ({source}): {reason}"
        if self.on_materialize == "error":
            raise MaterializeError(message)
        if self.on_materialize == "warn":
            warnings.warn(
                f"{message}. The result is right, but its cost is that of the merged weight",
                MaterializeWarning,
                stacklevel=2,
            )
        return value.node.merge()


def walk_function(fn: Callable[..., Any], walker: Walker, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls `fn` with adapted weights anywhere in its arguments."""
    paths, leaves, treedef = [], [], None
    paths, leaves, treedef = _flatten_arguments(args, kwargs)
    if not any(map(is_adapted, leaves)):
        return fn(*args, **kwargs)
    _report_entering(walker, paths, leaves)
    leaves = merge_on_entry(leaves)
    places = [index for index, leaf in enumerate(leaves) if is_adapted(leaf)]
    if not places:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        return fn(*args, **kwargs)
    result: dict[str, Any] = {}

    def on_bases(bases: list[Any]) -> list[Any]:
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


def _report_entering(walker: Walker, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """A merge that is the method's own way is reported, and isn't warned of."""
    for path, leaf in zip(paths, leaves, strict=True):
        if is_adapted(leaf) and leaf.merged_on_entry:
            reason = f"a {type(leaf).__name__} is merged before the function is called"
            walker.report(Encounter(path, "call", False, "the function's call", reason))


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _flatten_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], list[Any], Any]:
    """Paths within each argument, so that a leaf has the path it has in its own tree."""
    paths: list[str] = []
    for argument in [*args, *dict(sorted(kwargs.items())).values()]:
        paths += flatten_with_paths(argument)[0]
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_adapted)
    return paths, leaves, treedef


def adapt(
    fn: Callable[..., Any], *, on_materialize: OnMaterialize = "warn", matmul: Strategy | None = None
) -> Callable[..., Any]:
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
        fn: any function of pytrees that JAX can trace.
        on_materialize: where a weight has to be merged, `"warn"` (`MaterializeWarning`, with the leaf path, the
            operation and the source line), `"error"` (`MaterializeError`) or `"silent"`. `explain` shows every place.
            Methods that have no other way (`RandomMask`, `RandomSubspace`) say so themselves, and don't warn.
        matmul: for experiments, the strategy of every matmul that can follow it: `"low_rank_first"` or
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
        raise ValueError(f'`on_materialize` must be "warn", "error" or "silent", got {on_materialize!r}')
    if matmul is not None and matmul not in STRATEGIES:
        raise ValueError(f"`matmul` must be one of {STRATEGIES} or None, got {matmul!r}")

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        return walk_function(fn, new_walker(on_materialize=on_materialize, matmul=matmul), args, kwargs)

    return adapted


def new_walker(
    report: Callable[[Encounter], None] = lambda encounter: None,
    on_materialize: OnMaterialize = "silent",
    matmul: Strategy | None = None,
) -> Walker:
    from .rules import RULES  # rules and walker need each other: a loop's rule walks its body

    return Walker(RULES, report, on_materialize, matmul)
