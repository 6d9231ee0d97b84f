"""`lora-jax analyze`, from flags to tables and files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.paths import leaves_by_path
from tests.models_table import moved
from tests.tiny_bert import write_tiny_bert

LORA = {"rank": 2, "alpha": 4, "targets": ("attention/query", "mlp/up")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("base"), layers=2, hidden=16, heads=2)


@pytest.fixture(scope="module")
def save(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes an adapter whose trained numbers have moved, and says which tree it is of."""
    params = lj.models.load(base).params

    def write(method: lj.Method, seed: int = 0) -> tuple[Path, Any]:
        tree = lj.attach(params, method, key=jax.random.key(seed))
        tree = moved(tree, lj.trainable_mask(tree, method), seed=seed)
        return lj.save_adapter(tmp_path_factory.mktemp("adapter"), tree, method), tree

    return write


def run(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lora_beside_another_rank(base: Path, save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `study`")
    (one, tree), (other, _) = save(lj.LoRA(**LORA)), save(lj.LoRA(**{**LORA, "rank": 3}), seed=1)
    output = tmp_path / "figures"
    assert run(one, "--other", other, "--base", base, "--output", output) == 0
    text = capsys.readouterr().out
    for words in ("moved most", "first σ of ΔW", "amplified", "shared subspace", "encoder/layers/1/mlp/up/kernel"):
        assert words in text
    assert "mean |change|" not in text  # no bias was trained
    names = ("amplification", "changes", "layers", "similarity", "singular_values")
    figures = {f"{name}.{ending}" for name in ("layers", "similarity", "singular_values") for ending in ("png", "svg")}
    assert {path.name for path in output.iterdir()} == {f"{name}.csv" for name in names} | figures

    node = leaves_by_path(tree)["encoder/layers/0/attention/query/kernel"]
    values = np.linalg.svd(np.asarray(node.delta()), compute_uv=False)[:2]
    found = [row for row in rows(output / "singular_values.csv") if row["path"].endswith("0/attention/query/kernel")]
    np.testing.assert_allclose([float(row["value"]) for row in found], values, rtol=1e-4)
    assert len(rows(output / "similarity.csv")) == 4 * 2 * 3
    changed = {row["path"]: float(row["change"]) for row in rows(output / "changes.csv")}
    assert changed.keys() == {path for path, leaf in leaves_by_path(tree).items() if lj.weights.is_adapted(leaf)}


def test_bitfit_by_layer_and_term(base: Path, save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `study`")
    folder, tree = save(lj.BitFit())
    assert run(folder, "--base", base, "--output", tmp_path / "new") == 0
    text = capsys.readouterr().out
    assert "mean |change|" in text
    assert "amplified" not in text
    table = rows(tmp_path / "new" / "biases.csv")
    before = leaves_by_path(lj.models.load(base).params)["encoder/layers/1/mlp/up/bias"]
    after = leaves_by_path(tree)["encoder/layers/1/mlp/up/bias"]
    (cell,) = [row for row in table if (row["layer"], row["term"]) == ("1", "mlp/up")]
    assert float(cell["change"]) == pytest.approx(float(np.abs(after - before).mean()), rel=1e-4)
    assert {row["term"] for row in table if not row["layer"]} == {"embeddings/norm/bias"}


@pytest.mark.parametrize("method", [lj.RandomMask(size=50, kind="rows"), lj.RandomSubspace(dimension=40)])
def test_the_random_baselines(method: lj.Method, base: Path, save: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(save(method)[0], "--base", base) == 0
    assert "moved most" in capsys.readouterr().out


def test_what_cannot_be_compared(base: Path, save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one, _), (other, _) = save(lj.LoRA(**LORA)), save(lj.BitFit())
    assert run(one, "--other", other, "--base", base) == 2
    assert "the two have no weight in common that LoRA has trained" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(one, "--base", base, "--output", tmp_path) == 2
    assert "isn't a new or empty folder: choose another" in capsys.readouterr().err
    assert run(tmp_path / "none") == 2
    assert "doesn't exist" in capsys.readouterr().err
