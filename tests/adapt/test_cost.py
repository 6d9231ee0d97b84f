"""What the adapted function costs: read off its jaxpr and its compiled program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj

from ..jaxprs import equations
from .kit import merge_nodes, node, normal, project

# A prime number of tokens tells activations from weights.
IN, OUT, TOKENS = 16, 24, 11


def results_of_weight_size(fn: Any, *args: Any) -> list[str]:
    """Operations that yield a floating array as large as the weight, and no activation."""
    return [
        eqn.primitive.name
        for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr)
        for variable in eqn.outvars
        if variable.aval.size >= IN * OUT
        and variable.aval.size % TOKENS
        and jnp.issubdtype(variable.aval.dtype, jnp.floating)
    ]


def model(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])


def stack(p: Any, x: jax.Array) -> jax.Array:
    """A scan over two kinds of stacked weights, in 3-axis form."""

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return jnp.einsum("thk,hkd->td", jnp.tanh(jnp.einsum("td,dhk->thk", x, w["up"])), w["down"]), None

    return lax.scan(layer, x, p)[0]


@pytest.fixture(params=["plain", "stack"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, jax.Array]:
    if request.param == "plain":
        return model, {"w": node("w", IN, OUT)}, normal("x", TOKENS, IN)
    params = {"up": node("up", 3, IN, 4, 6, axes="sioo"), "down": node("down", 3, 4, 6, IN, axes="siio")}
    return stack, params, normal("x", TOKENS, IN)


def split(params: Any) -> lj.Partition:
    return lj.partition(params, lj.trainable_mask(params, lj.LoRA(rank=2, alpha=3, targets=tuple(params))))


def test_no_merged_weight_in_the_forward_pass(case: Any) -> None:
    fn, params, x = case
    assert results_of_weight_size(lambda p, x: fn(merge_nodes(p), x), params, x)
    assert results_of_weight_size(lj.adapt(fn), params, x) == []


def test_no_gradient_of_the_base_in_the_backward_pass(case: Any) -> None:
    """Nor anything else of its size, but the base's own transpose on its way into a matmul."""
    fn, params, x = case
    trainable, frozen = split(params)

    def loss(f: Any) -> Any:
        return lambda trainable, frozen, x: project(f(lj.combine(trainable, frozen), x))

    sizes = results_of_weight_size(jax.grad(loss(lj.adapt(fn))), trainable, frozen, x)
    assert set(sizes) <= {"transpose"}
    full = results_of_weight_size(jax.grad(loss(lambda p, x: fn(merge_nodes(p), x))), trainable, frozen, x)
    assert "dot_general" in full


@pytest.mark.parametrize(("strategy", "thin_products"), [("low_rank_first", 6), ("merged_weight", 4)])
def test_flops_of_a_training_step(strategy: Any, thin_products: int) -> None:
    """The formula: frozen 4·in·out and thin products of r·(in + out) a token, with a gradient for the input.

    What merging takes, 4·r·in·out and not for each token, is elementwise.
    """
    tokens, inner, outer, rank = 64, 48, 96, 4
    params, x = {"w": node("w", inner, outer, rank=rank)}, normal("x", 4, tokens // 4, inner)
    trainable, frozen = split(params)

    def loss(trainable: Any, x: jax.Array, frozen: Any) -> jax.Array:
        apply = lj.adapt(lambda p, x: x @ p["w"], matmul=strategy)
        return jnp.sum(apply(lj.combine(trainable, frozen), x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(trainable, x, frozen)
    flops = sum(
        2 * eqn.outvars[0].aval.size * _contracted(eqn)
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    )
    assert flops == tokens * (4 * inner * outer + thin_products * rank * (inner + outer))


def _contracted(eqn: Any) -> int:
    ((axes, _), _) = eqn.params["dimension_numbers"]
    size = 1
    for axis in axes:
        size *= eqn.invars[0].aval.shape[axis]
    return size


def test_merged_weight_is_formed_anew_in_the_backward_pass() -> None:
    """Kept from the forward pass, it would be a merged copy of every adapted weight; the compiler would like to."""
    tokens, inner, outer, rank = 8, 64, 96, 4
    weight, x, dy = node("w", inner, outer, rank=rank), normal("x", tokens, inner), normal("dy", tokens, outer)
    apply = lj.adapt(lambda w, x: x @ w, matmul="merged_weight")

    @jax.jit
    def both_passes(factors: Any, base: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
        y, backward = jax.vjp(lambda ab, x: apply(lj.LoRAWeight(base, *ab, scale=1.5, axes="io"), x), factors, x)
        return y, backward(dy)

    cost = both_passes.lower((weight.a, weight.b), weight.base, x, dy).compile().cost_analysis()
    assert cost
    products = tokens * (4 * inner * outer + 4 * rank * (inner + outer))
    merging = 2 * rank * inner * outer
    assert products + 2 * merging <= cost["flops"] < products + 2.5 * merging


def test_tokens_are_contracted_over_one_axis_and_the_rank_leads() -> None:
    """Both forms that XLA's CPU backend is slow at: two token axes contracted, and a thin result `(k, r)`."""
    params, x = {"w": node("w", IN, OUT)}, normal("x", 2, 5, IN)
    trainable, frozen = split(params)

    def loss(trainable: Any) -> jax.Array:
        return project(lj.adapt(model)(lj.combine(trainable, frozen), x))

    dots = [eqn for eqn in equations(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr) if "dot_g" in eqn.primitive.name]
    dots = [eqn for eqn in dots if eqn.outvars[0].aval.ndim > 1]  # the loss is a dot of vectors
    assert {len(eqn.params["dimension_numbers"][0][0]) for eqn in dots} == {1}
    assert (IN, 2) not in {eqn.outvars[0].aval.shape for eqn in dots}


def test_base_alone_decides_the_dtype_of_the_big_matmul() -> None:
    params = {"w": node("w", IN, OUT, dtype=jnp.bfloat16)}
    jaxpr = jax.make_jaxpr(lj.adapt(model))(params, normal("x", TOKENS, IN).astype(jnp.bfloat16))
    dots = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert {variable.aval.dtype for eqn in dots for variable in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def test_adapted_function_without_factors_in_use_is_the_functions_own_program() -> None:
    """Equations that meet no weight stay as they are, and in number; the low-rank path has a function of its own."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(jnp.var(x, axis=-1, keepdims=True) * x) @ p["w"]

    params, x = {"w": node("w", IN, OUT)}, normal("x", TOKENS, IN)
    count = lambda f, p: [eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(p, x).jaxpr)]  # noqa: E731
    plain, adapted = count(fn, {"w": params["w"].base}), count(lj.adapt(fn), params)
    extra = list(adapted)
    for name in plain:
        extra.remove(name)
    assert sorted(extra) == ["add", "dot_general", "dot_general", "jit", "mul", "remat2"]
