"""Control flow that meets an adapted weight: the body is walked in turn, and re-emitted around what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..weights import FactoredWeight, Unfactorable
from . import jax_compat
from .jax_compat import Body, Equation, param, program
from .walk import Traced, Value, Walker

# The name of a jitted function that is all there is in the body of a `custom_jvp`: the custom derivative is the body's
# own, computed in another way, so an adapted weight may enter. `lora_jax.losses` has such a function.
WALKABLE = "lora_jax_walkable"


class _Entry:
    """Operands of a body as one list of pytrees, adapted weights as their nodes, and the way back."""

    def __init__(self, walker: Walker, operands: Sequence[Value]):
        self.paths = [operand.path if isinstance(operand, Traced) else None for operand in operands]
        self.tree = [walker.counted(operand).node if isinstance(operand, Traced) else operand for operand in operands]

    def operands(self, tree: Sequence[Value]) -> list[Value]:
        return [leaf if path is None else Traced(leaf, path) for leaf, path in zip(tree, self.paths, strict=True)]


class _Passed:
    """Outputs of a body that are its adapted operands, unchanged: they pass around the re-emitted operation.

    Flax NNX returns a module's weights from every `remat`, `jit`, `scan` and `cond`, and goes on with those.
    """

    def __init__(self, sources: dict[int, int], operands: Sequence[Value]):
        self.values = {
            place: operands[source] for place, source in sources.items() if isinstance(operands[source], Traced)
        }

    def others(self, outputs: Sequence[Value]) -> list[Value]:
        return [output for place, output in enumerate(outputs) if place not in self.values]

    def back_among(self, outputs: Sequence[Value]) -> list[Value]:
        whole = list(outputs)
        for place in sorted(self.values):
            whole.insert(place, self.values[place])
        return whole


def _walk_body(
    walker: Walker, eqn: Equation, body: Body, operands: Sequence[Value], passed: _Passed | None = None
) -> list[Value]:
    """The body's outputs as arrays, without those that pass around it, computed by a walker of its own."""
    inner = walker.inner(eqn)
    outputs = inner.run(program(body), operands)
    outputs = outputs if passed is None else passed.others(outputs)
    return [inner.materialize(output, eqn, "the body returns it") for output in outputs]


def jit_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    body = param(eqn, "jaxpr")
    in_shardings = [jax_compat.specified(sharding) for sharding in param(eqn, "in_shardings")]
    out_shardings = [jax_compat.specified(sharding) for sharding in param(eqn, "out_shardings")]
    donated = param(eqn, "donated_invars")
    # Compiler options cannot be on it: JAX takes them at the top level only.
    if not (any(in_shardings) or any(out_shardings) or any(donated)):
        with jax_compat.context(eqn):
            return walker.inlined(eqn).run(program(body), operands)
    entry, passed = _Entry(walker, operands), _Passed(jax_compat.unchanged(body), operands)
    leaves = [jax.tree.leaves(operand) for operand in entry.tree]
    treedef = jax.tree.structure(entry.tree)

    def call(*flat: Any) -> list[Value]:
        return _walk_body(walker, eqn, body, entry.operands(jax.tree.unflatten(treedef, flat)), passed)

    call.__name__ = call.__qualname__ = param(eqn, "name")
    # A node's base keeps its operand's place; its other arrays are free. A donated base stays with its owner.
    flat_shardings, donate = [], []
    for arrays, sharding, gone in zip(leaves, in_shardings, donated, strict=True):
        if gone and len(arrays) == 1:
            donate.append(len(flat_shardings))
        flat_shardings += [sharding] + [None] * (len(arrays) - 1)
    jitted = jax.jit(
        call,
        in_shardings=tuple(flat_shardings),
        out_shardings=passed.others(out_shardings),
        donate_argnums=tuple(donate),
    )
    with jax_compat.context(eqn):
        return passed.back_among(jitted(*(array for arrays in leaves for array in arrays)))


def custom_jvp_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    """Walks into the body where its author says that its own derivative is the custom one, see `WALKABLE`."""
    body = program(param(eqn, "call_jaxpr"))
    if [inner.params.get("name") for inner in body.jaxpr.eqns] != [WALKABLE]:
        raise Unfactorable("it has a custom derivative, which its factors would not have")
    with jax_compat.context(eqn):
        return walker.inlined(eqn).run(body, operands)


def remat_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    body, policy, prevent_cse = param(eqn, "jaxpr"), param(eqn, "policy"), param(eqn, "prevent_cse")
    entry, passed = _Entry(walker, operands), _Passed(jax_compat.unchanged(body), operands)

    def call(*tree: Any) -> list[Value]:
        return _walk_body(walker, eqn, body, entry.operands(tree), passed)

    # In the backward pass of a gradient taken inside the function, JAX puts a barrier before what is computed again; a
    # new `checkpoint` would do so only when it is differentiated in turn.
    barriers = prevent_cse if isinstance(prevent_cse, tuple) else (prevent_cse,) * len(operands)
    with jax_compat.context(eqn):
        tree = [
            lax.optimization_barrier(value) if param(eqn, "differentiated") and barrier else value
            for value, barrier in zip(entry.tree, barriers, strict=True)
        ]
        return passed.back_among(jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)(*tree))


def _merge_changed(
    walker: Walker, eqn: Equation, sources: dict[int, int], first: int, carry: list[Value]
) -> list[Value]:
    """Merges the adapted weights among carried values that the loop's body changes; the others are constants."""
    return [
        value
        if sources.get(place) == first + place
        else walker.materialize(value, eqn, "the loop carries it from one iteration to the next, changed")
        for place, value in enumerate(carry)
    ]


