"""`lora-jax compare`, from its flags to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_jax.cli.main import main
from lora_jax.study import Comparison
from lora_jax.study.grid.settings import prepare_comparison


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def flags(shared, tmp_path) -> list[str]:
    named = {key.replace("_", "-"): value for key, value in shared.items() if key != "dev"}
    return [
        *(str(part) for name, value in named.items() for part in (f"--{name}", value)),
        "--output",
        str(tmp_path / "out"),
    ]


def test_from_flags_to_a_report(flags, tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("- {name: frozen, lr: 3e-2, label: just the head}\n- {name: bitfit, lr: 3e-2}\n")
    assert run("compare", *flags, "--grid", grid, "--seeds", 0, "--train-rows", 40, "--dev-share", 0.25) == 0
    output, told = capsys.readouterr()
    assert "just the head, rate 0.03, seed 0: accuracy dev" in told
    assert "recommended" in output
    assert "report.html" in output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "dev is 25% of the training examples, held out with seed 0; training examples drawn with seed 0" in page
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [len(Path(rows[0]["config"][split]).read_text().splitlines()) for split in ("train", "dev")] == [40, 15]
    # Again: nothing is run, and the report is written anew.
    (tmp_path / "out" / "report.html").unlink()
    assert run("compare", *flags, "--grid", grid, "--seeds", 0, "--train-rows", 40, "--dev-share", 0.25) == 0
    assert "seed 0: accuracy" not in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()


def test_the_plan_runs_nothing(flags, tmp_path, capsys):
    assert run("compare", *flags, "--plan") == 0
    output = capsys.readouterr().out
    assert "full fine-tuning" in output
    assert "30 of" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lorra"], "`--methods` must be one of adapter, "),
        (["--grid", "none.yaml"], "`--grid` none.yaml doesn't exist"),
        (["--grid", "g.yaml", "--methods", "lora"], "`--grid` and `--methods` each say what is compared"),
        (["--preset", "low-data", "--ranks", "2"], "`--preset` and `--ranks` each say what is compared"),
        (["--grid", "g.yaml", "--rate-factors", "1"], "`--grid` and `--rate-factors` each say which rates are tried"),
        (["--minutes", "-1"], "`--minutes` must be a positive number, got -1.0"),
        (["--seeds", "0", "0"], "`--seeds` must differ"),
    ],
)
def test_mistakes_are_one_line(flags, more, message, capsys, tmp_path):
    assert run("compare", *flags, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-jax compare: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_data_the_shipped_messages(base, tmp_path):
    prepared = prepare_comparison(Comparison(output=str(tmp_path / "out"), options={"base": base}))
    assert {split: len(rows) for split, rows in prepared.splits.examples.items()} == {
        "train": 384,
        "dev": 96,
        "test": 96,
    }
    assert prepared.settings.is_demonstration
    assert (prepared.config.epochs, prepared.config.batch_size) == (5, 16)
