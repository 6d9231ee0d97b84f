from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj


def tree() -> Any:
    def linear() -> Any:
        return {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}

    return {
        "attention": {"query": linear(), "output": {**linear(), "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}},
        "mlp": {"up": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}},
        "norm": {"gamma": jnp.ones(4), "beta": jnp.ones(4)},
        "batch_norm": {"scale": jnp.ones(4), "offset": jnp.ones(4)},
        "debias": {"kernel": jnp.ones((4, 4))},
        "classifier": linear(),
        "heads": {"bias": jnp.ones((2, 2))},
    }


def biases(**settings: Any) -> list[str]:
    labels = lj.label_params(tree(), lj.BitFit(**settings))
    return [path for path, label in lj.paths.leaves_by_path(labels).items() if label == "bias"]


ALL = [
    "attention/output/bias",
    "attention/output/norm/bias",
    "attention/query/bias",
    "batch_norm/offset",
    "classifier/bias",
    "heads/bias",
    "mlp/up/b",
    "norm/beta",
]


def test_all_takes_every_bias_by_its_whole_last_name() -> None:
    assert biases() == biases(targets="all") == ALL


def test_a_bias_of_the_head_counts_as_head() -> None:
    labels = lj.label_params(tree(), lj.BitFit(also_train=("classifier",)))
    assert labels["classifier"] == {"kernel": "head", "bias": "head"}
    assert biases(also_train=("classifier",)) == [path for path in ALL if path != "classifier/bias"]


def test_terms_are_names_of_modules_not_substrings() -> None:
    """The authors' code picks by substring: `output` would also take the attention output's norm."""
    assert biases(targets=("attention/query", "mlp/up")) == ["attention/query/bias", "mlp/up/b"]
    assert biases(targets=("output",)) == ["attention/output/bias"]
    assert biases(targets=("norm",)) == ["attention/output/norm/bias", "norm/beta"]
    assert biases(targets=r"attention/.*bias") == [
        "attention/output/bias",
        "attention/output/norm/bias",
        "attention/query/bias",
    ]
    assert biases(targets=lambda path, leaf: path.startswith("mlp")) == ["mlp/up/b"]


def test_a_vector_may_be_named_outright() -> None:
    assert biases(targets=("norm/gamma",)) == ["norm/gamma"]
    assert biases(targets=r"norm/gamma") == ["norm/gamma"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qurey",), "`targets` entry 'qurey' matches no leaf. Nearest paths: attention/query/bias"),
        (("debias",), r"`targets` entry 'debias' matches no bias, only debias/kernel \(4, 4\)"),
        (("query/kernel",), r"matches no bias, only attention/query/kernel \(4, 4\)"),
        ((), "`targets` is empty: name what to train, or use `Frozen` to train the head alone"),
        (3, "`targets` must be a regular expression, a sequence of names or a callable .* got 3"),
    ],
)
def test_what_is_no_bias(targets: Any, message: str) -> None:
    with pytest.raises(lj.SelectionError, match=message):
        biases(targets=targets)


def test_a_tree_without_biases_lists_its_vectors() -> None:
    with pytest.raises(
        lj.SelectionError, match=r'`targets="all"` found no leaf named b, beta, bias, offset. .*: shift; na'
    ):
        lj.label_params({"w": jnp.ones((2, 2)), "shift": jnp.ones(2)}, lj.BitFit())


def test_integers_are_no_biases() -> None:
    labels = lj.label_params({"bias": jnp.ones(2), "n": {"bias": jnp.ones(2, jnp.int32)}}, lj.BitFit())
    assert labels == {"bias": "bias", "n": {"bias": "frozen"}}


def test_it_adds_nothing_to_the_model() -> None:
    base = tree()
    params = lj.attach(base, lj.BitFit(), key=jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(base)
    assert lj.merge_params(params)["attention"]["query"]["kernel"] is base["attention"]["query"]["kernel"]
