"""`Frozen` and `FullFineTune`, the floor and the reference; and what all methods share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.weights import AdaptedWeight


def tree() -> Any:
    return {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"dense": {"kernel": jnp.ones((2, 3))}}}


def test_frozen_trains_the_head_alone() -> None:
    assert lj.label_params(tree(), lj.Frozen(also_train=("head",))) == {
        "dense": {"kernel": "frozen", "bias": "frozen"},
        "head": {"dense": {"kernel": "head"}},
    }


def test_full_trains_everything_and_tells_the_head_apart() -> None:
    assert lj.label_params(tree(), lj.FullFineTune(also_train=("head",))) == {
        "dense": {"kernel": "full", "bias": "full"},
        "head": {"dense": {"kernel": "head"}},
    }


@pytest.mark.parametrize(
    "method",
    [
        lj.LoRA(rank=1, alpha=1, targets=("x",), also_train=("haed",)),
        lj.BitFit(also_train=("haed",)),
        lj.FullFineTune(also_train=("haed",)),
        lj.Frozen(also_train=("haed",)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_head_that_is_not_there(method: lj.Method) -> None:
    with pytest.raises(
        lj.SelectionError, match=r"`also_train` entry 'haed' matches no leaf. Nearest paths: head/dense/k"
    ):
        method.head(lj.paths.leaves_by_path(tree()))


def test_a_head_of_integers() -> None:
    with pytest.raises(
        lj.SelectionError, match=r"`also_train` entry 'head' matches no trainable leaf, only head \(2,\)"
    ):
        lj.label_params({"w": jnp.ones(2), "head": jnp.ones(2, jnp.int32)}, lj.FullFineTune(also_train=("head",)))


def test_every_method_is_known_to_adapter_files() -> None:
    """By the names that files of earlier versions have."""
    names = "BitFit BottleneckAdapter DoRA Frozen FullFineTune IA3 LoRA NormTuning PrefixTuning RandomMask"
    names = [*names.split(), "RandomSubspace", "TopLayers", "VeRA"]
    for name in names:
        assert lj.Method.registry[name] is getattr(lj, name)
        assert dataclasses.is_dataclass(lj.Method.registry[name])
    nodes = "LoRAWeight DoRAWeight IA3Weight VeRAWeight InsertedArray ReparametrizedPrefix MaskedEntries MaskedRows"
    for name in [*nodes.split(), "MaskedColumns", "SubspaceWeight"]:
        assert AdaptedWeight.registry[name].__name__ == name
