"""Relatives of LoRA in PEFT folders: what they compute there is what they compute here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_safetensors, write_safetensors
from lora_jax.interop import export_peft, import_peft
from lora_jax.paths import leaves_by_path
from tests.models_table import moved

from .kit import NAMES, PREFIX, QUERY, assert_equal_models, base, peft_result, read_config, state_dict, write_peft


def trained(method: lj.LoRA) -> Any:
    params = lj.attach(base(), method, key=jax.random.key(0))
    return moved(params, lj.trainable_mask(params, method), seed=3)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_start_from_the_weight_goes_out_as_lora_of_twice_the_rank(tmp_path: Path, init: Any, scaling: Any) -> None:
    method = lj.LoRA(
        rank=2,
        alpha=3,
        targets=("query", "embed/embedding"),
        init=init,
        scaling=scaling,
        rank_overrides={"query": 3},
        alpha_overrides={"query": 5},
    )
    params = trained(method)
    folder = export_peft(tmp_path, params, method, names=NAMES)
    settings = read_config(folder)
    assert (settings["r"], settings["rank_pattern"]) == (4, {"model.layers.0.query": 6})
    assert_equal_models(peft_result(folder, state_dict(base())), state_dict(lj.merge_params(params)))
    again = import_peft(folder, base(), names=NAMES)
    assert again.method.targets == ("/embed/embedding", "/query/kernel")  # type: ignore[attr-defined]
    for path, leaf in leaves_by_path(lj.merge_params(again.params)).items():
        np.testing.assert_allclose(leaf, leaves_by_path(lj.merge_params(params))[path], atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_start_of_the_highest_rank_comes_back(tmp_path: Path, init: Any) -> None:
    """Twice it is more than either side of the weight, (8, 6): more than any other LoRA has a use for."""
    method = lj.LoRA(rank=6, alpha=6, targets=("query",), init=init)
    params = trained(method)
    folder = export_peft(tmp_path / "first", params, method, names=NAMES)
    assert read_config(folder)["r"] == 12
    again = import_peft(folder, base(), names=NAMES)
    merged = lj.merge_params(again.params)
    assert_equal_models(state_dict(merged), state_dict(lj.merge_params(params)))
    # What came in can be saved, and goes out with the same bits.
    own = lj.load_adapter(lj.save_adapter(tmp_path / "own", *again), base())
    chex.assert_trees_all_equal(own.params, again.params)
    second = export_peft(tmp_path / "second", *own, names=NAMES)
    chex.assert_trees_all_equal(*(read_safetensors(one / "adapter_model.safetensors") for one in (folder, second)))
    # And has no more than the weight's own rank to lose.
    smaller = lj.truncate_lora(*again, rank=6)  # type: ignore[arg-type]
    assert_equal_models(state_dict(lj.merge_params(smaller.params)), state_dict(merged))


def test_a_frozen_a_goes_out_as_it_is(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=3, targets=("query",), freeze_a=True)
    params = trained(method)
    again = import_peft(export_peft(tmp_path, params, method, names=NAMES), base(), names=NAMES)
    for field in ("a", "b"):
        np.testing.assert_array_equal(
            getattr(again.params["query"]["kernel"], field), getattr(params["query"]["kernel"], field)
        )
    assert dataclasses.replace(method, freeze_a=False, targets=("/query/kernel",)) == again.method


def test_dora_there_and_back(tmp_path: Path) -> None:
    method = lj.DoRA(rank=2, alpha=3, targets=("query", "embed/embedding"), alpha_overrides={"query": 5}, dropout=0.1)
    params = trained(method)
    folder = export_peft(tmp_path, params, method, names=NAMES)
    assert read_config(folder)["use_dora"] is True
    again = import_peft(folder, base(), names=NAMES)
    chex.assert_trees_all_equal(again.params, params)
    assert isinstance(again.method, lj.DoRA)
    assert lj.label_params(again.params, again.method) == lj.label_params(params, method)
    assert "vLLM has plain LoRA only, and this is `use_dora`: DoRA" in lj.interop.vllm_problems(folder)[0]


def test_dora_with_a_head_split_weight(tmp_path: Path) -> None:
    """Magnitudes of `(heads, d)` are joined there and split here."""
    names, uses = {"query": "layer.query"}, {"query": lj.Use("dot_general", "ioo")}
    tree = {"query": jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32))}
    method = lj.DoRA(rank=2, alpha=3, targets=("query",))
    params = lj.attach(tree, method, key=jax.random.key(0), uses=uses)
    folder = export_peft(tmp_path, params, method, names=names, uses=uses)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.layer.query.lora_magnitude_vector"].shape == (6,)
    chex.assert_trees_all_equal(import_peft(folder, tree, names=names, uses=uses).params, params)


def test_a_magnitude_of_another_size_is_refused(tmp_path: Path) -> None:
    method = lj.DoRA(rank=2, alpha=3, targets=("query",))
    folder = export_peft(tmp_path, trained(method), method, names=NAMES)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    name = f"{PREFIX}{QUERY}.lora_magnitude_vector"
    write_safetensors(folder / "adapter_model.safetensors", {**tensors, name: tensors[name][:-1]}, {"format": "pt"})
    with pytest.raises(lj.AdapterError, match=r"magnitude_vector' has the shape \(5,\), expected \(6,\) beside `query"):
        import_peft(folder, base(), names=NAMES)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_changed_the_base_is_refused(tmp_path: Path, start: str) -> None:
    """PEFT's own files of these starts stand beside a base that it has changed; after its conversion they don't."""
    folder = write_peft(tmp_path, init_lora_weights=start)
    with pytest.raises(
        lj.AdapterError, match=f"`init_lora_weights` '{start}': factors beside a base that the start has"
    ):
        import_peft(folder, base(), names=NAMES)
