"""`trace_weights` where uses differ; its labels for every way to write a model are tested with the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj

from .kit import assert_as_merged, attach_everywhere, normal

D = 8
Fn = Callable[[Any, jax.Array], Any]


def uses_of(fn: Fn, *shape: int) -> lj.Use:
    return lj.trace_weights(fn, {"w": normal("w", *shape)}, normal("x", 4, D))["w"]


AGREEING: dict[str, tuple[Fn, tuple[int, ...], str]] = {
    "once contracted, once free": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (D, 6), "io"),
    "first by its out axis": (lambda p, x: (x @ p["w"].T) @ p["w"], (6, D), "oi"),
    "batched, and free": (
        lambda p, x: (jnp.einsum("ed,edf->ef", x[:3], p["w"]), jnp.einsum("td,edf->tef", x, p["w"])),
        (3, D, 6),
        "sio",
    ),
    "indexed, and whole": (lambda p, x: (x @ p["w"][0], jnp.einsum("td,edf->tef", x, p["w"])), (3, D, 6), "oio"),
    "indexed only": (lambda p, x: x @ p["w"][0] @ p["w"][1].T, (3, D, 6), "sio"),
    "scanned, and whole": (
        lambda p, x: (
            lax.scan(lambda c, w: (c + x @ w, None), jnp.zeros((4, 6)), p["w"])[0],
            jnp.einsum("td,edf->tef", x, p["w"]),
        ),
        (3, D, 6),
        "sio",
    ),
    "beside a norm of it": (lambda p, x: (x @ p["w"], jnp.sum(jnp.abs(p["w"]))), (D, 6), "io"),
}


@pytest.mark.parametrize("name", AGREEING)
def test_uses_that_agree(name: str) -> None:
    fn, shape, labels = AGREEING[name]
    assert uses_of(fn, *shape).labels == labels
    params = {"w": normal("w", *shape)}
    adapted = attach_everywhere(fn, params, normal("x", 4, D))
    assert adapted["w"].axes == labels
    mode = "silent" if "norm" in name else "error"
    assert_as_merged(fn, adapted, normal("x", 4, D), on_materialize=mode)


CONFLICTING: dict[str, tuple[Fn, tuple[int, ...], str]] = {
    "heads contracted with and without the group": (
        lambda p, x: (jnp.einsum("td,hdf->thf", x, p["w"]), jnp.einsum("thd,hdf->tf", x[:, None].repeat(2, 1), p["w"])),
        (2, D, 6),
        "dot_general needs the labels 'oio', dot_general needs 'iio': choose by hand",
    ),
    "batched and contracted": (
        lambda p, x: (
            jnp.einsum("hd,hdf->hf", x[:2], p["w"]),
            jnp.einsum("thd,hdf->tf", x[:, None].repeat(2, 1), p["w"]),
        ),
        (2, D, 6),
        "dot_general needs the labels 'sio', dot_general needs 'iio': choose by hand",
    ),
    "contracted and not": (
        lambda p, x: (x @ p["w"], jnp.einsum("t,df->tdf", x[:, 0], p["w"])),
        (D, 6),
        "dot_general needs the labels 'io', dot_general needs 'oo': choose by hand",
    ),
    "a part of a fused axis": (
        lambda p, x: jnp.einsum("td,hdf->thf", x, p["w"].reshape(2, D, 3)),
        (2 * D, 3),
        "one of its axes is split between the two sides of the operation",
    ),
}


@pytest.mark.parametrize("name", CONFLICTING)
def test_uses_without_labels_say_why(name: str) -> None:
    fn, shape, reason = CONFLICTING[name]
    use = uses_of(fn, *shape)
    assert use.labels is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(use.reason)
    params, method = {"w": normal("w", *shape)}, lj.LoRA(rank=1, alpha=1, targets=("w",))
    with pytest.raises(ValueError, match=f"`w` .* unknown .*{reason}.*give them yourself, `uses . ...` with `uses="):
        lj.attach(params, method, key=jax.random.key(0), uses={"w": use})


@jax.custom_vjp
def checked_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


checked_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

SAYING_NOTHING: dict[str, tuple[Fn, str]] = {
    "elementwise": (lambda p, x: x @ jnp.tanh(p["w"]), r"merged by tanh at .*test_uses\.py:\d+.*: there is no rule"),
    "custom_vjp": (lambda p, x: checked_product(x, p["w"]), "merged by custom_vjp_call at .*: there is no rule"),
    "masked": (lambda p, x: x @ jnp.where(jnp.eye(D, 6) > 0, p["w"], 0), "merged by select_n at .*: there is no rule"),
    "in a sum": (lambda p, x: x @ (p["w"] + 1.0), "merged by add at .*: there is no rule"),
}


@pytest.mark.parametrize("name", SAYING_NOTHING)
def test_a_weight_of_two_axes_whose_uses_say_nothing_is_read_by_the_convention(name: str) -> None:
    """As without `uses`: it is merged where it is used, and that is said there."""
    fn, reason = SAYING_NOTHING[name]
    params, x = {"w": normal("w", D, 6), "v": normal("v", 6, D)}, normal("x", 4, D)
    uses = lj.trace_weights(lambda p, x: fn(p, x) @ p["v"], params, x)
    assert (uses["w"].labels, uses["v"].labels) == (None, "io")
    method = lj.LoRA(rank=2, alpha=2, targets=("w", "v"))
    adapted = lj.attach(params, method, key=jax.random.key(0), uses=uses)
    assert adapted["w"].axes == adapted["v"].axes == "io"
    with pytest.warns(lj.MaterializeWarning, match="`w` is merged"):
        jax.eval_shape(lj.adapt(fn), adapted, x)
    adapted["w"] = dataclasses.replace(adapted["w"], b=0.3 * normal("b", *adapted["w"].b.shape))
    assert_as_merged(lambda p, x: fn(p, x) @ p["v"], adapted, x, on_materialize="silent")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(uses["w"].reason)


def test_more_axes_than_two_need_labels_though_their_uses_say_nothing() -> None:
    params, method = {"w": normal("w", 2, D, 3)}, lj.LoRA(rank=1, alpha=1, targets=("w",))
    uses = lj.trace_weights(lambda p, x: x @ jnp.tanh(p["w"]).sum(0), params, normal("x", 4, D))
    with pytest.raises(ValueError, match=r"`w` \(2, 8, 3\) are unknown \(merged by tanh .*\): give them yourself"):
        lj.attach(params, method, key=jax.random.key(0), uses=uses)
    with pytest.raises(ValueError, match=r"are unknown \(`uses` has no entry for it: the function doesn't use it\)"):
        lj.attach(params, method, key=jax.random.key(0), uses={})
    with pytest.raises(ValueError, match=r"are unknown: pass `uses=lj.trace_weights"):
        lj.attach(params, method, key=jax.random.key(0))


def test_override_by_hand() -> None:
    """The user chooses; the use that the choice does not fit is merged, and right."""
    fn, shape, _ = CONFLICTING["heads contracted with and without the group"]
    params = {"w": normal("w", *shape)}
    uses = lj.trace_weights(fn, params, normal("x", 4, D)) | {"w": lj.Use("dot_general", "oio")}
    method = lj.LoRA(rank=2, alpha=2, targets=("w",))
    adapted = lj.attach(params, method, key=jax.random.key(0), uses=uses)
    assert adapted["w"].a.shape == (2, D)
    rows = lj.explain(fn, adapted, normal("x", 4, D))
    assert [row.factored for row in rows] == [True, False]
    assert_as_merged(fn, adapted, normal("x", 4, D), on_materialize="silent")


def test_reason_of_a_merge_beside_a_factored_use() -> None:
    fn, shape, labels = AGREEING["beside a norm of it"]
    use = uses_of(fn, *shape)
    assert (use.op, use.labels) == ("dot_general", labels)
    assert "merged by abs at" in use.reason


def test_biases_norms_and_unused_weights_have_no_entry() -> None:
    params = {"w": normal("w", D, 6), "bias": normal("b", 4, 6), "unused": normal("u", D, D)}
    assert list(lj.trace_weights(lambda p, x: x @ p["w"] + p["bias"], params, normal("x", 4, D))) == ["w"]


def test_nothing_is_computed() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: pytest.fail("computed"), x)
        return x @ p["w"]

    big = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((8, 1 << 20), jnp.bfloat16)
    assert lj.trace_weights(fn, big, x)["w"].labels == "io"


def test_explanation_is_a_table() -> None:
    fn, shape, _ = AGREEING["beside a norm of it"]
    adapted = attach_everywhere(fn, {"w": normal("w", *shape)}, normal("x", 4, D))
    lines = str(lj.explain(fn, adapted, normal("x", 4, D))).splitlines()
    assert lines[0].split() == ["weight", "operation", "computed", "where"]
    assert [line.split()[:3] for line in lines[1:]] == [["w", "dot_general", "factored"], ["w", "abs", "merged:"]]
    assert all("test_uses.py:" in line for line in lines[1:])
    assert len({line.index("/") for line in lines[1:]}) == 1
