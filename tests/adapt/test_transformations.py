"""JAX's transformations around `adapt`, and inside the function that it adapts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lj

from ..jaxprs import equations
from .kit import assert_as_merged, assert_close, merge_nodes, node, normal, project, value_and_gradients

pytestmark = pytest.mark.usefixtures("every_strategy")

D = 8


def model(params: Any, x: jax.Array) -> jax.Array:
    bias = jnp.expand_dims(params["bias"], range(x.ndim - 1))
    hidden = checkpoint_name(jnp.tanh(x @ params["up"] + bias), "hidden")
    return hidden @ params["down"]


def merged(params: Any, x: jax.Array) -> jax.Array:
    return model(merge_nodes(params), x)


factored = lj.adapt(model, on_materialize="error")


@pytest.fixture
def params() -> Any:
    return {"up": node("up", D, 6), "down": node("down", 6, D), "bias": normal("bias", 6)}


@pytest.fixture
def x() -> jax.Array:
    return normal("x", 2, 3, D)


def direction(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)


def assert_same(transformed: Any, *args: Any) -> None:
    """`transformed(f)` is the same for the adapted and for the merged function."""
    actual, expected = jax.jit(lambda *args: (transformed(factored)(*args), transformed(merged)(*args)))(*args)
    assert_close(actual, expected)


def test_not_jitted(params: Any, x: jax.Array) -> None:
    assert_close(factored(params, x), merged(params, x))


def test_jit_traces_once(params: Any, x: jax.Array) -> None:
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(factored, n=1))
    first = step(params, x)
    again = step(jax.tree.map(lambda leaf: 2 * leaf, params), x)
    assert not np.allclose(first, again)


def test_jvp(params: Any, x: jax.Array) -> None:
    assert_same(lambda f: lambda p, x: jax.jvp(f, (p, x), (direction(p), jnp.sin(x))), params, x)


def test_linearize(params: Any, x: jax.Array) -> None:
    def linear(f: Any) -> Any:
        return lambda p, x: jax.linearize(lambda p: f(p, x), p)[1](direction(p))

    assert_same(linear, params, x)


def test_vjp(params: Any, x: jax.Array) -> None:
    assert_same(lambda f: lambda p, x: jax.vjp(f, p, x)[1](jnp.cos(f(p, x))), params, x)


def curved(f: Any) -> Any:
    """A scalar function with second derivatives. The eighth keeps tanh from its flat ends, where its derivatives in
    float32 are what cancellation has left of them: a tenfold error by the order of the sums alone."""
    return lambda p, x: project(jnp.tanh(f(p, x) / 8))


def test_hessian_vector_product(params: Any, x: jax.Array) -> None:
    def product(f: Any) -> Any:
        gradient = jax.grad(curved(f))
        return lambda p, x: jax.jvp(lambda p: gradient(p, x), (p,), (direction(p),))[1]

    assert_same(product, params, x)


def test_reverse_over_reverse(params: Any, x: jax.Array) -> None:
    def penalty(f: Any) -> Any:
        gradient = jax.grad(curved(f), argnums=1)
        return jax.grad(lambda p, x: jnp.sum(gradient(p, x) ** 2))

    assert_same(penalty, params, x)


def test_vmap_over_examples(params: Any, x: jax.Array) -> None:
    assert_same(lambda f: jax.vmap(f, in_axes=(None, 0)), params, x)


def test_gradients_per_example(params: Any, x: jax.Array) -> None:
    gradient = lambda f: jax.grad(lambda p, x: project(f(p, x)))  # noqa: E731
    assert_same(lambda f: jax.vmap(gradient(f), in_axes=(None, 0)), params, x)


def test_ensemble_of_adapters(params: Any, x: jax.Array) -> None:
    """Factors mapped, the base shared."""
    axes = jax.tree.map(lambda _: None, params)
    axes["up"], axes["down"] = (dataclasses.replace(params[name], base=None, a=0, b=0) for name in ("up", "down"))
    many = jax.tree.map(
        lambda leaf, axis: leaf if axis is None else jnp.stack([leaf, -leaf, leaf**2]),
        params,
        axes,
        is_leaf=lambda leaf: leaf is None,
    )
    outputs = jax.jit(jax.vmap(factored, in_axes=(axes, None)))(many, x)
    for member in range(3):
        one = jax.tree.map(
            lambda leaf, axis, member=member: leaf if axis is None else leaf[member],
            many,
            axes,
            is_leaf=lambda leaf: leaf is None,
        )
        assert_close(outputs[member], merged(one, x))


def test_ensemble_of_models(params: Any, x: jax.Array) -> None:
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    outputs = jax.jit(jax.vmap(factored))(many, x)
    for member in range(2):
        assert_close(outputs[member], merged(jax.tree.map(lambda leaf, i=member: leaf[i], many), x[member]))


POLICIES = {
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names("hidden"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_checkpoint(policy: str, inside: bool, params: Any, x: jax.Array) -> None:
    remat = functools.partial(jax.checkpoint, policy=POLICIES[policy])
    actual = lj.adapt(remat(model), on_materialize="error") if inside else remat(factored)
    results = jax.jit(lambda p: [value_and_gradients(f)(p, x) for f in (actual, remat(merged))])(params)
    assert_close(results[0], results[1])


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_checkpoint_policies_decide_over_the_factored_dots(inside: bool, params: Any, x: jax.Array) -> None:
    def saved(policy: str) -> int:
        remat = functools.partial(jax.checkpoint, policy=POLICIES[policy])
        f = lj.adapt(remat(model), on_materialize="error") if inside else remat(factored)
        _, backward = jax.vjp(f, params, x)
        given = {id(leaf) for leaf in jax.tree.leaves((params, x))}
        return sum(leaf.size for leaf in jax.tree.leaves(backward) if id(leaf) not in given)

    nothing, names, everything = map(saved, ("nothing_saveable", "save_only_these_names", "everything_saveable"))
    assert nothing < names < everything
    assert nothing < saved("dots_saveable") <= everything


def test_checkpoint_of_a_gradient_taken_inside_keeps_its_barrier(params: Any, x: jax.Array) -> None:
    def inner_gradient(params: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: project(jax.checkpoint(model)(params, x)))(x)

    def barriers(f: Any) -> int:
        return jax.jit(f).lower(params, x).as_text().count("optimization_barrier")

    assert_as_merged(inner_gradient, params, x)
    assert barriers(lambda p, x: inner_gradient(merge_nodes(p), x)) > 0
    assert barriers(lj.adapt(inner_gradient, on_materialize="error")) > 0


def test_prevent_cse_of_each_argument(params: Any, x: jax.Array) -> None:
    layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), prevent_cse=(False, True))
    assert_as_merged(lambda p, x: layer(p["up"], x), params, x)
    assert_as_merged(lambda p, x: jax.grad(lambda x: project(layer(p["up"], x)))(x), params, x)


def test_inside_cond_switch_while_and_scan(params: Any, x: jax.Array) -> None:
    """The adapted call within the control flow of a training loop."""

    def loop(f: Any) -> Any:
        def run(p: Any, x: jax.Array) -> jax.Array:
            x = lax.cond(x.sum() > 0, lambda x: f(p, x), lambda x: -f(p, x), x)
            x = lax.switch(1, [lambda x: x, lambda x: f(p, x)], x)
            x = lax.scan(lambda x, _: (f(p, x), None), x, length=2)[0]
            return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(p, s[1])), (0, x))[1]

        return run

    assert_same(loop, params, x)


def test_while_loop_inside(params: Any, x: jax.Array) -> None:
    """No reverse mode through `while_loop`, so forward mode; the condition reads a weight too."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def more(state: Any) -> jax.Array:
            return (state[0] < 3) & (jnp.abs(state[1] @ p["up"]).max() > 1e-3)

        return lax.while_loop(more, lambda s: (s[0] + 1, jnp.tanh(model(p, s[1]))), (0, x))[1]

    adapted = lj.adapt(fn, on_materialize="error")
    results = [
        jax.jit(lambda p, x, f=f: jax.jvp(f, (p, x), (direction(p), x)))(params, x)
        for f in (adapted, lambda p, x: fn(merge_nodes(p), x))
    ]
    assert_close(results[0], results[1])


