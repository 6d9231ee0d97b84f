"""Truncated and extracted LoRAs, held against NumPy's SVD of the whole product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.test_merging import node

LAYOUTS = [
    ((9, 7), "io"),
    ((7, 9), "oi"),
    ((5, 2, 6), "ioo"),
    ((2, 6, 5), "iio"),
    ((2, 7, 6), "oio"),
    ((3, 9, 7), "sio"),
    ((9, 3, 7), "iso"),
    ((2, 2, 8, 7), "ssio"),
]
every_layout = pytest.mark.parametrize(("shape", "axes"), LAYOUTS)


def matrices(array: Any, axes: str) -> np.ndarray:
    """A weight as `(members, in, out)`, float64."""
    order = [axis for label in "sio" for axis, own in enumerate(axes) if own == label]
    sizes = {
        label: int(np.prod([n for n, own in zip(array.shape, axes, strict=True) if own == label])) for label in "sio"
    }
    return np.asarray(array, np.float64).transpose(order).reshape(sizes["s"], sizes["i"], sizes["o"])


def numpys_best(delta: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :, :rank] * sigma[:, None, :rank]) @ vt[:, :rank]


def method_of(weight: Any, **settings: Any) -> lj.LoRA:
    return lj.LoRA(rank=weight.rank, alpha=weight.scale * weight.rank, targets=("w",), **settings)


@every_layout
@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_weight_is_numpys(shape: tuple[int, ...], axes: str, rank: int) -> None:
    weight = node(shape, axes, rank=5)
    result = lj.truncate_lora({"w": weight}, method_of(weight), rank=rank)
    new, fit = result.params["w"], result.fits["w"]
    delta = matrices(weight.delta(), axes)
    best = numpys_best(delta, rank)
    np.testing.assert_allclose(matrices(new.delta(), axes), best, rtol=1e-5, atol=1e-5)
    error = np.linalg.norm(delta - best) / np.linalg.norm(delta)
    assert (fit.full_rank, fit.rank, new.rank) == (5, rank, rank)
    assert fit.error == pytest.approx(error, rel=1e-5)
    assert fit.energy == pytest.approx(1 - error**2, rel=1e-5)
    assert new.base is weight.base
    assert new.scale == weight.scale
    # Each singular value is shared evenly.
    a, b = (np.asarray(array).reshape(-1, rank, array.size // rank // len(delta)) for array in (new.a, new.b))
    np.testing.assert_allclose(np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=2), rtol=1e-4)
    assert new.a.dtype == new.b.dtype == jnp.float32


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_the_truncated_method_labels_the_tree_and_says_its_scale(scaling: Any, tmp_path: Any) -> None:
    base = {"q": jnp.ones((8, 6)), "v": jnp.ones((8, 6)), "head": jnp.ones(3)}
    method = lj.LoRA(
        rank=4, alpha=6, targets=("q", "v"), also_train=("head",), scaling=scaling, alpha_overrides={"v": 2},
        rank_overrides={"v": 2}, dropout=0.25,
    )  # fmt: skip
    params = lj.attach(base, method, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(float(leaf.size)).reshape(leaf.shape) ** 0.5, params)
    result = lj.truncate_lora(params, method, rank=3)
    assert result.params["q"].scale == params["q"].scale
    assert result.params["v"] is params["v"]
    assert result.fits["v"] == (2, 2, 0.0, 1.0)
    assert (result.method.rank, result.method.dropout, result.method.scaling) == (3, 0.25, scaling)
    assert result.method.alpha / result.method.rank ** (1 if scaling == "standard" else 0.5) == pytest.approx(
        params["q"].scale
    )
    assert result.method.rank_overrides == {"/v": 2}
    # What the method says is what an attached tree of it has; and it can be saved and loaded.
    again = lj.attach(base, result.method, key=jax.random.key(1))
    for name in ("q", "v"):
        assert again[name].a.shape == result.params[name].a.shape
        assert again[name].scale == pytest.approx(result.params[name].scale, rel=1e-9)
    lj.save_adapter(tmp_path, result.params, result.method)
    loaded = lj.load_adapter(tmp_path, {**lj.detach(params)})
    np.testing.assert_array_equal(loaded.params["q"].a, result.params["q"].a)


def with_spectrum(*members: list[float]) -> Any:
    """A node whose members have these singular values, in any two orthonormal frames."""
    rng = np.random.default_rng(7)
    rank = len(members[0])
    a, b = [], []
    for sigma in members:
        u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0].T for size in (9, 8))
        a.append(u * np.array(sigma)[:, None])
        b.append(v)
    base, a, b = np.zeros((len(members), 9, 8), np.float32), np.stack(a), np.stack(b)
    return lj.LoRAWeight(
        jnp.asarray(base), jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale=1.0, axes="sio"
    )


@pytest.mark.parametrize(
    ("energy", "rank", "expected"),
    # 81 + 9 + 9 + 1 = 100.
    [(0.5, None, 1), (0.8, None, 1), (0.82, None, 2), (0.985, None, 3), (0.995, None, 4), (1, None, 4), (0.995, 2, 2)],
)
def test_energy_chooses_the_least_rank(energy: float, rank: int | None, expected: int) -> None:
    weight = with_spectrum([9, 3, 3, 1])
    result = lj.truncate_lora({"w": weight}, method_of(weight), energy=energy, rank=rank)
    assert result.method.rank == result.fits["w"].rank == expected
    kept = [0.81, 0.9, 0.99, 1.0][expected - 1]
    assert result.fits["w"].energy == pytest.approx(kept, abs=1e-6)
    assert result.fits["w"].error == pytest.approx((1 - kept) ** 0.5, abs=1e-6)


def test_all_of_the_energy_is_the_numerical_rank() -> None:
    weight = with_spectrum([9, 3, 0, 0])
    result = lj.truncate_lora({"w": weight}, method_of(weight), energy=1.0)
    assert result.fits["w"].rank == 2
    np.testing.assert_allclose(result.params["w"].delta(), weight.delta(), atol=1e-5)


def test_in_a_stack_every_member_keeps_the_share() -> None:
    weight = with_spectrum([9, 3, 3, 1], [100, 0, 0, 0])
    result = lj.truncate_lora({"w": weight}, method_of(weight), energy=0.95)
    assert result.fits["w"].rank == 3
    assert result.fits["w"].energy == pytest.approx(1 - 1 / 10_100, abs=1e-6)


def test_a_start_stays_a_start() -> None:
    """`b` zero: no direction is better than another, and zeros on both sides could never be trained."""
    method = lj.LoRA(rank=4, alpha=4, targets=("w",))
    params = lj.attach({"w": jnp.ones((8, 6))}, method, key=jax.random.key(0))
    result = lj.truncate_lora(params, method, rank=2)
    np.testing.assert_array_equal(result.params["w"].a, params["w"].a[:2])
    assert result.fits["w"] == (4, 2, 0.0, 1.0)


def test_factors_thicker_than_the_weight() -> None:
    weight = node((9, 3), "io", rank=7)
    same = lj.truncate_lora({"w": weight}, method_of(weight), rank=7)
    assert same.params["w"] is weight
    result = lj.truncate_lora({"w": weight}, method_of(weight), rank=6)
    assert result.fits["w"].rank == 3
    np.testing.assert_allclose(result.params["w"].delta(), weight.delta(), rtol=1e-4, atol=1e-5)


def test_truncated_factors_lie_where_the_old_ones_did() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    base = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("x", None)))
    method = lj.LoRA(rank=4, alpha=4, targets=("w",))
    params = lj.attach({"w": base}, method, key=jax.random.key(0))
    weight = dataclasses.replace(params["w"], b=params["w"].b + jax.random.normal(jax.random.key(1), (4, 6)))
    new = lj.truncate_lora({"w": weight}, method, rank=2).params["w"]
    assert new.a.sharding.is_equivalent_to(params["w"].a.sharding, 2)
    assert new.b.sharding.is_equivalent_to(params["w"].b.sharding, 2)


# Extraction.


def uses_of(axes: str) -> dict[str, lj.Use] | None:
    return None if axes == "io" else {"w": lj.Use("dot_general", axes)}


@every_layout
def test_an_extracted_lora_is_numpys(shape: tuple[int, ...], axes: str) -> None:
    rng = np.random.default_rng(3)
    base, delta = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    tuned = base + delta
    found = lj.extract_lora({"w": base}, {"w": tuned}, targets=("w",), rank=2, uses=uses_of(axes))
    exact = matrices(np.asarray(tuned, np.float64) - np.asarray(base, np.float64), axes)
    best = numpys_best(exact, 2)
    np.testing.assert_allclose(matrices(found.params["w"].delta(), axes), best, rtol=1e-4, atol=1e-4)
    assert found.fits["w"].error == pytest.approx(np.linalg.norm(exact - best) / np.linalg.norm(exact), rel=1e-4)
    assert found.fits["w"].full_rank == min(exact.shape[1:])
    assert found.params["w"].base is base
    assert (found.method.rank, found.method.alpha, found.params["w"].scale) == (2, 2, 1.0)


@every_layout
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 1.0}], ids=str)
def test_a_merged_lora_is_recovered(shape: tuple[int, ...], axes: str, how: dict[str, Any]) -> None:
    weight = node(shape, axes)  # of rank 2
    merged = lj.merge_params({"w": weight})
    found = lj.extract_lora({"w": weight.base}, merged, targets=("w",), uses=uses_of(axes), **how)
    assert found.fits["w"].rank == 2
    assert found.fits["w"].error < 1e-6
    np.testing.assert_allclose(lj.merge_params(found.params)["w"], merged["w"], rtol=1e-5, atol=1e-5)


def test_of_bfloat16_models_rounding_counts_for_nothing() -> None:
    weight = node((64, 48), "io", dtype=jnp.bfloat16)
    merged = lj.merge_params({"w": weight})
    assert merged["w"].dtype == jnp.bfloat16
    found = lj.extract_lora({"w": weight.base}, merged, targets=("w",), energy=1.0)
    assert found.fits["w"].rank == 2
    np.testing.assert_allclose(found.params["w"].delta(), weight.delta(), atol=0.1)


def pair() -> tuple[dict[str, Any], dict[str, Any]]:
    """A base and what full fine-tuning made of it: every kind of leaf has changed, and one weight hasn't."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    base = {
        "q": {"kernel": draw(8, 6), "bias": draw(6)},
        "v": {"kernel": draw(8, 6), "bias": draw(6)},
        "same": {"kernel": draw(8, 6)},
        "tiny": {"kernel": draw(8, 2)},
        "norm": {"scale": draw(8)},
        "head": {"kernel": draw(8, 3)},
        "step": jnp.int32(3),
    }
    tuned = jax.tree.map(lambda leaf: leaf + draw(*leaf.shape) if leaf.dtype == jnp.float32 else leaf, base)
    return base, {**tuned, "same": base["same"]}


