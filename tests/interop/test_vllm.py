"""What vLLM refuses is said before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import FileError
from lora_jax.interop import vllm_problems

from . import kit
from .kit import EMBED, HEAD, PREFIX, QUERY, VALUE


def test_a_plain_adapter_has_none(tmp_path: Path) -> None:
    assert vllm_problems(kit.write_peft(tmp_path)) == []
    assert vllm_problems(kit.write_peft(tmp_path, use_rslora=True), modules={"query", "value"}) == []
    assert vllm_problems(kit.write_peft(tmp_path, kit.factors(QUERY) | kit.factors(EMBED))) == []


@pytest.mark.parametrize(
    ("tensors", "entries", "message"),
    [
        (None, {"r": 17}, "The rank is 17, and vLLM takes up to 16: start it with `--max-lora-rank 32`."),
        (None, {"r": 300}, "The rank is 300, and vLLM takes up to 16: start it with `--max-lora-rank 320`."),
        (None, {"r": 513}, "The rank is 513, and vLLM takes up to 512: export it with a lower rank."),
        (
            {f"{PREFIX}{QUERY}.lora_A.weight": np.ones((20, 8), np.float32)},
            {"r": 2},
            "The rank is 20, and vLLM takes up to 16: start it with `--max-lora-rank 32`.",
        ),
        (
            kit.factors(QUERY) | kit.whole(f"{HEAD}.weight"),
            {"modules_to_save": [HEAD]},
            "`modules_to_save` is classifier, and vLLM takes no module trained in full.",
        ),
        (None, {"bias": "lora_only"}, "`bias` is 'lora_only', and vLLM takes no trained biases."),
        (
            kit.factors(QUERY) | kit.whole(f"{HEAD}.weight"),
            {},
            f"vLLM takes factors only, and the file has {PREFIX}{HEAD}.weight.",
        ),
        (None, {"use_dora": True}, "vLLM has plain LoRA only, and this is `use_dora`: DoRA, whose magnitudes"),
        (None, {"lora_bias": True}, "vLLM has plain LoRA only, and this is `lora_bias`"),
        (
            kit.factors(QUERY, rank=4) | kit.factors(VALUE),
            {"rank_pattern": {"query": 4}},
            f"By `rank_pattern`, PEFT scales {QUERY} by another number than 2, and vLLM, which doesn't read them",
        ),
        (None, {"alpha_pattern": {"value": 2}}, f"By `alpha_pattern`, PEFT scales {VALUE} by another number than 2"),
        (
            kit.factors(QUERY, rank=8) | kit.factors(VALUE),
            {"rank_pattern": {"query": 8}, "alpha_pattern": {"query": 16}, "use_rslora": True},
            f"By `rank_pattern` and `alpha_pattern`, PEFT scales {QUERY} by another number than 2.82843",
        ),
        (None, {"alpha_pattern": {"(a+)+": 2}}, f"Whether vLLM would scale {QUERY} as PEFT does can't be told: in"),
        (
            kit.factors(QUERY) | {f"{PREFIX}{QUERY}.lora_magnitude_vector": np.ones(6, np.float32)},
            {},
            f"'{PREFIX}{QUERY}.lora_magnitude_vector' is DoRA's",
        ),
    ],
)
def test_each_problem_is_named(tmp_path: Path, tensors: Any, entries: dict[str, Any], message: str) -> None:
    problems = vllm_problems(kit.write_peft(tmp_path, tensors, **entries))
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_patterns_that_keep_the_scale_do_no_harm(tmp_path: Path) -> None:
    """vLLM takes ranks from the tensors, and one scale from `lora_alpha` and `r`: that of every module here."""
    tensors = kit.factors(QUERY, rank=4) | kit.factors(VALUE)
    assert vllm_problems(kit.write_peft(tmp_path, tensors, rank_pattern={"query": 4}, alpha_pattern={"query": 8})) == []
    stabilized = {"rank_pattern": {"query": 8}, "alpha_pattern": {"query": 8}, "use_rslora": True}
    assert vllm_problems(kit.write_peft(tmp_path, kit.factors(QUERY, rank=8) | kit.factors(VALUE), **stabilized)) == []
    other = {"rank_pattern": {"classifier": 4}, "alpha_pattern": {"classifier": 1}}  # of a module without factors
    assert vllm_problems(kit.write_peft(tmp_path, **other)) == []


def test_ranks_by_energy_can_be_served(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    start = {name: {"kernel": jnp.zeros((8, 8))} for name in ("one", "two")}
    tuned = {
        name: {"kernel": jax.random.normal(keys[2 * n], (8, n + 1)) @ jax.random.normal(keys[2 * n + 1], (n + 1, 8))}
        for n, name in enumerate(start)
    }
    found = lj.extract_lora(start, tuned, targets=("one", "two"), energy=1.0)
    names = {f"{name}/kernel": name for name in start}
    folder = lj.interop.export_peft(tmp_path, found.params, found.method, names=names)
    assert kit.read_config(folder)["rank_pattern"]
    assert vllm_problems(folder) == []


def test_all_at_once(tmp_path: Path) -> None:
    folder = kit.write_peft(tmp_path, r=64, bias="all", modules_to_save=["x"], use_dora=True, target_modules=None)
    assert len(vllm_problems(folder, modules={"value"})) == 5
    assert len(vllm_problems(folder, max_lora_rank=64)) == 3


def test_targets_of_the_served_model(tmp_path: Path) -> None:
    folder = kit.write_peft(tmp_path)
    assert vllm_problems(folder, modules={"query"}) == [f"The model doesn't adapt {VALUE}."]


def test_what_it_cannot_look_at(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`max_lora_rank` must be one of 1, 8, 16, .*, got 20"):
        vllm_problems(kit.write_peft(tmp_path), max_lora_rank=20)
    (tmp_path / kit.WEIGHTS).unlink()
    with pytest.raises(FileError, match="doesn't exist"):
        vllm_problems(tmp_path)
    (tmp_path / kit.CONFIG).write_text("{}")
    with pytest.raises(lj.AdapterError, match="has no `peft_type`"):
        vllm_problems(tmp_path)
