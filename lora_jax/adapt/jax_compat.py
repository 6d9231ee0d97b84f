"""Everything that depends on JAX's version, or reaches below its public surface."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
from jax.interpreters import partial_eval

from ..types import Array
from ..weights import Unfactorable

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn

Equation: TypeAlias = "JaxprEqn"
# A `ClosedJaxpr` or a `Jaxpr`, and a variable or literal of one: their classes move between versions of JAX.
Body: TypeAlias = Any
Atom: TypeAlias = Any


@functools.cache
def _source_info() -> Any:
    """`jax.extend.source_info_util`, imported on first use: `jax.extend` brings Pallas along, which takes its time."""
    import jax.extend.source_info_util

    return jax.extend.source_info_util


class Program(NamedTuple):
    """A jaxpr with its constants: `ClosedJaxpr` before JAX 0.11, a `Jaxpr` that holds its constants since."""

    jaxpr: Body
    consts: Sequence[Array]


def program(body: Body) -> Program:
    """The `Program` of an equation's body, whichever form it has."""
    return Program(getattr(body, "jaxpr", body), getattr(body, "consts", ()))


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Traces `function` without the code that its outputs do not need.

    Flax NNX returns weights as unused outputs of `remat` and `jit`; left in, they look as if they were used.
    """
    closed = jax.make_jaxpr(function)(*args)
    jaxpr: Body = getattr(closed, "jaxpr", closed)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return Program(live, closed.consts)


def is_literal(atom: Atom) -> bool:
    return hasattr(atom, "val")  # a variable has none


def run_equation(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation as it was, its custom rules, context and name stack included, as JAX runs one of a jaxpr's."""
    with context(eqn):
        outputs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


@contextlib.contextmanager
def context(eqn: Equation) -> Iterator[None]:
    """The equation's name stack, source and configuration, for what a rule computes in its place."""
    info = _source_info()
    names = info.current_name_stack() + eqn.source_info.name_stack
    with info.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind(eqn: Equation, *operands: Array) -> Any:
    """The equation's primitive on other operands; for primitives without a body, inside `context`."""
    return eqn.primitive.bind(*operands, **eqn.params)


class Product(NamedTuple):
    """A matmul's equation as a function of the weight and the other operand; equal equations make equal functions."""

    primitive: Any
    params: tuple[tuple[str, object], ...]
    weight_is_lhs: bool

    def __call__(self, weight: Array, other: Array) -> jax.Array:
        operands = (weight, other) if self.weight_is_lhs else (other, weight)
        return self.primitive.bind(*operands, **dict(self.params))


def source_line(eqn: Equation) -> str:
    return _source_info().summarize(eqn.source_info)


def param(eqn: Equation, name: str) -> Any:
    """A parameter of the equation; a name that this JAX does not have leads to materialization, not to a crash."""
    try:
        return eqn.params[name]
    except KeyError:
        raise Unfactorable(f"this version of JAX gives {eqn.primitive.name} no parameter `{name}`") from None


def scan_counts(eqn: Equation) -> tuple[int, int]:
    """Numbers of constants and of carried values of a `scan`; the rest of its operands are scanned over."""
    if "ft_in" in eqn.params:
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return param(eqn, "num_consts"), param(eqn, "num_carry")


def unchanged(body: Body) -> dict[int, int]:
    """Which outputs of a body are inputs of it, unchanged, also through nested bodies: `{output: input}` by place."""
    jaxpr = program(body).jaxpr
    source: dict[Atom, int] = {variable: place for place, variable in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for output, place in _unchanged_by(eqn).items():
            atom = eqn.invars[place]
            if not is_literal(atom) and atom in source:
                source[eqn.outvars[output]] = source[atom]
    return {place: source[atom] for place, atom in enumerate(jaxpr.outvars) if not is_literal(atom) and atom in source}


def _unchanged_by(eqn: Equation) -> dict[int, int]:
    name = eqn.primitive.name
    if name in ("jit", "remat2"):
        return unchanged(param(eqn, "jaxpr"))
    if name == "scan":
        num_consts, num_carry = scan_counts(eqn)
        return {
            output: place
            for output, place in unchanged(param(eqn, "jaxpr")).items()
            if (place == num_consts + output if output < num_carry else place >= num_consts + num_carry)
        }
    return {}


def manual_axes(eqn: Equation) -> set[str] | frozenset[str]:
    """The mesh axes that a `shard_map` makes manual."""
    return eqn.params["newly_manual_axes"] if "newly_manual_axes" in eqn.params else param(eqn, "manual_axes")


def explicit_dims(array: Array) -> set[int]:
    """The dimensions split along explicit mesh axes: there, shardings are part of types."""
    sharding = jax.typeof(array).sharding
    explicit = set(sharding.mesh.explicit_axes)
    parts = [part if isinstance(part, tuple) else (part,) for part in sharding.spec] if explicit else []
    return {dim for dim, part in enumerate(parts) if explicit & set(part)}


def specified(sharding: object) -> jax.sharding.Sharding | None:
    """`None` for an unspecified sharding, which has no public name."""
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None
