from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

KEY = jax.random.key(0)


def base() -> Any:
    return {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, "head": {"kernel": jnp.ones((3, 2))}}


def lora(**settings: Any) -> lj.LoRA:
    return lj.LoRA(**{"rank": 2, "alpha": 2, "targets": ("dense",), "also_train": ("head",), **settings})


# Labels.


def test_labels_have_the_structure_of_the_tree() -> None:
    params = lj.attach(base(), lora(), key=KEY)
    labels = lj.label_params(params, lora())
    node = params["dense"]["kernel"]
    assert (node.scale, node.axes) == (lora().alpha / lora().rank, "io")
    assert labels == {
        "dense": {
            "kernel": dataclasses.replace(node, base="frozen", a="lora_a", b="lora_b"),
            "bias": "frozen",
        },
        "head": {"kernel": "head"},
    }
    chex.assert_trees_all_equal_structs(labels, params)
    mask = lj.trainable_mask(params, lora())
    assert mask["dense"]["kernel"].a is True
    assert mask["dense"]["kernel"].base is False
    assert mask["dense"]["bias"] is False


def test_labels_of_a_tree_with_dropout_keys() -> None:
    params = lj.with_dropout(lj.attach(base(), lora(dropout=0.5), key=KEY), KEY)
    labels = lj.label_params(params, lora())
    assert labels["dense"]["kernel"].key == "frozen"
    chex.assert_trees_all_equal_structs(labels, params)
    parts = lj.partition(params, lj.trainable_mask(params, lora()))
    assert parts.trainable["dense"]["kernel"].key is None
    assert lj.combine(*parts)["dense"]["kernel"].key is params["dense"]["kernel"].key


def test_leaves_that_cannot_be_trained_are_frozen() -> None:
    tree = {"w": jnp.ones(2), "steps": jnp.ones(2, jnp.int32), "key": KEY, "flag": True, "act": jax.nn.relu, "no": None}
    labels = lj.label_params(tree, lj.FullFineTune())
    assert labels == {"w": "full", "steps": "frozen", "key": "frozen", "flag": "frozen", "act": "frozen", "no": None}
    chex.assert_trees_all_equal_structs(labels, tree)


def test_factors_of_another_method_are_frozen() -> None:
    labels = lj.label_params(lj.attach(base(), lora(), key=KEY), lj.BitFit())
    assert set(jax.tree.leaves(labels["dense"]["kernel"])) == {"frozen"}
    assert labels["dense"]["bias"] == "bias"


def test_a_method_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Frozen\(also_train=\(\)\) trains nothing: name leaves in `also_train`"):
        lj.trainable_mask(base(), lj.Frozen())
    with pytest.raises(lj.SelectionError, match=r'`targets="all"` found no leaf of a floating type. It has'):
        lj.label_params({"n": jnp.ones(2, jnp.int32)}, lj.FullFineTune())


