"""Two devices: `shard_map` with its default checks, sharded `jit`, and meshes whose axes are explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import lora_jax as lj

from .kit import assert_as_merged, assert_close, merge_nodes, node, normal, project

pytestmark = pytest.mark.usefixtures("every_strategy")

P = jax.P
D = 8


def mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:2])


def model(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


def tensor_parallel(p: Any, x: jax.Array) -> jax.Array:
    """Megatron's MLP: `up` split by its out axis, `down` by its in axis, one sum at the end."""
    return lax.psum(jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"], "d")


def fully_sharded(p: Any, x: jax.Array) -> jax.Array:
    """Weights lie split, and are gathered where they are used."""
    up = lax.all_gather(p["up"], "d", axis=1, tiled=True)
    down = lax.all_gather(p["down"], "d", axis=1, tiled=True)
    bias = lax.all_gather(p["bias"], "d", axis=0, tiled=True)
    return jnp.tanh(x @ up + bias[None]) @ down


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def psum_of_a_gradient(p: Any, x: jax.Array) -> jax.Array:
    return x + jax.grad(lambda x: project(model(p, x)))(x)


def mlp() -> Any:
    return {"up": node("up", D, 6), "bias": normal("bias", 6), "down": node("down", 6, D)}


TENSOR = {"up": P(None, "d"), "bias": P("d"), "down": P("d", None)}
CASES: dict[str, tuple[Callable[..., Any], Any, Any, Any, Any]] = {
    "data parallel": (model, mlp(), P(), P("d"), P("d")),
    "tensor parallel": (tensor_parallel, mlp(), TENSOR, P(), P()),
    "fully sharded": (fully_sharded, mlp(), {"up": P(None, "d"), "bias": P("d"), "down": P(None, "d")}, P("d"), P("d")),
    "layers split between devices": (
        lambda p, x: lax.psum(scanned(p, lax.pcast(x, "d", to="varying")), "d"),
        {"layers": node("layers", 4, D, D, axes="sio")},
        P("d"),
        P(),
        P(),
    ),
    "scan, data parallel": (scanned, {"layers": node("layers", 4, D, D, axes="sio")}, P(), P("d"), P("d")),
    "embedding split by its vocabulary": (
        lambda p, x: lax.psum(x @ p["table"], "d"),
        {"table": node("table", 6, D)},
        P("d"),
        P(None, "d"),
        P(),
    ),
    "gradient inside": (psum_of_a_gradient, mlp(), P(), P("d"), P("d")),
    "remat": (jax.checkpoint(model), mlp(), P(), P("d"), P("d")),
}


@pytest.mark.parametrize("name", CASES)
def test_shard_map(name: str) -> None:
    fn, params, in_specs, x_spec, out_spec = CASES[name]
    x = normal("x", 4, 6 if "vocabulary" in name else D)
    mapped = jax.shard_map(fn, mesh=mesh(), in_specs=(in_specs, x_spec), out_specs=out_spec)
    assert_as_merged(mapped, params, x)


def test_adapt_inside_of_shard_map() -> None:
    """The other way round: every shard calls an adapted function."""

    def gradients(f: Any) -> Any:
        mapped = jax.shard_map(f, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))
        return jax.jit(jax.grad(lambda p, x: project(mapped(p, x))))

    x = normal("x", 4, D)
    adapted = gradients(lj.adapt(model, on_materialize="error"))(mlp(), x)
    assert_close(adapted, gradients(lambda p, x: model(merge_nodes(p), x))(mlp(), x))


def test_jit_of_sharded_arguments() -> None:
    place = lambda spec: NamedSharding(mesh(), spec)  # noqa: E731
    x = jax.device_put(normal("x", 4, D), place(P("d")))
    base = {"up": normal("up", D, 6), "bias": normal("bias", 6), "down": normal("down", 6, D)}
    base = {name: jax.device_put(leaf, place(TENSOR[name])) for name, leaf in base.items()}
    params = lj.attach(base, lj.LoRA(rank=2, alpha=4, targets=("up", "down")), key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sign(leaf) + 0.1, params)
    assert params["up"].b.sharding.spec == P(None, "d")

    def constrained(p: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ lax.with_sharding_constraint(p["up"], place(P(None, "d"))))
        return lax.with_sharding_constraint(hidden @ p["down"], place(P("d")))

    adapted = jax.jit(lj.adapt(constrained, on_materialize="error"))(params, x)
    assert adapted.sharding.is_equivalent_to(place(P("d")), 2)
    assert_close(adapted, constrained(merge_nodes(params), x))


def explicit_case(x_spec: P, w_spec: P) -> tuple[Any, jax.Array]:
    w = node("w", D, 6)
    specs = (w_spec, P(None, w_spec[0]), P(None, w_spec[1]))
    arrays = [jax.device_put(array, spec) for array, spec in zip((w.base, w.a, w.b), specs, strict=True)]
    return {"w": lj.LoRAWeight(*arrays, scale=w.scale, axes="io")}, jax.device_put(normal("x", 4, 2, D), x_spec)


@pytest.mark.parametrize(("x_spec", "w_spec"), [(P("d"), P(None, None)), (P(), P(None, "d"))])
def test_explicit_axes(x_spec: P, w_spec: P) -> None:
    """Sharding in types: a factored product has the sharding of the one that it stands for."""
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params, x = explicit_case(x_spec, w_spec)

        def fn(p: Any, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ p["w"])

        adapted = lj.adapt(fn, on_materialize="error")
        outputs = jax.jit(adapted)(params, x)
        assert outputs.sharding.spec == jax.jit(fn)({"w": params["w"].base}, x).sharding.spec
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(adapted(p, x)))))(params)
    alone, x = {"w": node("w", D, 6)}, normal("x", 4, 2, D)
    assert_close(np.asarray(outputs), np.asarray(fn(merge_nodes(alone), x)))
    expected = jax.grad(lambda p: jnp.sum(jnp.sin(fn(merge_nodes(p), x))))(alone)
    assert_close(jax.tree.map(np.asarray, gradient), jax.tree.map(np.asarray, expected))


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "out_sharding"),
    [(P(None, None, "d"), P("d", None), P()), (P(None, "d"), P(None, None), None), (P("d"), P(None, None), P())],
    ids=["sum over devices", "split sequences", "a placed result"],
)
def test_explicit_axes_that_the_factored_form_cannot_follow(x_spec: P, w_spec: P, out_sharding: P | None) -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params, x = explicit_case(x_spec, w_spec)

        def fn(p: Any, x: jax.Array) -> jax.Array:
            return jnp.einsum("btd,df->btf", x, p["w"], out_sharding=out_sharding)

        with pytest.warns(lj.MaterializeWarning, match="`w` is merged .* split along explicit mesh axes"):
            outputs = jax.jit(lj.adapt(fn))(params, x)
    expected = np.asarray(normal("x", 4, 2, D)) @ np.asarray(merge_nodes(node("w", D, 6)))
    assert_close(np.asarray(outputs), expected)