TARGETS = ("q", "v", "same", "tiny")


def test_what_is_no_target_is_carried_and_named() -> None:
    base, tuned = pair()
    found = lj.extract_lora(base, tuned, targets=TARGETS, rank=6, also_train=("head",))
    assert list(found.fits) == ["q/kernel", "tiny/kernel", "v/kernel"]
    assert found.carried == ["head/kernel", "norm/scale", "q/bias", "v/bias"]
    assert found.dropped == []
    assert found.params["same"]["kernel"] is base["same"]["kernel"]
    # Of full rank, nothing is lost: the tuned model is back.
    merged = lj.merge_params(found.params)
    for ours, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    assert found.method.rank == 6
    assert found.method.rank_overrides == {"/tiny/kernel": 2}
    trained = lj.trainable_mask(found.params, found.method)
    assert trained["norm"]["scale"]
    assert not trained["same"]["kernel"]
    assert found.params["norm"]["scale"] is not tuned["norm"]["scale"]


def test_what_is_no_target_can_be_left_out_or_refused() -> None:
    base, tuned = pair()
    found = lj.extract_lora(base, tuned, targets=TARGETS, rank=2, also_train=("head",), rest="drop")
    assert (found.carried, found.dropped) == (["head/kernel"], ["norm/scale", "q/bias", "v/bias"])
    assert found.params["norm"]["scale"] is base["norm"]["scale"]
    with pytest.raises(ValueError, match=r"other values at `norm/scale`, `q/bias`, `v/bias`, .* name them in `also_t"):
        lj.extract_lora(base, tuned, targets=TARGETS, rank=2, also_train=("head",), rest="error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "Neither `rank` nor `energy` is given"),
        ({"rank": 0}, "`rank` must be a positive integer, got 0"),
        ({"rank": True}, "`rank` must be a positive integer, got True"),
        ({"energy": 0.0}, r"`energy` must be a share in \(0, 1\], got 0.0"),
        ({"energy": 90}, r"`energy` must be a share in \(0, 1\], got 90"),
        ({"energy": float("nan")}, r"`energy` must be a share in \(0, 1\], got nan"),
    ],
)
def test_how_much_to_keep_is_checked(change: dict[str, Any], message: str) -> None:
    weight = node()
    with pytest.raises(ValueError, match=message):
        lj.truncate_lora({"w": weight}, method_of(weight), **change)
    with pytest.raises(ValueError, match=message):
        lj.extract_lora({"w": weight.base}, {"w": weight.base + 1}, targets=("w",), **change)


