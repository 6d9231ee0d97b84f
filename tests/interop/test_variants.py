"""Relatives of LoRA in PEFT folders: what they compute there is what they compute here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.interop import export_peft, import_peft
from lora_jax.paths import leaves_by_path
from tests.models_table import moved

from .kit import NAMES, assert_equal_models, base, peft_result, read_config, state_dict


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


def test_a_frozen_a_goes_out_as_it_is(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=3, targets=("query",), freeze_a=True)
    params = trained(method)
    again = import_peft(export_peft(tmp_path, params, method, names=NAMES), base(), names=NAMES)
    for field in ("a", "b"):
        np.testing.assert_array_equal(
            getattr(again.params["query"]["kernel"], field), getattr(params["query"]["kernel"], field)
        )
    assert dataclasses.replace(method, freeze_a=False, targets=("/query/kernel",)) == again.method