def scan_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    body = param(eqn, "jaxpr")
    sources = jax_compat.unchanged(body)
    num_consts, num_carry = jax_compat.scan_counts(eqn)
    first_x = num_consts + num_carry
    consts, xs = operands[:num_consts], operands[first_x:]
    carry = _merge_changed(walker, eqn, sources, num_consts, operands[num_consts:first_x])
    sliced: list[Value] = []
    members: list[Value] = []
    for value in xs:
        member = None
        if isinstance(value, Traced):
            try:
                value, member = _stacked(walker, value)
            except Unfactorable as reason:
                value = walker.materialize(value, eqn, str(reason))
        sliced.append(value)
        members.append(member)
    # What the body hands on, carried or slice by slice, is the whole operand again.
    handed_on = {
        place: source
        for place, source in sources.items()
        if (source == num_consts + place if place < num_carry else source >= first_x)
    }
    whole = [None if member is None else value for value, member in zip(xs, members, strict=True)]
    passed = _Passed(handed_on, consts + carry + whole)
    entry = _Entry(walker, consts + carry)
    moving = [place for place in range(num_carry) if place not in passed.values]

    def call(state: list[Value], slices: Any) -> tuple[list[Value], list[Value]]:
        number, slices = slices
        operands = entry.operands([_in_iteration(value, number) for value in entry.tree])
        for place, value in zip(moving, state, strict=True):
            operands[num_consts + place] = value
        operands += [value if member is None else member(value) for member, value in zip(members, slices, strict=True)]
        outputs = _walk_body(walker, eqn, body, operands, passed)
        return outputs[: len(moving)], outputs[len(moving) :]

    with jax_compat.context(eqn):
        state, ys = lax.scan(
            call,
            [carry[place] for place in moving],
            (jnp.arange(param(eqn, "length"), dtype=jnp.int32), sliced),
            length=param(eqn, "length"),
            reverse=param(eqn, "reverse"),
            unroll=param(eqn, "unroll"),
        )
    return passed.back_among(state + ys)


def _stacked(walker: Walker, value: Traced) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Traced]]:
    arrays, member = walker.counted(value).node.stacked()
    return arrays, lambda slices: Traced(member(slices), value.path)


def _in_iteration(value: Any, number: jax.Array) -> Any:
    return value.for_use(number) if isinstance(value, FactoredWeight) else value


def while_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    cond_body, body = param(eqn, "cond_jaxpr"), param(eqn, "body_jaxpr")
    first, second = param(eqn, "cond_nconsts"), param(eqn, "body_nconsts")
    sources = jax_compat.unchanged(body)
    carry = _merge_changed(walker, eqn, sources, second, operands[first + second :])
    kept = {place: source for place, source in sources.items() if source == second + place}
    passed = _Passed(kept, operands[first : first + second] + carry)
    entry = _Entry(walker, operands[: first + second] + carry)
    moving = [place for place in range(len(carry)) if place not in passed.values]

    def filled(number: jax.Array, state: list[Value]) -> tuple[list[Value], list[Value], list[Value]]:
        values = entry.operands([_in_iteration(value, number) for value in entry.tree])
        for place, value in zip(moving, state, strict=True):
            values[first + second + place] = value
        return values[:first], values[first : first + second], values[first + second :]

    def cond(state: tuple[jax.Array, list[Value]]) -> Any:
        cond_consts, _, carried = filled(*state)
        return _walk_body(walker, eqn, cond_body, cond_consts + carried)[0]

    def step(state: tuple[jax.Array, list[Value]]) -> tuple[jax.Array, list[Value]]:
        number, _ = state
        _, body_consts, carried = filled(*state)
        return number + 1, _walk_body(walker, eqn, body, body_consts + carried, passed)

    with jax_compat.context(eqn):
        _, state = lax.while_loop(cond, step, (jnp.int32(0), [carry[place] for place in moving]))
    return passed.back_among(state)


def cond_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    index, *values = operands
    index = walker.materialize(index, eqn, "it chooses the branch")
    bodies = param(eqn, "branches")
    # What every branch returns unchanged.
    sources = dict(set.intersection(*(set(jax_compat.unchanged(body).items()) for body in bodies)))
    entry, passed = _Entry(walker, values), _Passed(sources, values)

    def branch(body: Body) -> Callable[[list[Value]], list[Value]]:
        return lambda tree: _walk_body(walker, eqn, body, entry.operands(tree), passed)

    with jax_compat.context(eqn):
        return passed.back_among(lax.switch(index, [branch(body) for body in bodies], entry.tree))


def shard_map_rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    body, in_specs, out_specs = param(eqn, "jaxpr"), param(eqn, "in_specs"), param(eqn, "out_specs")
    entry = _Entry(walker, operands)
    specs = [
        value.partition_specs(spec) if isinstance(value, FactoredWeight) else spec
        for value, spec in zip(entry.tree, in_specs, strict=True)
    ]

    def call(tree: list[Value]) -> list[Value]:
        return _walk_body(walker, eqn, body, entry.operands(tree))

    mapped = jax.shard_map(
        call,
        mesh=param(eqn, "mesh"),
        in_specs=(specs,),
        out_specs=list(out_specs),
        axis_names=jax_compat.manual_axes(eqn),
        check_vma=param(eqn, "check_vma"),
    )
    with jax_compat.context(eqn):
        return mapped(entry.tree)
