"""A method in one file (`toy.py`) works everywhere once it is imported; names that are taken are refused."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli.main import main, make_parser
from lora_jax.study import Comparison, compare, make_candidate
from lora_jax.weights import AdaptedWeight, FactoredWeight, register
from tests import models_table
from tests.training.conftest import _compile_each_program_once, _own_cache, base, data  # noqa: F401


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    """The module, imported and forgotten again, so that other tests don't meet its method."""
    yield importlib.import_module("tests.methods.toy")
    del lj.Method.registry["toy"], lj.Method.by_name["toy"], AdaptedWeight.registry["ToyWeight"]
    del sys.modules["tests.methods.toy"]


@pytest.mark.parametrize("name", ["plain", "nnx_mlp", "linen_scanned"])
def test_the_laws(toy: ModuleType, name: str) -> None:
    row = models_table.case(name)
    method = models_table.with_defaults(toy.Toy)(row)
    start = row.attach(method)
    policy = "silent" if name in ("plain", "linen_scanned") else "error"
    apply = lj.adapt(row.apply, on_materialize=policy)
    np.testing.assert_allclose(apply(start, row.x), row.apply(row.params, row.x), rtol=1e-5, atol=1e-5)
    params = row.trained(method)
    wanted = row.apply(lj.merge_params(params), row.x)
    np.testing.assert_allclose(apply(params, row.x), wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(wanted, row.apply(row.params, row.x), atol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, lj.detach(start), row.params)


def test_it_is_saved_by_its_names(toy: ModuleType, tmp_path: Path) -> None:
    params = {"w": jnp.ones((4, 3))}
    method = toy.Toy(targets=("w",), first_gain=2.0)
    folder = lj.save_adapter(tmp_path, lj.attach(params, method, key=jax.random.key(0)), method)
    text = (folder / "lora_jax_adapter.json").read_text()
    assert '"name": "toy"' in text
    assert '"node": "ToyWeight"' in text
    loaded = lj.load_adapter(folder, params)
    assert loaded.method == dataclasses.replace(method, targets=("/w",))
    np.testing.assert_array_equal(lj.merge_params(loaded.params)["w"], 2 * np.ones((4, 3)))


def test_the_command_line_knows_it(
    toy: ModuleType,
    base: Path,
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "toy, one gain for each weight" in help_text
    assert "toy: Initial gain. Default: 1.0." in help_text
    flags = [word for name, value in data.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--base", str(base), "--output", str(tmp_path / "run"), "--epochs", "1"]
    assert main(["train", *flags, "--method", "toy", "--first-gain", "1.5"]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert main(["eval", "--adapter", str(adapter), "--test", data["test"]]) == 0
    capsys.readouterr()
    assert main(["inspect", "--adapter", str(adapter)]) == 0
    assert "gain" in capsys.readouterr().out


def test_a_comparison_knows_it(toy: ModuleType, base: Path, data: dict[str, str], tmp_path: Path) -> None:
    candidate = make_candidate("toy", factors=[1.0])
    assert (candidate.label, candidate.rates) == ("toy gains", (0.03,))
    options = {**data, "base": base, "epochs": 1, "batch_size": 16, "dropout": 0.0, "buckets": 1}
    settings = Comparison(output=str(tmp_path), options=options, candidates=(candidate,), seeds=(0,))
    compare(settings)
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["candidate"] == "toy gains"
    assert not row.get("error")


def test_taken_names_are_refused(toy: ModuleType) -> None:
    def define(**names: str) -> type:
        return dataclasses.dataclass(frozen=True, kw_only=True)(type("Other", (lj.Method,), names))

    with pytest.raises(lj.LoraJaxError, match=r"`name` 'toy' of .*\.Other is taken by tests\.methods\.toy\.Toy"):
        define(name="toy")
    with pytest.raises(lj.LoraJaxError, match=r"`saved_as` 'LoRA' of .*\.Other is taken by .*\.lora\.method\.LoRA"):
        define(name="other", saved_as="LoRA")
    assert "other" not in lj.Method.by_name
    with pytest.raises(lj.LoraJaxError, match=r"`name` of .*\.Other must match .*, got 'Not a name'"):
        define(name="Not a name")

    with pytest.raises(lj.LoraJaxError, match=r"`saved_as` 'LoRAWeight' of .*\.Taken is taken by .*\.LoRAWeight"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Taken(FactoredWeight):
            saved_as: ClassVar[str] = "LoRAWeight"


def test_a_subclass_without_a_name_is_not_registered(toy: ModuleType, tmp_path: Path) -> None:
    before = dict(lj.Method.by_name)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Quiet(toy.Toy):  # type: ignore[name-defined]
        pass

    assert (Quiet.name, Quiet.saved_as, lj.Method.by_name) == ("", "", before)
    method: Any = Quiet(targets=("w",))
    params = lj.attach({"w": jnp.ones((4, 3))}, method, key=jax.random.key(0))
    with pytest.raises(lj.AdapterError, match="A Quiet can't be saved: give the class a `name`"):
        lj.save_adapter(tmp_path, params, method)


def test_the_same_definition_may_come_again(toy: ModuleType) -> None:
    """As when a notebook's cell runs twice."""
    again = importlib.reload(toy)
    assert lj.Method.by_name["toy"] is again.Toy
