"""`RandomMask`: which numbers, how many, and that they alone are trained."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.random_mask import MaskedEntries, MaskedRows
from lora_jax.paths import leaves_by_path
from lora_jax.weights import is_adapted

from ..models_table import case, moved

KEY = jax.random.key(0)


def base() -> Any:
    rng = np.random.default_rng(0)

    def linear(inputs: int, outputs: int) -> Any:
        return {"kernel": rng.normal(size=(inputs, outputs)), "bias": rng.normal(size=outputs)}

    tree = {"embed": rng.normal(size=(30, 8)), "up": linear(8, 20), "down": linear(20, 8), "head": linear(8, 3)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def attached(method: lj.RandomMask, uses: Any = None) -> tuple[Any, lj.ParamCount]:
    params = lj.attach(base(), method, key=KEY, uses=uses)
    return params, lj.count_params(params, lj.label_params(params, method))


def changed(method: lj.RandomMask, uses: Any = None) -> dict[str, np.ndarray]:
    """Where the merged tree differs from the base after every trained number has moved."""
    params, _ = attached(method, uses)
    trained = lj.merge_params(moved(params, lj.trainable_mask(params, method), seed=1))
    return jax.tree.map(lambda one, other: np.asarray(one != other), leaves_by_path(trained), leaves_by_path(base()))


def test_as_many_numbers_as_asked_for_are_trained() -> None:
    method = lj.RandomMask(size=101)
    _, count = attached(method)
    assert count.trainable == count.per_label["masked"].params == 101
    assert sum(int(mask.sum()) for mask in changed(method).values()) == 101


@pytest.mark.parametrize(("size", "trained"), [("bitfit", 20 + 8), (0.25, round(0.25 * 588))])
def test_sizes_in_other_words(size: Any, trained: int) -> None:
    """The biases outside of the head; a share of the 240 + 2 · 160 + 28 numbers outside of it."""
    method = lj.RandomMask(size=size, also_train=("head",))
    assert attached(method)[1].per_label["masked"].params == trained
    assert not changed(lj.RandomMask(size=size, targets=("up", "down")))["head/kernel"].any()


def test_the_share_is_the_same_in_every_leaf() -> None:
    shares = {path: mask.mean() for path, mask in changed(lj.RandomMask(size=0.25)).items() if mask.size > 100}
    np.testing.assert_allclose(list(shares.values()), 0.25, atol=0.01)


@pytest.mark.parametrize(("kind", "axis"), [("rows", 1), ("columns", 0)])
def test_lines_are_whole(kind: Any, axis: int) -> None:
    method = lj.RandomMask(size=0.3, kind=kind)
    masks = changed(method)
    lines = [mask for path, mask in masks.items() if mask.any()]
    assert all(mask.ndim == 2 and (mask.all(axis) | ~mask.any(axis)).all() for mask in lines)
    share = sum(mask.sum() for mask in lines) / sum(mask.size for mask in masks.values() if mask.ndim == 2)
    assert abs(share - 0.3) < 0.03  # one line at most is 30 of 584 numbers


@pytest.mark.parametrize(
    ("axes", "kind", "shape"),
    [("ioo", "rows", (6, 2, 3)), ("ioo", "columns", (5, 4)), ("iio", "rows", (6, 3)), ("soi", "rows", (10, 2))],
)
def test_lines_of_weights_with_more_axes(axes: str, kind: Any, shape: tuple[int, ...]) -> None:
    """A line spans all out axes or all in axes, of one member of a stack."""
    params = {"w": jnp.arange(24.0 if axes != "soi" else 36.0).reshape((4, 2, 3) if axes != "soi" else (3, 2, 6))}
    method = lj.RandomMask(size=0.9, kind=kind)
    tree = lj.attach(params, method, key=KEY, uses={"w": lj.Use("dot_general", axes)})
    values = tree["w"].values
    assert values.shape[1:] == shape[1:]
    merged = lj.merge_params(lj.combine(*lj.partition(tree, lj.trainable_mask(tree, method))))["w"]
    np.testing.assert_array_equal(merged, params["w"])


def test_the_places_follow_from_seed_and_path_alone() -> None:
    first, again = changed(lj.RandomMask(size=0.2)), changed(lj.RandomMask(size=0.2, targets=("up",)))
    np.testing.assert_array_equal(first["up/kernel"], again["up/kernel"])
    assert (first["up/kernel"] != changed(lj.RandomMask(size=0.2, seed=1))["up/kernel"]).any()
    assert (first["up/kernel"].ravel() != first["down/kernel"].ravel()).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["random_entries", "random_rows", "random_columns"])
def test_laws_1_and_2(method: str, dtype: str) -> None:
    """Bit for bit: the function is given what merging gives; nothing is announced, and `explain` shows it."""
    row = case("nnx_mlp", dtype)
    chosen = row.method(method)
    run = jax.jit(lj.adapt(row.apply, on_materialize="error"))
    np.testing.assert_array_equal(run(row.attach(chosen), row.x), jax.jit(row.apply)(row.params, row.x))
    params = row.trained(chosen)
    np.testing.assert_array_equal(run(params, row.x), jax.jit(row.apply)(lj.merge_params(params), row.x))
    nodes = {path for path, leaf in leaves_by_path(params).items() if is_adapted(leaf)}
    rows = lj.explain(row.apply, params, row.x)
    assert set(rows.materialized) == nodes
    assert "is merged before the function is called" in str(rows)


def test_the_gradient_is_that_of_the_whole_weight_at_the_places() -> None:
    method = lj.RandomMask(size=40, targets=("up",))
    params, _ = attached(method)

    def loss(tree: Any) -> jax.Array:
        return jnp.sum(jnp.tanh(tree["embed"] @ tree["up"]["kernel"] + tree["up"]["bias"][None]) ** 2)

    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    found = jax.grad(lambda part: lj.adapt(loss)(lj.combine(part, frozen)))(trainable)
    whole = jax.grad(loss)(base())
    for path in ("kernel", "bias"):
        places = changed(method)[f"up/{path}"]
        np.testing.assert_allclose(found["up"][path].values, whole["up"][path][places], rtol=1e-5)


def test_a_description_that_claims_too_many_is_refused(tmp_path: Any) -> None:
    method = lj.RandomMask(size=10, targets=("up/kernel",))
    folder = lj.save_adapter(tmp_path, attached(method)[0], method)
    file = folder / "lora_jax_adapter.json"
    description = json.loads(file.read_text())
    assert description["method"]["size"] == 10
    description["adapted"]["up/kernel"]["seed"] = 2**32
    file.write_text(json.dumps(description))
    with pytest.raises(lj.AdapterError, match="`seed` must be an integer from 0 to 2³² - 1, got 4294967296"):
        lj.load_adapter(folder, base())
    node = MaskedEntries(jnp.ones((2, 2)), jnp.ones(5), seed=0, axes="oo")
    with pytest.raises(ValueError, match=r"`values` \(5,\) must be from 1 to the base's 4 lines"):
        lj.merge_params({"w": node})


def test_a_stack_of_them_is_not_taken_apart() -> None:
    node = MaskedRows.bare(jnp.ones((3, 4, 2)), seed=0, axes="sio").started(5)
    with pytest.raises(ValueError, match=r"a MaskedRows can't be taken apart, .* fold it in first, with `lj"):
        lj.models.unstack_layers({"layers": {"w": node}})


def test_the_size_of_bitfit_is_a_number_on_disk(tmp_path: Any) -> None:
    method = lj.RandomMask(targets=("up", "down"))
    params, _ = attached(method)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, method), base())
    assert (loaded.method.size, loaded.method.targets) == (  # type: ignore[attr-defined]
        20 + 8 + 3,
        ("/down/bias", "/down/kernel", "/up/bias", "/up/kernel"),
    )
    again = lj.attach(base(), loaded.method, key=KEY)
    for path, leaf in leaves_by_path(lj.trainable_mask(params, method)).items():
        assert type(leaf) is type(leaves_by_path(again)[path]) or not is_adapted(leaf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r'`size` must be a positive integer, a share between 0 and 1, or "bitfit", got 0'),
        ({"size": 1.5}, "`size` must be a positive integer, a share between 0 and 1, .* got 1.5"),
        ({"size": "half"}, "`size` must be .* got 'half'"),
        ({"size": True}, "`size` must be .* got True"),
        ({"kind": "cells"}, r"`kind` must be one of \('uniform', 'rows', 'columns'\), got 'cells'"),
        ({"seed": 0.5}, "`seed` must be an integer, got 0.5"),
        ({"targets": ()}, "`targets` is empty"),
        ({"size": 10_000}, "`size` must be at most 615, the number of parameters in the targets, got 10000"),
        ({"size": 1, "kind": "rows"}, "`size` 1 is less than one of the rows: choose a larger `size`"),
        ({"targets": ("up",), "also_train": ("up/bias",)}, "`targets` and `also_train` both select up/bias"),
        ({"targets": ("bias",), "kind": "rows"}, "`targets` entry 'bias' matches no weight, only down/bias"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.attach(base(), lj.RandomMask(**settings), key=KEY)


def test_a_tree_without_masks_has_no_labels() -> None:
    with pytest.raises(ValueError, match=r"the tree has nothing that RandomMask trains: make it with `lj.attach"):
        lj.label_params(base(), lj.RandomMask())