def test_while_loop_with_the_weight_in_its_carry(params: Any, x: jax.Array) -> None:
    def fn(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(state: Any) -> Any:
            i, w, x = state
            return i + 1, w, jnp.tanh(x @ w @ p["down"])

        _, w, x = lax.while_loop(lambda state: state[0] < 2, body, (0, p["up"], x))
        return x, x @ w

    results = [
        jax.jit(f)(params, x) for f in (lj.adapt(fn, on_materialize="error"), lambda p, x: fn(merge_nodes(p), x))
    ]
    assert_close(results[0], results[1])


def test_gradient_with_respect_to_inputs(params: Any, x: jax.Array) -> None:
    assert_same(lambda f: jax.grad(lambda p, x: project(f(p, x)), argnums=1), params, x)


def test_strongly_typed_scans_of_bfloat16() -> None:
    """A factored product must have the dtype of the one that it replaces, or the loop's carry changes type."""
    params = {"w": node("w", 3, D, D, axes="sio", dtype=jnp.bfloat16)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = normal("x", 2, D).astype(jnp.bfloat16)
    outputs = lj.adapt(fn, on_materialize="error")(params, x)
    assert outputs.dtype == jnp.bfloat16
    assert_close(outputs.astype(jnp.float32), fn(merge_nodes(params), x).astype(jnp.float32), 3e-2)


def test_casts_round_the_base_alone() -> None:
    """Small updates survive in the factors; added into a bfloat16 weight they would be rounded away."""
    weight, x = node("w", D, 6), normal("x", 2, D)
    rounded = dataclasses.replace(weight, base=weight.base.astype(jnp.bfloat16).astype(jnp.float32))
    outputs = lj.adapt(lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), on_materialize="error")(weight, x)
    assert_close(outputs, x @ merge_nodes(rounded))


@pytest.mark.parametrize(
    ("dtype", "precision"), [(jnp.bfloat16, None), (jnp.float32, lax.DotAlgorithmPreset.BF16_BF16_F32)]
)
def test_no_merged_weight_where_products_round(dtype: Any, precision: Any) -> None:
    """Whatever is asked for: a small update would be lost in the sum."""
    weight = jax.tree.map(lambda leaf: leaf.astype(dtype), node("w", D, 6))
    fn = lj.adapt(lambda w, x: jnp.matmul(x, w, precision=precision), on_materialize="error", matmul="merged_weight")
    jaxpr = jax.make_jaxpr(fn)(weight, normal("x", 2, D).astype(dtype))
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    assert names.count("dot_general") == 3
    assert "custom_jvp_call" not in names


def test_loops_and_checkpoints_keep_their_parameters() -> None:
    params, x = {"w": node("w", 4, D, D, axes="sio")}, normal("x", 2, D)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, w: (x @ w, None), prevent_cse=False, policy=POLICIES["dots_saveable"])
        return lax.scan(layer, x, p["w"], reverse=True, unroll=2)[0]

    jaxpr = jax.make_jaxpr(lj.adapt(fn, on_materialize="error"))(params, x)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [scan.params[name] for name in ("length", "reverse", "unroll")] == [4, True, 2]
    body = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])
    (remat,) = [eqn for eqn in body.eqns if eqn.primitive.name == "remat2"]
    assert remat.params["prevent_cse"] is False
    assert remat.params["policy"] is POLICIES["dots_saveable"]


