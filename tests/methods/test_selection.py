"""The methods that train some of a model's own leaves in full: full fine-tuning of a part, norms, the last layers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.paths import leaves_by_path


def vectors(*names: str) -> Any:
    return {name: jnp.ones(4) for name in names}


def trained(params: Any, method: lj.Method) -> list[str]:
    labels = leaves_by_path(lj.label_params(params, method))
    return [path for path, label in labels.items() if label != "frozen"]


NORMS = {
    "LayerNorm_0": vectors("scale", "bias"),
    "attention": {"q_norm": vectors("scale"), "query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
    "batch_norm": {**vectors("gamma", "beta", "mean"), "count": jnp.ones((), jnp.int32)},
    "final_layernorm": vectors("weight", "bias"),
    "ln_1": vectors("w", "b"),
    "norm": {"projection": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "weight": jnp.ones((4, 4))},
    "norms": [vectors("weight")],
    "normal": vectors("weight", "bias"),
    "pre": vectors("scale", "bias", "table"),
    "stacked_norm": {"scale": jnp.ones((3, 4))},
    "alone": vectors("weight"),
}
ALL_NORMS = [
    "LayerNorm_0/bias",
    "LayerNorm_0/scale",
    "attention/q_norm/scale",
    "batch_norm/beta",
    "batch_norm/gamma",
    "final_layernorm/bias",
    "final_layernorm/weight",
    "ln_1/b",
    "ln_1/w",
    "norms/0/weight",
    "pre/bias",
    "pre/scale",
    "stacked_norm/scale",
]


def test_norms_are_known_by_their_names() -> None:
    assert trained(NORMS, lj.NormTuning()) == ALL_NORMS


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (r".*(scale|gamma)", [path for path in ALL_NORMS if path.endswith(("scale", "gamma"))]),
        (("ln_1", "pre"), ["ln_1/b", "ln_1/w", "pre/bias", "pre/scale"]),
        (("alone/weight",), ["alone/weight"]),
        (lambda path, leaf: "final" in path, ["final_layernorm/bias", "final_layernorm/weight"]),
    ],
)
def test_some_of_the_norms(targets: Any, paths: list[str]) -> None:
    assert trained(NORMS, lj.NormTuning(targets=targets)) == paths


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            lj.NormTuning(targets=("alone",)),
            r"entry 'alone' matches no scale or shift of a norm, only alone/weight \(4,\)",
        ),
        (lj.NormTuning(targets=("query",)), "'query' matches no scale or shift of a norm, only attention/query/bias"),
        (
            lj.FullFineTune(targets=("atention",)),
            "`targets` entry 'atention' matches no leaf. Nearest paths: attention",
        ),
        (lj.FullFineTune(targets=("batch_norm/count",)), "matches no trainable leaf, only batch_norm/count"),
    ],
)
def test_what_is_not_of_the_kind(method: lj.Method, message: str) -> None:
    with pytest.raises(lj.SelectionError, match=message):
        lj.label_params(NORMS, method)


def test_a_tree_without_norms_lists_its_vectors() -> None:
    with pytest.raises(
        lj.SelectionError, match=r"found no module named like a norm, .*axis: shift; name those that are"
    ):
        lj.label_params({"w": jnp.ones((2, 2)), "shift": jnp.ones(2)}, lj.NormTuning())


def test_a_part_is_trained_in_full() -> None:
    assert trained(NORMS, lj.FullFineTune(targets=("attention", "ln_1"))) == [
        "attention/q_norm/scale",
        "attention/query/bias",
        "attention/query/kernel",
        "ln_1/b",
        "ln_1/w",
    ]


def layers(count: int) -> Any:
    return [{"up": {"kernel": jnp.ones((4, 4))}, "steps": jnp.ones((), jnp.int32)} for _ in range(count)]


def test_the_last_layers_and_the_head() -> None:
    params = {"encoder": {"embed": jnp.ones((5, 4)), "layers": layers(12)}, "head": jnp.ones(4)}
    method = lj.TopLayers(count=2, also_train=("head",))
    labels = leaves_by_path(lj.label_params(params, method))
    assert {path: label for path, label in labels.items() if label != "frozen"} == {
        "encoder/layers/10/up/kernel": "full",
        "encoder/layers/11/up/kernel": "full",
        "head": "head",
    }


def test_of_several_stacks_one_is_named() -> None:
    params = {"encoder": {"layers": layers(2)}, "decoder": {"layers": layers(3)}}
    assert trained(params, lj.TopLayers(count=1, within="decoder/layers")) == ["decoder/layers/2/up/kernel"]


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ({"layers": layers(2)}, {"count": 3}, r"`count` is 3, and `layers` has 2 layers"),
        ({"layers": {"kernel": jnp.ones((3, 2, 2))}}, {"count": 1}, r"no numbered layers.*unstack_layers"),
        (
            {"a": layers(2), "b": layers(3)},
            {"count": 1},
            r"several stacks of layers, a \(2 layers\), b \(3 layers\): name",
        ),
        (
            {"a": layers(2)},
            {"count": 1, "within": "b"},
            r"`within='b'` matches no stack of layers; the tree has a \(2 l",
        ),
        (
            {"x": {"a": layers(2)}, "y": {"a": layers(2)}},
            {"count": 1, "within": "a"},
            r"matches more than one stack of l",
        ),
        ({}, {"count": 0}, r"`count` must be a positive integer, got 0"),
        ({}, {"count": True}, r"`count` must be a positive integer, got True"),
    ],
)
def test_layers_that_are_not_there(params: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.label_params(params, lj.TopLayers(**settings))
