"""Dropout's keys on their way through the transform: one mask for each call, leaf, use and iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj

from .kit import assert_close, merge_nodes, node, normal

D, RATE = 8, 0.5


def dropping(*args: Any, **kwargs: Any) -> Any:
    """A node without a base, so that only what the factors do is seen."""
    weight = node(*args, **kwargs)
    return dataclasses.replace(weight, base=0 * weight.base, dropout=RATE)


def run(fn: Callable[..., Any], params: Any, *args: Any, seed: int | None = 0) -> Any:
    key = None if seed is None else jax.random.key(seed)
    return jax.jit(lj.adapt(fn, on_materialize="error"))(lj.with_dropout(params, key), *args)


def test_off_without_a_key() -> None:
    params, x = {"w": dropping("w", D, 6)}, normal("x", 5, D)
    assert_close(run(lambda p, x: x @ p["w"], params, x, seed=None), x @ merge_nodes(params)["w"])


def test_each_element_is_dropped_or_scaled() -> None:
    """`mask · x / (1 - rate)`: read off a node that passes its input on."""
    eye = lj.LoRAWeight(jnp.zeros((D, D)), jnp.eye(D), jnp.eye(D), scale=1.0, axes="io", dropout=RATE)
    x = 1 + normal("x", 64, D) ** 2
    ratio = np.asarray(run(lambda p, x: x @ p["w"], {"w": eye}, x) / x)
    np.testing.assert_allclose(np.unique(ratio.round(4)), [0, 1 / (1 - RATE)])
    assert abs((ratio > 0).mean() - (1 - RATE)) < 0.1


def test_the_base_sees_the_whole_input() -> None:
    weight = dataclasses.replace(node("w", D, 6), b=jnp.zeros((2, 6)), dropout=RATE)
    x = normal("x", 5, D)
    assert_close(run(lambda p, x: x @ p["w"], {"w": weight}, x), x @ weight.base)


def test_calls_leaves_and_uses_differ() -> None:
    same = dropping("w", D, 6)
    params, x = {"w": same, "v": same}, normal("x", 5, D)

    def fn(p: Any, x: jax.Array) -> Any:
        return x @ p["w"], x @ p["w"], x @ p["v"], jax.checkpoint(lambda w, x: x @ w)(p["w"], x)

    outputs = [*run(fn, params, x), *run(fn, params, x, seed=1)]
    assert all_differ(outputs)
    for one, other in zip(run(fn, params, x), outputs[:4], strict=True):
        np.testing.assert_array_equal(one, other)


LOOPS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "scan, constant": lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"][0]), 0, length=3)[1],
    "scan, stacked": lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
    "fori_loop": lambda p, x: lax.fori_loop(0, 3, lambda i, ys: ys.at[i].set(x @ p["w"][i]), jnp.zeros((3, 5, 6))),
    "while_loop": lambda p, x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ p["w"][0])), (0, jnp.zeros((3, 5, 6)))
    )[1],
    "unrolled": lambda p, x: jnp.stack([x @ p["w"][i] for i in range(3)]),
    "batched": lambda p, x: jnp.einsum("etd,edf->etf", jnp.broadcast_to(x, (3, 5, D)), p["w"]),
    "scan of remat": lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0, p["w"])[1],
}


@pytest.mark.parametrize("name", LOOPS)
def test_iterations_and_members_differ(name: str) -> None:
    member = dropping("w", D, 6)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), dataclasses.replace(member, axes="sio"))
    outputs = run(LOOPS[name], {"w": stack}, normal("x", 5, D))
    assert outputs.shape == (3, 5, 6)
    assert all_differ(list(outputs))


LAYOUTS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "transpose": lambda w, x: x @ w.T.T,
    "reshape": lambda w, x: jnp.einsum("td,dnh->tnh", x, w.reshape(D, 2, 3)),
    "slice": lambda w, x: x @ w[:, ::2],
    "split": lambda w, x: x @ jnp.split(w, 2, axis=1)[1],
    "cast": lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    "scalar": lambda w, x: x @ (2 * w),
    "broadcast": lambda w, x: jnp.broadcast_to(x, (3, 5, D)) @ jnp.broadcast_to(w, (3, D, 6)),
    "barrier": lambda w, x: x @ lax.optimization_barrier(w),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -x @ w, w),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "jit with a sharding": lambda w, x: jax.jit(
        lambda w, x: x @ w, out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )(w, x),
    "convolution": lambda w, x: lax.conv_general_dilated(
        x.reshape(5, 2, 4), w.reshape(2, 4, 6), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "ragged": lambda w, x: lax.ragged_dot(x, w[None], jnp.array([5])),
    "shard_map": lambda w, x: jax.shard_map(
        lambda w, x: x @ w,
        mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]),
        in_specs=(jax.P(), jax.P("d")),
        out_specs=jax.P("d"),
    )(w, x),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_key_stays_with_the_weight(name: str) -> None:
    fn, x = LAYOUTS[name], normal("x", 5, D)
    params = {"w": dropping("w", D, 6)}
    off, on, again = (run(lambda p, x: fn(p["w"], x), params, x, seed=seed) for seed in (None, 0, 0))
    assert not np.allclose(off, on)
    np.testing.assert_array_equal(on, again)


def test_shards_differ() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(lambda p, x: x @ p["w"], mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d"))
    half = normal("x", 5, D)
    outputs = run(fn, {"w": dropping("w", D, 6)}, jnp.concatenate([half, half]))
    assert all_differ([outputs[:5], outputs[5:]])


def test_rematerialization_draws_the_same_mask_again() -> None:
    """The gradient of a rematerialized step is the plain step's: the backward pass may not draw another mask."""
    params, x = lj.with_dropout({"w": dropping("w", D, 6)}, jax.random.key(0)), normal("x", 5, D)

    def loss(remat: Callable[..., Any]) -> Any:
        fn = lj.adapt(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
        return jax.jit(jax.grad(lambda x: remat(fn)(params, x)))(x)

    assert_close(loss(jax.checkpoint), loss(lambda f: f))


def all_differ(outputs: list[jax.Array]) -> bool:
    return all(not np.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
