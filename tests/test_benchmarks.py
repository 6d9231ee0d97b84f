"""The benchmarks run, at toy sizes, and their page has a line for every target. Their figures are nobody's here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, BENCH / f"{name}.py", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_page(folder: Path | None, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `scripts/bench/page.py` does, in this process: it computes nothing."""
    arguments = ["--page", str(page)] + ([] if folder is None else ["--results", str(folder)])
    monkeypatch.setattr(sys, "argv", ["page.py", *arguments])
    monkeypatch.syspath_prepend(str(BENCH))
    runpy.run_path(str(BENCH / "page.py"), run_name="__main__")


def content(name: str, folder: Path) -> dict[str, Any]:
    run(name, "--quick", "--output", str(folder))
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "matmul",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("shared_input", "step", "family", "inference", "memory", "merge", "trace", "gpu")
        ),
    ],
)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = content(name, tmp_path)
    assert result["quick"]
    assert result["rows"]
    empty = {column for row in result["rows"] for column, value in row.items() if value is None}
    assert empty <= {"utilization, %", "peak memory, GB"}, "only what a CPU cannot tell"
    assert {"machine", "versions", "commit", "python"} <= result.keys()
    page = tmp_path / "page.md"
    write_page(tmp_path, page, monkeypatch)
    text = page.read_text()
    assert f"## {name}: " in text
    assert text.count("| not run |") > 5  # what other benchmarks measure


def test_the_page_is_what_the_kept_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_page(None, tmp_path / "page.md", monkeypatch)
    assert (tmp_path / "page.md").read_text() == (BENCH.parent.parent / "docs" / "benchmarks.md").read_text()


def test_the_readme_says_what_a_step_costs() -> None:
    root = BENCH.parent.parent
    rows = json.loads((root / "docs" / "benchmarks" / "step.json").read_text())["rows"]
    cost = next(row["/ full"][0] for row in rows if row["method"] == "LoRA all linear, r=8")
    assert (
        f"LoRA on all linear layers of MiniLM takes {cost:.2f} of a full"
        in (BENCH.parent.parent / "README.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["rivals", "end_to_end"])
def test_it_runs_beside_pytorch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
    pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
    result = content(name, tmp_path)
    assert len(result["rows"]) >= 4
    # qwix is a rival of the benchmark alone, installed by `scripts/bench/run`.
    assert set(result.get("failures", {})) <= {"qwix on the Linen model", "PEFT, torch.compile"}
