"""One walk over a traced function, carrying adapted weights as values."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from ..errors import LoraJaxError
from ..matmul import Strategy
from ..weights import FactoredWeight, Unfactorable
from . import jax_compat
from .jax_compat import Atom, Equation, Program

OnMaterialize = Literal["warn", "error", "silent"]


class MaterializeWarning(UserWarning):
    """A weight had to be merged inside the function: right, but slower and larger than the factored form."""


class MaterializeError(LoraJaxError):
    """As `MaterializeWarning`, for `on_materialize="error"`."""


class Traced(NamedTuple):
    """An adapted weight on its way through a trace."""

    node: FactoredWeight
    path: str


# What flows through a walked program: an array, an adapted weight, or where a rule re-emits a body, a node itself.
Value: TypeAlias = Any


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
        rules: What to do with a primitive that meets an adapted weight, by its name: `rules.RULES`.
        report: Receives every encounter.
        on_materialize: What to do, beyond reporting, where a weight has to be merged.
        matmul: The strategy of every matmul that can follow it; `None` chooses by sizes.
        enclosing: The equations whose body this is, outermost first.
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

    def run(self, body: Program, operands: Sequence[Value]) -> list[Value]:
        """The outputs for `operands`; weights that only pass through come out as `Traced`."""
        jaxpr = body.jaxpr
        values: dict[Atom, Value] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        values |= dict(zip(jaxpr.invars, operands, strict=True))
        last_use = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if not jax_compat.is_literal(atom)}
        outputs = {atom for atom in jaxpr.outvars if not jax_compat.is_literal(atom)}

        def read(atom: Atom) -> Value:
            return atom.val if jax_compat.is_literal(atom) else values[atom]

        for eqn in jaxpr.eqns:
            results = self._step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
            for atom in eqn.invars:
                # Outside `jit` values are real arrays: drop them as soon as Python would.
                if not jax_compat.is_literal(atom) and last_use[atom] is eqn and atom not in outputs:
                    values.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Equation, operands: list[Value]) -> list[Value]:
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

    def counted(self, value: Traced) -> Traced:
        """A node as its next use sees it."""
        number = self.uses[value.path]
        self.uses[value.path] += 1
        return value._replace(node=value.node.for_use(number))

    def factored(self, value: Traced, eqn: Equation) -> None:
        self.report(Encounter(value.path, eqn.primitive.name, True, self.source(eqn)))

    def source(self, eqn: Equation) -> str:
        """The source line of an equation; the caller's where it lies within a function of JAX's own."""
        return next(filter(None, map(jax_compat.source_line, (eqn, *reversed(self.enclosing)))), "unknown source")

    def materialize(self, value: Value, eqn: Equation | None, reason: str) -> Value:
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
