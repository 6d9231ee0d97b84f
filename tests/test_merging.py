from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

RNG = np.random.default_rng(0)


def node(shape: tuple[int, ...] = (6, 4), axes: str = "io", *, dtype: Any = jnp.float32, rank: int = 2) -> Any:
    def sizes(label: str) -> tuple[int, ...]:
        return tuple(size for size, own in zip(shape, axes, strict=True) if own == label)

    def draw(shape: tuple[int, ...]) -> Any:
        return jnp.asarray(RNG.normal(size=shape).astype(np.float32))

    a, b = draw((*sizes("s"), rank, *sizes("i"))), draw((*sizes("s"), rank, *sizes("o")))
    return lj.LoRAWeight(draw(shape).astype(dtype), a, b, scale=1.5, axes=axes)


def wanted(weight: Any) -> np.ndarray:
    """`W + scale · B A` by NumPy, in float64, for any labels."""
    letters = dict(zip(range(weight.ndim), "uvwxyz", strict=False))
    by = {label: "".join(letters[n] for n, own in enumerate(weight.axes) if own == label) for label in "sio"}
    equation = f"{by['s']}r{by['i']},{by['s']}r{by['o']}->{''.join(letters.values())}"
    base, a, b = (np.asarray(array, np.float64) for array in (weight.base, weight.a, weight.b))
    return base + weight.scale * np.einsum(equation, a, b)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((6, 4), "io"),
        ((6, 4), "oi"),
        ((5, 2, 3), "ioo"),
        ((2, 3, 5), "iio"),
        ((2, 5, 3), "oio"),
        ((3, 6, 4), "sio"),
        ((6, 3, 4), "iso"),
        ((3, 2, 6, 4), "ssio"),
        ((3, 3, 4, 5), "iiio"),
    ],
)
def test_merging_is_the_formula_for_any_labels(shape: tuple[int, ...], axes: str) -> None:
    weight = node(shape, axes)
    np.testing.assert_allclose(lj.merge_params({"w": weight})["w"], wanted(weight), rtol=1e-5, atol=1e-6)


def test_leaves_without_factors_are_the_same_objects() -> None:
    tree = {"w": node(), "bias": jnp.ones(3), "act": jax.nn.relu, "none": None}
    merged = lj.merge_params(tree)
    assert merged["bias"] is tree["bias"]
    assert merged["act"] is jax.nn.relu
    plain = {"bias": jnp.ones(3)}
    assert lj.merge_params(plain)["bias"] is plain["bias"]


def test_bfloat16_is_rounded_once() -> None:
    """Summed in float32: a change below the base's resolution is rounded with the sum, not before it."""
    weight = node(dtype=jnp.bfloat16)
    merged = lj.merge_params({"w": weight})["w"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(wanted(weight).astype(np.float32)).astype(jnp.bfloat16))


def test_another_dtype() -> None:
    weight = node(dtype=jnp.bfloat16)
    wide = lj.merge_params({"w": weight}, dtype=jnp.float32)["w"]
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, wanted(weight), rtol=1e-5, atol=1e-6)
    assert lj.merge_params({"w": node()}, dtype="bfloat16")["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be a floating type, got"):
        lj.merge_params({"w": weight}, dtype=jnp.int32)


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_broken_factor_is_refused(factor: str, value: float) -> None:
    weight = node()
    broken = dataclasses.replace(weight, **{factor: getattr(weight, factor).at[0, 1].set(value)})
    with pytest.raises(ValueError, match=f"cannot merge `layers/0/w`: its factor `{factor}` holds NaN or infinity"):
        lj.merge_params({"layers": [{"w": broken}]})


def test_under_jit_and_grad() -> None:
    weight = node()
    for merged in (jax.jit(lj.merge_params)({"w": weight}), jax.jit(lambda: lj.merge_params({"w": weight}))()):
        np.testing.assert_allclose(merged["w"], wanted(weight), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(lj.merge_params({"w": w})["w"] ** 2))(weight)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("spec", [jax.P("x"), jax.P(None, "x"), jax.P()])
def test_the_sharding_of_the_base_is_kept(spec: Any) -> None:
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.NamedSharding(mesh, spec)
    base = jax.device_put(jnp.asarray(RNG.normal(size=(6, 4)).astype(np.float32)), sharding)
    params = lj.attach({"w": base}, lj.LoRA(rank=2, alpha=3, targets=("w",)), key=jax.random.key(0))
    weight = dataclasses.replace(params["w"], b=jnp.ones_like(params["w"].b))
    merged = lj.merge_params({"w": weight})["w"]
    assert merged.sharding == sharding
    np.testing.assert_allclose(merged, wanted(weight), rtol=1e-5, atol=1e-6)


def test_an_array_that_jax_may_move_stays_so() -> None:
    """Else a function compiled for the base compiles anew for the merged tree."""
    assert not lj.merge_params({"w": node()})["w"].committed
    second = jax.devices()[1]
    placed = jax.device_put(node(), second)
    assert lj.merge_params({"w": placed})["w"].devices() == {second}


def test_equal_shapes_compile_once() -> None:
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if "backend_compile" in event:
            compiled.append(event)

    tree = {f"w{index}": node((7, 5)) for index in range(4)}
    lj.merge_params({"w": node((7, 5))})
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        lj.merge_params(tree)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
