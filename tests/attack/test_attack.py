"""Any folder is read or refused: the first cases of `fuzz.py`, which `scripts/fuzz_interop.py` goes on with."""

from __future__ import annotations

import collections
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import FileError

from . import fuzz

CASES, SECONDS = 150, 8.0


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_any_folder_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    deadline = time.monotonic() + SECONDS
    outcomes = []
    for seed in range(CASES):
        outcomes.append(fuzz.run(kind, seed, tmp_path / "case"))
        if time.monotonic() > deadline and seed > CASES / 10:
            break
    read = sum(outcome.was_read for outcome in outcomes)
    assert len(outcomes) / 10 < read < len(outcomes) * 0.9
    assert all(outcome.was_read for outcome in outcomes if not outcome.damage)


def test_the_damage_is_of_every_sort(tmp_path: Path) -> None:
    """It reaches both files, and most of it changes something."""
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    fuzz.run("delta", 3, tmp_path / "case")
    good = fuzz._good("delta", 0)["delta.safetensors"]
    sorts: collections.Counter[str] = collections.Counter()
    changed = 0
    for _ in range(100):
        path.write_bytes(good)
        sorts[fuzz.damaged(path, rng).split()[0]] += 1
        changed += path.read_bytes() != good
    assert sorts.keys() == {"bytes", "length", "entries", "values"}
    assert changed > 85


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: {"a": np.array([np.nan])}, "not all of it is finite"),
        (lambda folder: {"a": np.ones(2)}, "AssertionError"),
    ],
)
def test_a_finding_is_told_with_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, found: str
) -> None:
    monkeypatch.setitem(fuzz.KINDS, "adapter", fuzz.KINDS["adapter"]._replace(read=read))
    with pytest.raises(AssertionError, match=rf"kind 'adapter', seed 17, damage .*{found}"):
        fuzz.run("adapter", 17, tmp_path / "case")


@pytest.mark.parametrize("error", [FileError, lj.AdapterError])
def test_a_message_that_says_nothing_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[ValueError]
) -> None:
    def refuse(folder: Path) -> Any:
        raise error("no")

    monkeypatch.setitem(fuzz.KINDS, "adapter", fuzz.KINDS["adapter"]._replace(read=refuse))
    for seed in range(8):
        with pytest.raises(AssertionError, match=r"a good folder is refused: no|doesn't name the folder: no"):
            fuzz.run("adapter", seed, tmp_path / "case")


def test_the_script_runs_a_case_again() -> None:
    script = Path(__file__).parents[2] / "scripts" / "fuzz_interop.py"
    command = [sys.executable, str(script), "--seed", "5", "--cases", "2", "--kind", "delta"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 findings"
