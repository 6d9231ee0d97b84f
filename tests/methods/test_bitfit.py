from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
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


# Names by their words.

BIASES = {
    "Mamba": {"dt_bias": (4,), "A_log": (4, 2), "D": (4,), "B": (4, 2)},
    "Equinox's GRU": {"weight_ih": (12, 4), "weight_hh": (12, 4), "bias": (12,), "bias_n": (4,)},
    "PyTorch's attention": {"in_proj_weight": (12, 4), "in_proj_bias": (12,), "out_proj_bias": (4,)},
    "PyTorch's LSTM": {"weight_ih_l0": (16, 4), "bias_ih_l0": (16,), "bias_hh_l0": (16,)},
    "by hand": {"w1": (4, 8), "b1": (8,), "wq": (4, 4), "bq": (4,), "W_o": (4, 4), "b_o": (4,)},
    "by hand, stacked": {"w1": (3, 4, 8), "b1": (3, 8), "wq": (3, 4, 4), "bq": (3, 4), "q_bias": (3, 2, 2)},
    "a norm by hand": {"ln_gamma": (4,), "ln_beta": (4,), "lnScale": (4,), "lnBias": (4,)},
    "another kernel": {"kernel_in": (4, 8), "b_in": (8,)},
}  # fmt: skip


def shaped(shapes: dict[str, tuple[int, ...]]) -> Any:
    return {"layer": {name: jnp.ones(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize("model", BIASES)
def test_all_takes_what_other_libraries_call_biases(model: str) -> None:
    """And nothing is left out that would be worth a warning."""
    labels = lj.label_params(shaped(BIASES[model]), lj.BitFit())["layer"]
    found = {name for name, label in labels.items() if label == "bias"}
    assert found == {name for name in BIASES[model] if "bias" in name.lower() or name[0] == "b" or "beta" in name}


def test_what_speaks_of_a_bias_and_is_none_is_named() -> None:
    """Tables over relative positions, weights that make a bias, shifts of unknown meaning; not `debias`."""
    odd = {"rel_pos_bias": (2, 7), "relative_position_bias_table": (9, 2), "bias_proj": (4, 2), "shift": (4,)}
    params = shaped({"bias": (4,), **odd, "b_proj": (4, 4), "debias": (4, 4), "unbiased": (4,), "kernel": (4, 4)})
    with pytest.warns(
        UserWarning, match='BitFit\'s `targets="all"` leaves out layer/b_proj .*To train them, name'
    ) as told:
        labels = lj.label_params(params, lj.BitFit())["layer"]
    assert [name for name, label in labels.items() if label == "bias"] == ["bias"]
    message = str(told[0].message)
    assert all(f"layer/{name} {shape}" in message for name, shape in odd.items())
    assert not any(f"layer/{name} " in message for name in ("debias", "unbiased", "kernel", "bias"))
    # The caller; the tests check annotations, in a frame between.
    assert told[0].filename in (__file__, jaxtyping._decorator.__file__)

    named = lj.label_params(params, lj.BitFit(targets=("bias", "rel_pos_bias", "shift")))["layer"]
    assert [name for name, label in named.items() if label == "bias"] == ["bias", "rel_pos_bias", "shift"]
    swept = lj.label_params(params, lj.BitFit(targets=r".*"))["layer"]
    assert [name for name, label in swept.items() if label == "bias"] == ["bias", "shift", "unbiased"]


def test_a_head_that_is_trained_in_full_is_not_left_out() -> None:
    params = {"bias": jnp.ones(4), "head": {"shift": jnp.ones(4)}}
    assert lj.label_params(params, lj.BitFit(also_train=("head",))) == {"bias": "bias", "head": {"shift": "head"}}


def test_scales_of_norms_are_no_candidates() -> None:
    params = {"norm": {"weight": jnp.ones(4)}, "ln": {"scale": jnp.ones(4)}, "q_gamma": jnp.ones(4), "dt": jnp.ones(4)}
    with pytest.raises(lj.SelectionError, match="Leaves with one axis: dt; name those"):
        lj.label_params(params, lj.BitFit())


def test_a_bias_with_two_axes_is_no_target_of_lora() -> None:
    names = ("q_bias", "bias_n", "b1", "dtBias", "ln_scale")
    params = shaped({"kernel": (4, 4), **dict.fromkeys(names, (3, 4))})
    tree = lj.attach(params, lj.LoRA(rank=1, alpha=1, targets=".*"), key=jax.random.key(0))
    assert [name for name, leaf in tree["layer"].items() if hasattr(leaf, "a")] == ["kernel"]
    by_module = lj.attach(params, lj.LoRA(rank=1, alpha=1, targets=("layer",)), key=jax.random.key(0))
    assert [name for name, leaf in by_module["layer"].items() if hasattr(leaf, "a")] == ["kernel"]
    for name in names:  # given by its own name, it is what the user says it is
        tree = lj.attach(params, lj.LoRA(rank=1, alpha=1, targets=(name,)), key=jax.random.key(0))
        assert [other for other, leaf in tree["layer"].items() if hasattr(leaf, "a")] == [name]
    plain = shaped({"bias": (3, 4), "scale": (3, 4)})
    for name in ("bias", "scale"):
        with pytest.raises(lj.SelectionError, match=f"'{name}' matches no weight, only layer/{name}"):
            lj.attach(plain, lj.LoRA(rank=1, alpha=1, targets=(name,)), key=jax.random.key(0))
