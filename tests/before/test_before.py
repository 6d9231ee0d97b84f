"""Folders of an earlier version load, and its interrupted run ends as it would have ended then: see README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_safetensors
from lora_jax.paths import leaves_by_path
from tests.before.trees import BASE, NAMES, STATE

HERE = Path(__file__).parent
NORM = {"batch_stats": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}


def assert_as_then(name: str, tree: object) -> None:
    leaves = leaves_by_path(tree)
    then = {path.removeprefix(f"{name}/"): array for path, array in expected().items() if path.startswith(f"{name}/")}
    assert leaves.keys() == then.keys()
    for path, array in then.items():
        # Merging takes a product, which may round otherwise elsewhere; what is saved is bit for bit.
        np.testing.assert_allclose(leaves[path], array, rtol=1e-6, atol=1e-6, err_msg=path)


def expected() -> dict[str, np.ndarray]:
    return read_safetensors(HERE / "expected.safetensors")


@pytest.mark.parametrize(("name", "method"), [("lora", lj.LoRA), ("bitfit", lj.BitFit)])
def test_an_adapter(name: str, method: type[lj.Method]) -> None:
    loaded = lj.load_adapter(HERE / name, BASE)
    assert type(loaded.method) is method
    assert_as_then(name, lj.merge_params(loaded.params))


def test_an_adapter_with_state() -> None:
    params, method, state = lj.load_adapter(HERE / "state", {"params": BASE, **NORM}, state=STATE)
    assert isinstance(method, lj.LoRA)
    assert_as_then("state", lj.merge_params(params))
    jax.tree.map(lambda new, before: np.testing.assert_array_equal(new, before + 1), state, STATE)


def test_a_peft_folder() -> None:
    params, method = lj.interop.import_peft(HERE / "peft", BASE, names=NAMES)
    assert isinstance(method, lj.LoRA)
    assert method.rank == 2
    assert_as_then("lora", lj.merge_params(params))


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_jax.training import TrainConfig, train
    from lora_jax.training.config_file import read_yaml

    for name in ("base", "data", "run"):
        shutil.copytree(HERE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    result = train(TrainConfig.from_dict(read_yaml(Path("run/config.yaml"))))
    assert result.resumed_from == 16
    for name, value in json.loads((HERE / "expected.json").read_text())["dev"].items():
        assert result.metrics["dev"][name] == pytest.approx(value, rel=1e-3), name
    # Eight steps after the checkpoint, compiled otherwise: the checkpoint itself is a few hundredths away.
    tensors = read_safetensors(result.adapter / "adapter.safetensors")
    then = {name.removeprefix("run/"): array for name, array in expected().items() if name.startswith("run/")}
    assert tensors.keys() == then.keys()
    for name, array in then.items():
        np.testing.assert_allclose(tensors[name], array, atol=1e-3, err_msg=name)