def test_what_can_t_be_truncated() -> None:
    weight = node()
    method = method_of(weight)
    broken = dataclasses.replace(weight, a=weight.a.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="factor `a` of `w` holds NaN"):
        lj.truncate_lora({"w": broken}, method, rank=1)
    with pytest.raises(ValueError, match=r"no factors: pass the tree from `lj.attach`"):
        lj.truncate_lora({"w": weight.base}, method, rank=1)
    with pytest.raises(ValueError, match="`method` is BitFit, and only LoRA"):
        lj.truncate_lora({"w": weight}, lj.BitFit(), rank=1)  # type: ignore[arg-type]
    trainable, _ = lj.partition({"w": weight}, lj.trainable_mask({"w": weight}, method))
    with pytest.raises(ValueError, match="lacks the base or a factor of `w`"):
        lj.truncate_lora(trainable, method, rank=1)
    with pytest.raises(ValueError, match=r"`w` is abstract.*call it outside"):
        jax.jit(lambda tree: lj.truncate_lora(tree, method, rank=1).params)({"w": weight})


def test_what_can_t_be_extracted() -> None:
    base, tuned = pair()

    def extract(after: Any, **settings: Any) -> Any:
        return lj.extract_lora(base, after, **{"targets": TARGETS, "rank": 2, **settings})

    with pytest.raises(ValueError, match=r"None of the targets differs .* what does: `q/bias`"):
        extract({**base, "q": {**base["q"], "bias": base["q"]["bias"] + 1}})
    with pytest.raises(ValueError, match="no trees of one model, at extra"):
        extract({**tuned, "extra": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`head/kernel` has the shape \(8, 5\), and the base's has \(8, 3\)"):
        extract({**tuned, "head": {"kernel": jnp.ones((8, 5))}})
    with pytest.raises(ValueError, match=r"`q/kernel` holds NaN or infinity"):
        extract({**tuned, "q": {**tuned["q"], "kernel": tuned["q"]["kernel"].at[0, 0].set(jnp.nan)}})
    with pytest.raises(ValueError, match=r"""`step` changed, and can't be trained.*`rest="drop"`"""):
        extract({**tuned, "step": jnp.int32(4)})
    with pytest.raises(ValueError, match=r'`rest` must be "train", "drop" or "error", got \'keep\''):
        extract(tuned, rest="keep")
    with pytest.raises(ValueError, match="`tuned_params` has factors, at w"):
        lj.extract_lora({"w": node().base}, {"w": node()}, targets=("w",), rank=1)
    with pytest.raises(lj.SelectionError, match="matches no leaf"):
        extract(tuned, targets=("qq",))
