"""LoRA's dropout: on the input of the low-rank path, new at every call, leaf, use and iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

KEY = jax.random.key(0)
WIDTH, RATE = 64, 0.25
# With a base of zeros, a factor `a` of ones and `b` of ones, `x @ w` is `scale` times the sum of what was kept of x.
ONES = jnp.ones((1, WIDTH))


def tree(*names: str, rate: float = RATE, stack: int | None = None) -> Any:
    lead = () if stack is None else (stack,)
    axes = "io" if stack is None else "sio"
    node = lj.LoRAWeight(
        jnp.zeros((*lead, WIDTH, 1)),
        jnp.ones((*lead, 1, WIDTH)),
        jnp.ones((*lead, 1, 1)),
        scale=1.0,
        axes=axes,
        dropout=rate,
    )
    return dict.fromkeys(names or ("w",), node)


def run(apply: Callable[[Any], Any], params: Any, key: Any) -> np.ndarray:
    adapted = lj.adapt(lambda params: jnp.stack(jax.tree.leaves(apply(params))), on_materialize="error")
    return np.asarray(jax.jit(lambda params, key: adapted(lj.with_dropout(params, key)))(params, key)).ravel()


def test_off_without_a_key() -> None:
    params = tree()
    assert run(lambda p: ONES @ p["w"], params, None) == [WIDTH]
    assert lj.adapt(lambda p: ONES @ p["w"])(params) == WIDTH
    keyed = lj.with_dropout(params, KEY)
    assert lj.adapt(lambda p: ONES @ p["w"])(lj.with_dropout(keyed, None)) == WIDTH


def test_off_at_rate_zero() -> None:
    params = lj.with_dropout(tree(rate=0.0), KEY)
    assert params["w"].key is None
    assert lj.adapt(lambda p: ONES @ p["w"])(params) == WIDTH


def test_it_acts_on_the_low_rank_input_alone() -> None:
    """The base's product is that of the whole input; each input element is dropped whole, or scaled by 1/(1 - rate)."""
    params = tree()
    node = dataclasses.replace(params["w"], base=jnp.full((WIDTH, 1), 100.0))
    (with_base,) = run(lambda p: ONES @ p["w"], {"w": node}, KEY)
    (alone,) = run(lambda p: ONES @ p["w"], params, KEY)
    assert with_base == pytest.approx(100 * WIDTH + alone, rel=1e-6)
    kept = alone * (1 - RATE)
    assert kept == pytest.approx(round(kept), abs=1e-3)
    assert 0 < kept < WIDTH


def test_its_expectation_is_the_undropped_value() -> None:
    values = jax.vmap(lambda key: lj.adapt(lambda p: ONES @ p["w"])(lj.with_dropout(tree(), key)))(
        jax.random.split(KEY, 2000)
    )
    spread = np.sqrt(WIDTH * RATE / (1 - RATE))
    assert abs(float(values.mean()) - WIDTH) < 4 * spread / np.sqrt(2000)
    assert float(values.std()) == pytest.approx(spread, rel=0.1)


def test_the_merged_weight_knows_no_dropout() -> None:
    params = lj.with_dropout(tree(), KEY)
    np.testing.assert_array_equal(lj.merge_params(params)["w"], jnp.ones((WIDTH, 1)))


def different(values: np.ndarray) -> bool:
    return len(set(values.tolist())) > len(values) // 2 and len(set(values.tolist())) > 1


def test_each_call_has_its_own() -> None:
    apply = jax.jit(lambda params, key: lj.adapt(lambda p: ONES @ p["w"])(lj.with_dropout(params, key)))
    values = np.concatenate([apply(tree(), jax.random.key(seed)).ravel() for seed in range(6)])
    assert different(values)
    assert apply(tree(), jax.random.key(0)) == values[0]


def test_each_leaf_has_its_own() -> None:
    names = ("a", "b", "c", "d", "e", "f")
    assert different(run(lambda p: [ONES @ p[name] for name in names], tree(*names), KEY))


def test_each_use_has_its_own() -> None:
    assert different(run(lambda p: [ONES @ p["w"] for _ in range(6)], tree(), KEY))