@pytest.mark.parametrize("preferred", [jnp.float32, jnp.bfloat16])
def test_preferred_element_type(preferred: Any) -> None:
    params = {"w": node("w", D, 6, dtype=jnp.bfloat16)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, p["w"], preferred_element_type=preferred)

    x = normal("x", 2, D).astype(jnp.bfloat16)
    outputs = lj.adapt(fn, on_materialize="error")(params, x)
    assert outputs.dtype == preferred
    assert_close(outputs.astype(jnp.float32), fn(merge_nodes(params), x).astype(jnp.float32), 3e-2)


def test_inner_jit_with_donation_and_shardings(params: Any, x: jax.Array) -> None:
    """Such a `jit` is emitted again as one; a plain one is inlined."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(model, donate_argnums=1, in_shardings=(None, place), out_shardings=place)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return inner(p, jnp.sin(x))

    jaxpr = jax.make_jaxpr(lj.adapt(fn, on_materialize="error"))(params, x)
    (emitted,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
    assert emitted.params["name"] == "model"
    assert sum(emitted.params["donated_invars"]) == 1
    assert emitted.params["out_shardings"] == (place,)
    assert_close(lj.adapt(fn)(params, x), model(merge_nodes(params), jnp.sin(x)))


def test_inner_jit_that_returns_its_weights() -> None:
    """Flax's `nnx.jit` does; with a sharding it cannot be inlined, and the weights pass around it."""
    params = {"w": node("w", D, D)}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(lambda w, x: (x @ w, w, x), out_shardings=(place, place, place))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        y, w, x = inner(p["w"], x)
        return y @ w + x

    assert_as_merged(fn, params, normal("x", 2, D))


def test_outer_donation(params: Any, x: jax.Array) -> None:
    expected = merged(params, x)
    step = jax.jit(lambda p, x: (factored(p, x), jax.tree.map(jnp.negative, p)), donate_argnums=0)
    outputs, _ = step(jax.tree.map(jnp.copy, params), x)
    assert_close(outputs, expected)


def test_functions_with_custom_rules_keep_them(params: Any, x: jax.Array) -> None:
    """An activation with a derivative of its own, which meets no weight."""

    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    @jax.custom_jvp
    def doubled(x: jax.Array) -> jax.Array:
        return x

    doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    assert_as_merged(lambda p, x: clipped(doubled(jnp.tanh(x @ p["up"]))) @ p["down"], params, x)


def test_names_for_the_profiler_survive(params: Any, x: jax.Array) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x = jnp.sin(x)
            with jax.named_scope("query"):
                x = jax.jit(lambda w, x: x @ w)(p["up"], x)
        return lax.scan(lambda x, _: (jax.named_scope("step")(jnp.tanh)(x), None), x, length=2)[0]

    jaxpr = jax.make_jaxpr(jax.named_scope("outer")(lj.adapt(fn)))(params, x)
    scopes = [(eqn.primitive.name, str(eqn.source_info.name_stack)) for eqn in jaxpr.eqns]
    assert ("sin", "outer/attention") in scopes
    assert ("jit", "outer/attention/query") in scopes  # the adapted matmul, a function of its own
    compiled = jax.jit(jax.named_scope("outer")(lj.adapt(fn))).lower(params, x).compile().as_text()
    assert compiled
    assert "step/tanh" in compiled
    assert "outer/attention/query/jit(dot_general)/dot_general" in compiled


def test_effects_in_the_function_happen(params: Any, x: jax.Array, capfd: pytest.CaptureFixture[str]) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p["up"]
        jax.debug.print("mean {m}", m=y.mean(), ordered=True)
        return y

    jax.block_until_ready(jax.jit(lj.adapt(fn, on_materialize="error"))(params, x))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("mean") == 1