def test_lora_on_a_tree_without_factors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tree has nothing that LoRA trains: make it with `lj.attach"):
        lj.label_params(base(), lora())


# Partition and combine.


def test_partition_copies_what_is_trained_and_keeps_what_is_frozen() -> None:
    params = lj.attach(base(), lora(), key=KEY)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, lora()))
    assert frozen["dense"]["kernel"].base is params["dense"]["kernel"].base
    assert frozen["dense"]["bias"] is params["dense"]["bias"]
    assert frozen["head"]["kernel"] is None
    assert trainable["dense"]["bias"] is None
    assert trainable["head"]["kernel"] is not params["head"]["kernel"]
    chex.assert_trees_all_equal(lj.combine(trainable, frozen), params)


@pytest.mark.parametrize("method", [lj.FullFineTune(), lj.BitFit(), lora()], ids=lambda method: type(method).__name__)
def test_donating_the_trainable_part_leaves_the_base_whole(method: lj.Method) -> None:
    tree = base()
    params = lj.attach(tree, method, key=KEY)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((tree, frozen)))


def test_donating_the_whole_attached_tree_takes_the_copy_of_the_head() -> None:
    tree = base()
    params = lj.attach(tree, lora(), key=KEY)
    params["head"]["kernel"].delete()
    assert not tree["head"]["kernel"].is_deleted()


def test_partition_keeps_shardings_and_numpy() -> None:
    mesh = jax.make_mesh((2,), ("x",))
    split = jax.device_put(jnp.ones((4, 2)), jax.NamedSharding(mesh, jax.P("x")))
    tree = {"split": split, "host": np.ones(2, np.float32)}
    trainable, _ = lj.partition(tree, {"split": True, "host": True})
    assert trainable["split"].sharding.is_equivalent_to(split.sharding, 2)
    assert trainable["host"] is not tree["host"]
    assert isinstance(trainable["host"], np.ndarray)


def test_partition_inside_a_trace() -> None:
    def halves(params: Any) -> Any:
        trainable, frozen = lj.partition(params, lj.trainable_mask(params, lora()))
        return lj.combine(trainable, frozen)

    params = lj.attach(base(), lora(), key=KEY)
    chex.assert_trees_all_equal(jax.jit(halves)(params), params)


def test_a_mask_of_another_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="`mask` does not have the structure of `params`; they differ at dense/bias"):
        lj.partition(base(), {"dense": {"kernel": True}, "head": {"kernel": False}})
    params = lj.attach(base(), lora(), key=KEY)
    with pytest.raises(ValueError, match="`mask` does not have the structure of `params`; they differ at dense/kernel"):
        lj.partition(params, lj.trainable_mask(base(), lj.FullFineTune()))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="both sides have the leaf at `a/b`"):
        lj.combine({"a": {"b": 1.0}}, {"a": {"b": 2.0}})
    with pytest.raises(ValueError, match="do not come from one `partition`: their structures differ"):
        lj.combine({"a": 1.0}, {"b": None})


def test_none_in_the_tree_stays_none() -> None:
    tree = {"w": jnp.ones(2), "absent": None}
    assert lj.combine(*lj.partition(tree, {"w": True, "absent": None}))["absent"] is None


# Counts.


def test_counts_by_label() -> None:
    params = lj.attach(base(), lora(), key=KEY)
    count = lj.count_params(params, lj.label_params(params, lora()))
    assert count.per_label == {"frozen": (15, 60), "head": (6, 24), "lora_a": (8, 32), "lora_b": (6, 24)}
    assert (count.trainable, count.total, count.bytes) == (20, 35, 80)
    assert count.percent == pytest.approx(100 * 20 / 35)
    assert str(count) == "20 of 35 parameters are trained (57.1 %)"


def test_counts_of_shapes_and_of_what_is_no_array() -> None:
    tree = {"w": jax.ShapeDtypeStruct((100_000, 100_000), jnp.bfloat16), "act": jax.nn.relu, "rate": 0.1}
    count = lj.count_params(tree, lj.label_params(tree, lj.FullFineTune()))
    assert (count.trainable, count.total, count.bytes, count.percent) == (10**10, 10**10, 2 * 10**10, 100)


def test_counts_refuse_labels_of_another_tree() -> None:
    with pytest.raises(ValueError, match="`labels` does not have the structure of `params`; they differ at dense/bias"):
        lj.count_params(base(), {"dense": {"kernel": "frozen"}, "head": {"kernel": "head"}})


# Boxes of Flax.


def boxed_trees() -> dict[str, Any]:
    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    partitioned = nn.Partitioned(jnp.ones((4, 3)), names=("in", "out"))
    return {"nnx": state, "linen": {"kernel": partitioned, "bias": nn.Partitioned(jnp.ones(3), names=("out",))}}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("method", [lj.LoRA(rank=2, alpha=4, targets=("kernel",)), lj.BitFit()])
def test_boxes_go_through_everything(kind: str, method: lj.Method, tmp_path: Any) -> None:
    """A leaf in a box stays in its box, from `attach` to an adapter on disk."""
    tree = boxed_trees()[kind]
    params = lj.attach(tree, method, key=KEY)
    labels = lj.label_params(params, method)
    chex.assert_trees_all_equal_structs(labels, params)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    assert lj.leaf_paths(lj.combine(trainable, frozen)) == ["bias", "kernel"]
    chex.assert_trees_all_equal(lj.combine(trainable, frozen), params)
    trained = lj.combine(jax.tree.map(lambda leaf: leaf + 1, trainable), frozen)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, trained, method), tree)
    chex.assert_trees_all_equal(loaded.params, trained)
    chex.assert_trees_all_equal_structs(loaded.params, trained)
    merged = lj.merge_params(trained)
    chex.assert_trees_all_equal_structs(merged, tree)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True))
    chex.assert_trees_all_equal_structs(lj.detach(trained), tree)


def test_messages_name_boxed_leaves_by_their_place() -> None:
    with pytest.raises(lj.SelectionError, match=re.escape("'kernle' matches no leaf. Nearest paths: kernel")):
        lj.attach(boxed_trees()["nnx"], lj.LoRA(rank=1, alpha=1, targets=("kernle",)), key=KEY)
