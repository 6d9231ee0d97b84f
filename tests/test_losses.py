"""The loss in chunks is the plain one, in value and gradient, and no array has all logits."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.errors import ArgumentError
from lora_jax.losses import chunked_cross_entropy, token_scores

RNG = np.random.default_rng(0)
WIDTH, WORDS = 8, 11
# Shapes of the targets and chunks: several to a row, one row, all in one, a single target, more rows than a chunk.
SHAPES = [((2, 7), 4), ((5,), 2), ((3, 2, 5), 100), ((), 3), ((9, 3), 4)]
SETTINGS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1}]


def draw(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    hidden = jnp.asarray(RNG.normal(size=(*shape, WIDTH)), jnp.float32)
    head = jnp.asarray(RNG.normal(size=(WIDTH, WORDS)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, WORDS, shape), jnp.int32)
    return hidden, head, targets, jnp.asarray(RNG.normal(size=shape), jnp.float32)


def plain(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    logits = hidden @ head
    lse = jax.nn.logsumexp(logits, axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (1 - label_smoothing) * losses + label_smoothing * (lse - logits.mean(-1)) + z_loss * lse**2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("shape", "chunk"), SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_values_and_derivatives_are_the_plain_loss_s(
    shape: tuple[int, ...], chunk: int, tied: bool, settings: dict[str, float]
):
    hidden, head, targets, weights = draw(shape)

    def ours(hidden: jax.Array, head: jax.Array) -> jax.Array:
        head = head.T if tied else head
        return chunked_cross_entropy(hidden, head, targets, tied=tied, chunk=chunk, **settings)

    theirs = functools.partial(plain, targets=targets, **settings)
    np.testing.assert_allclose(ours(hidden, head), theirs(hidden, head), atol=2e-6)
    for by in (0, 1, (0, 1)):  # a frozen head, frozen states, none
        found, wanted = (jax.grad(lambda *pair, f=f: (weights * f(*pair)).sum(), by) for f in (ours, theirs))
        for one, other in zip(
            jax.tree.leaves(jax.jit(found)(hidden, head)), jax.tree.leaves(wanted(hidden, head)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
    ahead = (jax.jvp(f, (hidden, head), (hidden, head))[1] for f in (ours, theirs))
    np.testing.assert_allclose(*ahead, rtol=2e-6, atol=2e-6)
    ahead = (jax.jvp(lambda h, f=f: f(h, head), (hidden,), (hidden,))[1] for f in (ours, theirs))
    np.testing.assert_allclose(*ahead, rtol=2e-6, atol=2e-6)


def test_the_second_derivative_too():
    hidden, head, targets, _ = draw((3,))

    def curvature(loss: Any) -> jax.Array:
        return jax.hessian(lambda h: loss(h, head, targets).sum())(hidden)

    found = curvature(functools.partial(chunked_cross_entropy, chunk=2))
    np.testing.assert_allclose(found, curvature(plain), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_stays_factored(tied: bool):
    """Value and gradients by the factors and the hidden states, those of the merged head."""
    hidden, head, targets, weights = draw((2, 6))
    method = lj.LoRA(rank=2, alpha=3, targets=["table"])
    params = lj.attach({"table": head.T if tied else head}, method, key=jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 if 2 in leaf.shape else leaf, params)
    trained, frozen = lj.partition(params, lj.trainable_mask(params, method))

    def total(apply: Any, trained: Any, hidden: jax.Array) -> jax.Array:
        return (weights * apply(lj.combine(trained, frozen), hidden)).sum()

    def loss(params: Any, hidden: jax.Array) -> jax.Array:
        return chunked_cross_entropy(hidden, params["table"], targets, tied=tied, chunk=4)

    def merged(params: Any, hidden: jax.Array) -> jax.Array:
        table = lj.merge_params(params)["table"]
        return plain(hidden, table.T if tied else table, targets)

    by_both = functools.partial(jax.value_and_grad, argnums=(0, 1))
    adapted = functools.partial(total, lj.adapt(loss, on_materialize="error"))
    found = jax.jit(by_both(adapted))(trained, hidden)
    wanted = by_both(functools.partial(total, merged))(trained, hidden)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6), found, wanted)


def test_a_foreign_custom_jvp_still_gets_the_merged_weight():
    @jax.custom_jvp
    def double(w: jax.Array) -> jax.Array:
        return jax.jit(lambda w: 2 * w)(w)

    double.defjvp(lambda primals, tangents: (double(*primals), 3 * tangents[0]))
    params = lj.attach({"w": jnp.ones((4, 5))}, lj.LoRA(rank=2, alpha=2, targets=["w"]), key=jax.random.key(0))
    with pytest.warns(lj.MaterializeWarning, match="custom derivative"):
        lj.adapt(lambda p: double(p["w"]))(params)


@pytest.mark.parametrize("by", [0, 1, (0, 1)])
def test_no_array_has_all_logits(by: Any):
    hidden, head, targets, _ = draw((4, 48))
    grad = jax.grad(lambda h, w: chunked_cross_entropy(h, w, targets, chunk=16).mean(), by)
    text = jax.jit(grad).lower(hidden, head).as_text()
    found = re.findall(rf"tensor<([0-9x]*x{WORDS})xf32>", text)
    assert found, "the test can see logits"
    assert max(np.prod([int(size) for size in shape.split("x")]) for shape in found) <= 16 * WORDS


@pytest.mark.slow
def test_the_temporary_memory_of_a_large_vocabulary():
    """4 × 2,048 targets of 128,256 words: 130 MB, where the logits alone are 4 GB. Nothing is computed."""
    shapes = ((4, 2048, 256), jnp.float32), ((256, 128_256), jnp.float32), ((4, 2048), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    grad = jax.value_and_grad(lambda h, w, t: chunked_cross_entropy(h, w, t, chunk=64).mean())
    analysis = jax.jit(grad).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 130 * 2**20


def test_bfloat16_states_keep_their_dtype_and_the_losses_are_float32():
    hidden, head, targets, weights = draw((2, 6))
    narrow = hidden.astype(jnp.bfloat16)
    loss, grad = jax.value_and_grad(lambda h: (weights * chunked_cross_entropy(h, head, targets, chunk=4)).sum())(
        narrow
    )
    assert loss.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    wanted = jax.grad(lambda h: (weights * plain(h, head, targets)).sum())(hidden)
    np.testing.assert_allclose(grad.astype(jnp.float32), wanted, atol=0.03 * np.abs(wanted).max())


def test_correct_is_the_likeliest_word():
    hidden, head, targets, _ = draw((3, 50))
    found = token_scores(hidden, head, targets, chunk=7).correct
    np.testing.assert_array_equal(found, (hidden @ head).argmax(-1) == targets)
    assert 0 < found.mean() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.zeros((2, 6), jnp.float32)}, "`targets` must be integers, got float32"),
        ({"targets": jnp.zeros((2, 5), jnp.int32)}, r"without its last axis, \(2, 6\), got \(2, 5\)"),
        ({"tied": True}, r"`head` must be \(vocabulary, d\) with d = 8, got \(8, 11\)"),
        ({"head": jnp.zeros((3, 11))}, r"`head` must be \(d, vocabulary\) with d = 8, got \(3, 11\)"),
        ({"chunk": 0}, "`chunk` must be a positive integer, got 0"),
        ({"chunk": 2.0}, "`chunk` must be a positive integer, got 2.0"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be from 0 to 1, got 1.5"),
        ({"z_loss": -1.0}, "`z_loss` must be a finite number from 0, got -1.0"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str):
    hidden, head, targets, _ = draw((2, 6))
    with pytest.raises(ArgumentError, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "head": head, "targets": targets, **change})
