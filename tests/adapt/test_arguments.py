"""What goes into an adapted function and comes out of it, beside arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import lora_jax as lj

from .kit import assert_close, merge_nodes, node, normal

D = 8


@pytest.fixture
def params() -> Any:
    return {"w": node("w", D, 6), "b": normal("b", 6)}


@pytest.fixture
def x() -> jax.Array:
    return normal("x", 3, D)


def adapt(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lj.adapt(fn, on_materialize="error")


def test_python_values_stay_python_values(params: Any, x: jax.Array) -> None:
    def fn(
        p: Any, x: jax.Array, deterministic: bool, name: str, activation: Any, count: int, shape: tuple[int, int]
    ) -> Any:
        assert deterministic is True
        assert type(count) is int
        y = activation(x @ p["w"])
        return y.reshape(shape) if name == "flat" else y * count

    args = (True, "flat", jnp.tanh, 3, (9, 2))
    assert_close(adapt(fn)(params, x, *args), fn(merge_nodes(params), x, *args))


def test_keyword_arguments_and_nodes_in_them(params: Any, x: jax.Array) -> None:
    def fn(x: jax.Array, *, params: Any, deterministic: bool, extra: Any) -> jax.Array:
        assert deterministic is False
        return x @ params["w"] + params["b"][None] + x @ extra[0]

    extra = [node("extra", D, 6)]
    expected = fn(x, params=merge_nodes(params), deterministic=False, extra=merge_nodes(extra))
    assert_close(adapt(fn)(x, params=params, deterministic=False, extra=extra), expected)


def test_several_trees(params: Any, x: jax.Array) -> None:
    """Teacher and student: leaves with one path in two trees keep apart."""

    def fn(student: Any, teacher: Any, x: jax.Array) -> jax.Array:
        return x @ student["w"] - 2 * (x @ teacher["w"])

    teacher = {"w": node("teacher", D, 6)}
    assert_close(adapt(fn)(params, teacher, x), fn(merge_nodes(params), merge_nodes(teacher), x))


def test_a_node_as_the_whole_tree(x: jax.Array) -> None:
    weight = node("w", D, 6)
    assert_close(adapt(lambda w, x: x @ w)(weight, x), x @ merge_nodes(weight))


def test_trees_without_nodes_pass_untraced(x: jax.Array) -> None:
    def fn(p: Any, x: Any) -> Any:
        assert not isinstance(p["w"], Tracer)
        return x @ p["w"]

    assert_close(adapt(fn)({"w": normal("w", D, 6)}, x), x @ normal("w", D, 6))


def test_outputs_that_are_no_arrays(params: Any, x: jax.Array) -> None:
    def fn(p: Any, x: jax.Array) -> Any:
        return {"y": x @ p["w"], "name": "logits", "count": 3, "none": None, "call": jnp.tanh, "bias": p["b"], "x": x}

    out = adapt(fn)(params, x)
    assert (out["name"], out["count"], out["none"], out["call"]) == ("logits", 3, None, jnp.tanh)
    assert_close([out["y"], out["bias"], out["x"]], [x @ merge_nodes(params)["w"], params["b"], x])


def test_keys_and_integers_in_and_out(params: Any, x: jax.Array) -> None:
    def fn(p: Any, x: jax.Array, key: jax.Array, steps: jax.Array) -> Any:
        key, own = jax.random.split(key)
        noise = jax.random.normal(own, (3, 6))
        return x @ p["w"] + noise, key, steps + 1, jnp.argmax(x @ p["w"], axis=-1)

    args = (x, jax.random.key(3), jnp.int32(4))
    (y, key, steps, best), expected = adapt(fn)(params, *args), fn(merge_nodes(params), *args)
    assert_close([y, steps, best], [expected[0], expected[2], expected[3]])
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(expected[1]))


def test_numpy_parameters(x: jax.Array) -> None:
    params = {"w": jax.tree.map(np.asarray, node("w", D, 6)), "b": np.ones(6, np.float32)}

    def fn(p: Any, x: Any) -> jax.Array:
        return jnp.tanh(x @ p["w"][:, ::2].T.T) @ p["w"].reshape(D, 2, 3)[0].T + p["b"][0]

    assert_close(lj.adapt(fn, on_materialize="silent")(params, x), fn(merge_nodes(params), x))


def test_closures_over_tracers(params: Any, x: jax.Array) -> None:
    """The adapted function may close over values of the transformations around it."""

    def around(f: Any) -> Any:
        def loss(scale: jax.Array, p: Any, x: jax.Array) -> jax.Array:
            inner = lambda p: (x * scale) @ p["w"] + scale * p["b"][None]  # noqa: E731
            return jnp.sum(jnp.tanh(f(inner)(p)))

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None, None)))

    merging = lambda inner: lambda p: inner(merge_nodes(p))  # noqa: E731
    scales = jnp.array([0.5, 2.0])
    assert_close(around(adapt)(scales, params, x), around(merging)(scales, params, x))


def test_node_made_inside_a_transformation(x: jax.Array) -> None:
    """A node whose base is a constant and whose factors are traced, as with a frozen base closed over."""
    base = normal("w", D, 6)

    def loss(factors: Any, fold: bool) -> jax.Array:
        weight = lj.LoRAWeight(base, *factors, scale=2.0, axes="io")
        return jnp.sum(jnp.sin(x @ merge_nodes(weight) if fold else adapt(lambda w, x: x @ w)(weight, x)))

    factors = (normal("a", 2, D), normal("b", 2, 6))
    assert_close(jax.grad(loss)(factors, False), jax.grad(loss)(factors, True))


def test_signature_and_documentation_are_the_functions(params: Any) -> None:
    def fn(p: Any, x: jax.Array, *, flag: bool = False) -> None:
        """Documented."""

    adapted = lj.adapt(fn)
    assert inspect.signature(adapted) == inspect.signature(fn)
    assert (adapted.__name__, adapted.__doc__) == ("fn", "Documented.")


def test_bound_methods_and_partials(params: Any, x: jax.Array) -> None:
    class Model:
        power = 2

        def apply(self, p: Any, x: jax.Array) -> jax.Array:
            return (x @ p["w"]) ** self.power

    assert_close(adapt(Model().apply)(params, x), (x @ merge_nodes(params)["w"]) ** 2)
    assert_close(adapt(jax.tree_util.Partial(Model().apply))(params, x), (x @ merge_nodes(params)["w"]) ** 2)


def test_errors_in_the_function_are_its_own(params: Any) -> None:
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions to have the same shape"):
        adapt(lambda p, x: x @ p["w"])(params, jnp.ones((3, D + 1)))


def test_abstract_evaluation(params: Any, x: jax.Array) -> None:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert jax.eval_shape(adapt(lambda p, x: x @ p["w"]), shapes, x).shape == (3, 6)


def test_explain_and_trace_weights_take_shapes_and_static_arguments(params: Any) -> None:
    def fn(p: Any, x: jax.Array, *, deterministic: bool) -> Any:
        assert deterministic is True
        return x @ p["w"], "label"

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    x = jax.ShapeDtypeStruct((3, D), jnp.float32)
    assert [(row.path, row.op) for row in lj.explain(fn, shapes, x, deterministic=True)] == [("w", "dot_general")]
    base = {"w": jax.ShapeDtypeStruct((D, 6), jnp.float32)}
    assert lj.trace_weights(fn, base, x, deterministic=True) == {"w": lj.Use("dot_general", "io")}