def test_each_row_and_example_has_its_own() -> None:
    assert different(run(lambda p: jnp.ones((6, WIDTH)) @ p["w"], tree(), KEY))
    assert different(run(lambda p: jax.vmap(lambda x: x @ p["w"])(jnp.ones((6, WIDTH))), tree(), KEY))


def loops() -> dict[str, Callable[[Any], Any]]:
    def scanned(p: Any) -> Any:
        return jax.lax.scan(lambda _, x: (None, x @ p["w"]), None, jnp.ones((6, 1, WIDTH)))[1]

    def fori(p: Any) -> Any:
        return jax.lax.fori_loop(0, 6, lambda i, out: out.at[i].set((ONES @ p["w"])[0, 0]), jnp.zeros(6))

    def whiled(p: Any) -> Any:
        def body(state: Any) -> Any:
            i, out = state
            return i + 1, out.at[i].set((ONES @ p["w"])[0, 0])

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (0, jnp.zeros(6)))[1]

    def twice_in_a_body(p: Any) -> Any:
        def body(_: None, x: Any) -> Any:
            return None, jnp.stack([x @ p["w"], x @ p["w"]])

        return jax.lax.scan(body, None, jnp.ones((3, 1, WIDTH)))[1]

    def rematerialized(p: Any) -> Any:
        return [jax.checkpoint(lambda x, w: x @ w)(ONES, p["w"]) for _ in range(6)]

    def loop_and_outside(p: Any) -> Any:
        return jnp.concatenate([(ONES @ p["w"])[None], scanned(p), (ONES @ p["w"])[None]])

    return {
        "scan": scanned,
        "fori": fori,
        "while": whiled,
        "twice": twice_in_a_body,
        "remat": rematerialized,
        "around": loop_and_outside,
    }


@pytest.mark.parametrize("loop", loops())
def test_each_iteration_has_its_own(loop: str) -> None:
    assert different(run(loops()[loop], tree(), KEY))


def test_each_layer_of_a_stack_has_its_own() -> None:
    params = tree(stack=6)
    assert lj.with_dropout(params, KEY)["w"].key.shape == (6,)
    assert different(run(lambda p: jax.lax.scan(lambda _, w: (None, ONES @ w), None, p["w"])[1], params, KEY))
    assert different(run(lambda p: [ONES @ p["w"][layer] for layer in range(6)], params, KEY))
    batched = run(lambda p: jnp.einsum("etd,edo->eto", jnp.ones((6, 1, WIDTH)), p["w"]), params, KEY)
    assert different(batched)


def test_checkpoint_draws_the_same_mask_twice() -> None:
    """The backward pass of `jax.checkpoint` recomputes with the mask of the forward pass.

    For f of degree two, ⟨∇f, x⟩ = 2 f holds only if both are of one mask.
    """
    apply = lj.adapt(lambda p, x: jnp.sum(jax.checkpoint(lambda x, w: (x @ w) ** 2)(x, p["w"])))
    x = jnp.ones((5, WIDTH))
    value, gradient = jax.value_and_grad(lambda x: apply(lj.with_dropout(tree(), KEY), x))(x)
    assert value != 5 * WIDTH**2
    assert float(jnp.vdot(gradient, x)) == pytest.approx(2 * float(value), rel=1e-5)


def test_lookups_are_not_dropped() -> None:
    params = tree()
    assert (
        lj.adapt(lambda p: jnp.take(p["w"], jnp.arange(3), axis=0))(lj.with_dropout(params, KEY)).tolist()
        == [[1.0]] * 3
    )


def test_older_random_keys_do_as_well() -> None:
    values = [run(lambda p: ONES @ p["w"], tree(), key) for key in (jax.random.key(1), jax.random.PRNGKey(1))]
    assert values[0] == values[1] != WIDTH


def test_keys_are_no_parameters() -> None:
    method = lj.LoRA(rank=1, alpha=1, targets=("w",), dropout=0.5)
    params = lj.attach({"w": jnp.ones((4, 3))}, method, key=KEY)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))

    def loss(trainable: Any, key: Any) -> Any:
        return jnp.sum(
            lj.adapt(lambda p: jnp.ones((2, 4)) @ p["w"])(lj.with_dropout(lj.combine(trainable, frozen), key))
        )

    gradients = jax.jit(jax.grad(loss))(trainable, KEY)
    assert gradients["w"].key is None
    assert np.any(gradients["w"].b)
