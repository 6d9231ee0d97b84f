"""Where a weight has to be merged, the result is right and the user is told: which leaf, at what, where, why."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt import MaterializeError, control_flow, jax_compat, rules

from .kit import assert_as_merged, assert_close, merge_nodes, node, normal

D = 8


class Merging(NamedTuple):
    fn: Callable[[Any, jax.Array], Any]
    op: str
    reason: str
    base: Any = None


@jax.custom_vjp
def straight_through(w: jax.Array) -> jax.Array:
    """Rounds to a grid; the gradient passes as if it did not."""
    return jnp.round(w * 4) / 4


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, g: (g,))


@jax.custom_jvp
def steep(w: jax.Array) -> jax.Array:
    return 2 * w


steep.defjvp(lambda primals, tangents: (steep(primals[0]), 5 * tangents[0]))


@jax.custom_vjp
def linear_with_own_gradient(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


linear_with_own_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (7 * saved[1].T @ g, g @ saved[0].T))


def weight_norm(p: Any, x: jax.Array) -> jax.Array:
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


def changing_carry(p: Any, x: jax.Array) -> jax.Array:
    step = lambda state, _: ((jnp.tanh(state[0] @ state[1]), 0.5 * state[1]), None)  # noqa: E731
    return lax.scan(step, (x, p["w"]), length=3)[0][0]


def swapped_carry(p: Any, x: jax.Array) -> jax.Array:
    """Unchanged as a pair, changed one by one."""
    step = lambda state, _: ((jnp.tanh(state[0] @ state[1]), state[2], state[1]), None)  # noqa: E731
    return lax.scan(step, (x, p["w"], jnp.eye(D)), length=3)[0][0]


def weights_as_outputs_of_a_scan(p: Any, x: jax.Array) -> Any:
    return lax.scan(lambda x, _: (x @ p["w"], p["w"]), x, length=2)


def changed_in_one_branch(p: Any, x: jax.Array) -> jax.Array:
    """In the one that is taken."""
    return x @ lax.cond(x.sum() > 1e9, lambda w: w, lambda w: jnp.tanh(w), p["w"])


def while_loop_over_a_changing_weight(p: Any, x: jax.Array) -> jax.Array:
    body = lambda state: (state[0] @ state[1], state[1].T)  # noqa: E731
    return lax.fori_loop(0, 3, lambda _, state: body(state), (x, p["w"]))[0]


def grouped_convolution(p: Any, x: jax.Array) -> jax.Array:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x[None], p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2)


KERNEL = functools.partial(node, "kernel", 3, D // 2, 6, axes="iio")
CASES = {
    "custom_vjp": Merging(lambda p, x: x @ straight_through(p["w"]), "custom_vjp_call", "no rule"),
    "custom_jvp": Merging(lambda p, x: x @ steep(p["w"]), "custom_jvp_call", "it has a custom derivative"),
    "layer with custom_vjp": Merging(lambda p, x: linear_with_own_gradient(p["w"], x), "custom_vjp_call", "no rule"),
    "elementwise": Merging(lambda p, x: x @ jnp.tanh(p["w"]), "tanh", "no rule"),
    "weight norm": Merging(weight_norm, "mul|div", "only the merged array can stand|more than a scalar"),
    "mask": Merging(lambda p, x: x @ (p["w"] * jnp.float32(jnp.arange(D) > 3)[None]), "mul", "more than a scalar"),
    "scalar over weight": Merging(lambda p, x: x @ (1 / p["w"]), "div", "more than a scalar"),
    "sum with another": Merging(lambda p, x: x @ (p["w"] + 1.0), "add", "no rule"),
    "square": Merging(lambda p, x: x @ (p["w"] @ p["w"]), "dot_general", "both operands are adapted weights"),
    "returned": Merging(lambda p, x: (x @ p["w"], p["w"]), "return", "the function returns it"),
    "cast to integers": Merging(
        lambda p, x: x @ p["w"] + x @ (9 * p["w"]).astype(jnp.int8).astype(x.dtype),
        "convert_element_type",
        "a cast to int8",
    ),
    "changing carry": Merging(changing_carry, "scan", "carries it from one iteration to the next, changed"),
    "swapped carry": Merging(swapped_carry, "scan", "carries it from one iteration to the next, changed"),
    "outputs of a scan": Merging(weights_as_outputs_of_a_scan, "scan", "the body returns it"),
    "one branch": Merging(changed_in_one_branch, "cond|tanh", "the body returns it|no rule"),
    "while": Merging(while_loop_over_a_changing_weight, "scan", "carries it from one iteration to the next, changed"),
    "grouped convolution": Merging(grouped_convolution, "conv_general_dilated", "a grouped convolution", KERNEL()),
    "diagonal gather": Merging(lambda p, x: x * p["w"][(jnp.arange(D),) * 2][None], "gather", "no lookup of whole"),
    "scan over the in axis": Merging(
        lambda p, x: lax.scan(lambda c, w: (c + w, None), jnp.zeros(D), p["w"])[0][None] * x, "scan", "no stack axis"
    ),
    "joined axes": Merging(lambda p, x: x * p["w"].reshape(-1)[None, :D], "reshape", "joins axes of different roles"),
    "part of the in axes": Merging(
        lambda p, x: jnp.einsum("td,hdf->thf", x, p["w"]), "dot_general", "axes .1,. of a weight labelled 'iio' are",
        node("heads", 2, D, 3, axes="iio"),
    ),
    "in axis in the batch": Merging(
        lambda p, x: jnp.einsum("td,df->dtf", x, p["w"]), "dot_general", "not a stack axis|are contracted",
    ),
}  # fmt: skip


@pytest.fixture(name="case", params=CASES)
def chosen(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def arguments(case: Merging) -> tuple[Any, jax.Array]:
    return {"w": node("w", D, D) if case.base is None else case.base}, normal("x", D, D)


def test_values_and_gradients_are_the_merged_functions(case: Merging) -> None:
    params, x = arguments(case)
    assert_as_merged(case.fn, params, x, on_materialize="silent")


def test_warning_names_leaf_operation_source_and_reason(case: Merging) -> None:
    params, x = arguments(case)
    where = r"[^()]*test_materialize\.py:\d+[^()]*\(.*\)|the function's result"
    with pytest.warns(lj.MaterializeWarning, match=rf"^`w` is merged into one array at ({case.op}) \(({where})\): .*"):
        jax.eval_shape(lj.adapt(case.fn), params, x)
    with pytest.warns(lj.MaterializeWarning, match=case.reason):
        jax.eval_shape(lj.adapt(case.fn), params, x)


def test_error_on_request(case: Merging) -> None:
    params, x = arguments(case)
    with pytest.raises(MaterializeError, match=rf"^`w` is merged into one array at ({case.op}) "):
        jax.eval_shape(lj.adapt(case.fn, on_materialize="error"), params, x)


def test_silence_on_request(case: Merging) -> None:
    params, x = arguments(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lj.adapt(case.fn, on_materialize="silent"), params, x)


def test_explanation_shows_it(case: Merging) -> None:
    rows = lj.explain(case.fn, *arguments(case))
    assert rows.materialized == ["w"]
    (first, *_) = [row for row in rows if not row.factored]
    assert first.op in case.op.split("|")
    assert f"merged: {first.reason}" in str(rows)
    assert first.source in str(rows)


@pytest.mark.wrong_types
def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match='`on_materialize` must be "warn", "error" or "silent", got \'quiet\''):
        lj.adapt(lambda p: p, on_materialize="quiet")  # pyright: ignore[reportArgumentType]


def test_only_the_weight_concerned_is_merged() -> None:
    params = {"w": node("w", D, D), "v": node("v", D, D)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.tanh(p["w"]) @ p["v"]

    rows = lj.explain(fn, params, normal("x", D, D))
    assert {row.path: row.factored for row in rows} == {"w": False, "v": True}


def test_loss_in_the_function_may_read_a_weight_beside_its_matmul() -> None:
    """Weight decay written into the model: merged there, factored in the matmul."""
    params = {"w": node("w", D, D)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(x @ p["w"]) + jnp.sum(p["w"] ** 2)

    rows = lj.explain(fn, params, normal("x", D, D))
    assert [row.factored for row in rows if row.op == "dot_general"] == [True]
    assert rows.materialized == ["w"]
    assert_as_merged(fn, params, normal("x", D, D), on_materialize="silent")


# A newer JAX.


@pytest.mark.parametrize("op", ["dot_general", "reshape", "scan", "jit", "gather", "conv_general_dilated", "remat2"])
def test_parameter_that_a_rule_does_not_know(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An equation with one more parameter than the rule was written for."""
    entry = rules.RULES[op]
    forgotten = {"conv_general_dilated": "window_strides", "dot_general": "precision", "gather": "mode"}
    name = forgotten.get(op) or sorted(entry.params & {"new_sizes", "length", "name", "policy"})[0]
    monkeypatch.setitem(rules.RULES, op, entry._replace(params=entry.params - {name}))
    fn, params = every_operation()
    reason = f"this version of JAX gives {op} a parameter that its rule does not know, {name}"
    with pytest.warns(lj.MaterializeWarning, match=reason):
        actual = lj.adapt(fn)(params, normal("x", 2, D, D))
    assert_close(actual, fn(merge_nodes(params), normal("x", 2, D, D)))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("dot_general", "dimension_numbers"),
        ("reshape", "new_sizes"),
        ("scan", "length"),
        ("jit", "donated_invars"),
        ("gather", "mode"),
        ("conv_general_dilated", "feature_group_count"),
        ("remat2", "policy"),
        ("transpose", "permutation"),
    ],
)
def test_parameter_that_is_gone(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that misses a parameter it needs materializes; the equation itself still runs with what it has."""
    real = jax_compat.param

    def param(eqn: Any, asked: str) -> Any:
        if (eqn.primitive.name, asked) != (op, name):
            return real(eqn, asked)
        return real(dataclasses.make_dataclass("Eqn", ["primitive", "params"])(eqn.primitive, {}), asked)

    for module in (rules, control_flow):
        monkeypatch.setattr(module, "param", param)
    fn, params = every_operation()
    with pytest.warns(lj.MaterializeWarning, match=f"this version of JAX gives {op} no parameter `{name}`"):
        actual = lj.adapt(fn)(params, normal("x", 2, D, D))
    assert_close(actual, fn(merge_nodes(params), normal("x", 2, D, D)))


def every_operation() -> tuple[Callable[..., Any], Any]:
    params = {
        "w": node("w", D, D),
        "layers": node("layers", 2, D, D, axes="sio"),
        "table": node("table", 7, D),
        "kernel": node("conv", 3, D, D, axes="iio"),
    }

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = jax.jit(lambda w, x: jnp.tanh(x @ w.reshape(D, 2, D // 2).reshape(D, D).T))(p["w"], x)
        x = lax.scan(lambda x, w: (jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x), None), x, p["layers"])[0]
        x = lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return x + p["table"][jnp.array([0, 1, 2, 3, 4, 5, 6, 0])][None]

    return fn, params
