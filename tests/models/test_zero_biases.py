"""`load(zero_biases=True)`: biases for BitFit on models whose layers have none, and where transformers has a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.files import read_json, read_safetensors
from lora_jax.paths import leaves_by_path
from tests.tiny_decoders import write_tiny_decoder
from tests.tiny_encoders import write_tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Linear layers of a layer whose biases are missing in the checkpoint: of seven, and of Qwen2's four.
ADDED = {"llama": 7, "mistral": 7, "qwen2": 4, "qwen3": 7}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 9)))
every_family = pytest.mark.parametrize("family", FAMILIES)


def biases(params: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in leaves_by_path(params).items() if path.endswith("/bias")}


def moved(params: Any, *names: str) -> Any:
    """The tree with the biases of the named modules away from zero."""
    leaves, structure = leaves_by_path(params), jax.tree.structure(params)
    chosen = tuple(f"/{name}/bias" for name in names)
    return jax.tree.unflatten(
        structure, [leaf + 0.3 if path.endswith(chosen) else leaf for path, leaf in leaves.items()]
    )


@every_family
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_nothing_changes_until_they_are_trained(family: str, scan: bool, tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path, family)
    base = models.load(folder, task="causal-lm", scan_layers=scan)
    model = models.load(folder, task="causal-lm", scan_layers=scan, zero_biases=True)
    added = biases(model.params).keys() - biases(base.params).keys()
    assert len(added) == ADDED[family] * (1 if scan else 3)
    assert not any(np.any(leaf) for path, leaf in biases(model.params).items() if path in added)
    np.testing.assert_array_equal(jax.jit(model.apply)(model.params, IDS), jax.jit(base.apply)(base.params, IDS))
    assert model.names.keys() >= leaves_by_path(models.unstack_layers(model.params) if scan else model.params).keys()


def test_bitfit_trains_them(tmp_path: Path) -> None:
    model = models.load(write_tiny_decoder(tmp_path, "qwen2"), scan_layers=True, zero_biases=True)
    trainable, frozen = lj.partition(model.params, lj.trainable_mask(model.params, lj.BitFit()))
    assert biases(trainable).keys() == leaves_by_path(trainable).keys() == biases(model.params).keys()

    @jax.jit
    @jax.grad
    def gradients(part: Any) -> jax.Array:
        return jnp.sum(model.apply(lj.combine(part, frozen), IDS) ** 2)

    assert all(np.any(leaf) for leaf in biases(gradients(trainable)).values())


def test_an_adapter_of_them_loads_onto_a_base_that_has_them(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path / "base", "llama")
    model = models.load(folder, zero_biases=True)
    params = moved(model.params, "attention/query", "mlp/up")
    saved = lj.save_adapter(tmp_path / "adapter", params, lj.BitFit(targets=("attention/query", "mlp/up")))
    loaded = lj.load_adapter(saved, model.params).params
    for path, leaf in leaves_by_path(params).items():
        np.testing.assert_array_equal(leaves_by_path(loaded)[path], leaf)
    with pytest.raises(lj.adapters.AdapterError, match="the base has no such leaf"):
        lj.load_adapter(saved, models.load(folder).params)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("family", "trained", "entries"),
    [
        ("llama", ("attention/query", "mlp/up"), {"attention_bias": True, "mlp_bias": True}),
        ("llama", ("mlp/down",), {"mlp_bias": True}),
        ("qwen3", ("attention/output",), {"attention_bias": True}),
        ("mistral", (), {}),
        ("qwen2", ("attention/query",), {}),
    ],
)
def test_a_folder_has_those_that_transformers_knows(
    family: str, trained: tuple[str, ...], entries: dict[str, bool], scan: bool, tmp_path: Path
) -> None:
    """Trained ones are announced in `config.json`; those that are zero still are left out where they may be."""
    base = write_tiny_decoder(tmp_path / "base", family)
    model = models.load(base, task="causal-lm", scan_layers=scan, zero_biases=True)
    params = moved(model.params, *trained)
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base)
    assert read_json(folder / "config.json").items() >= entries.items()
    again = models.load(folder, task="causal-lm", scan_layers=scan)
    np.testing.assert_array_equal(jax.jit(again.apply)(again.params, IDS), jax.jit(model.apply)(params, IDS))
    if not entries:
        held = (read_safetensors(path / "model.safetensors").keys() for path in (folder, base))
        assert len(set(map(frozenset, held))) == 1


@pytest.mark.parametrize(
    ("family", "trained", "message"),
    [
        (
            "mistral",
            "mlp/up",
            r"trained biases that a mistral doesn't have .*: layers/0/mlp/up/bias, .*only the biases of the base",
        ),
        (
            "qwen2",
            "attention/output",
            r"qwen2 doesn't have in transformers: layers/0/attention/output/bias, .*only the biases of the base",
        ),
        (
            "qwen3",
            "mlp/gate",
            r"qwen3 doesn't have in transformers: layers/0/mlp/gate/bias, .*biases of attention/query, attention/key, ",
        ),
    ],
)
def test_those_that_transformers_has_no_place_for_are_refused(
    family: str, trained: str, message: str, tmp_path: Path
) -> None:
    base = write_tiny_decoder(tmp_path / "base", family)
    model = models.load(base, task="causal-lm", zero_biases=True)
    with pytest.raises(ValueError, match=message):
        models.save_pretrained(tmp_path / "out", model, moved(model.params, trained), source=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_models_that_have_them_all_refuse_the_option(family: str, tmp_path: Path) -> None:
    write = write_tiny if family == "bert" else write_tiny_decoder
    with pytest.raises(ValueError, match=f"`zero_biases` applies to models .* every layer of a {family} has one"):
        models.load(write(tmp_path, family), zero_biases=True)


def test_without_biases_bitfit_says_what_to_do(tmp_path: Path) -> None:
    model = models.load(write_tiny_decoder(tmp_path, "llama"))
    with pytest.raises(lj.SelectionError, match=r"with one axis: none; .*zero_biases=True"):
        lj.label_params(model.params, lj.BitFit())
