"""Any file is read or refused: the first trials of the attack that `scripts/fuzz.py` goes on with."""

from __future__ import annotations

import collections
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_json, write_json

from . import kinds, mutations, trial

TRIALS, SECONDS = 25, 0.6
SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def worker() -> Iterator[trial.Worker]:
    with trial.Worker() as worker:
        yield worker


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_any_file_is_read_or_refused(tmp_path: Path, worker: trial.Worker, kind: str) -> None:
    outcomes: list[trial.Outcome] = []
    deadline = None
    for seed in range(TRIALS):
        outcomes.append(worker.run(kind, seed, tmp_path / "case"))
        assert not outcomes[-1].is_finding, f"seed {seed}: {outcomes[-1]}"
        deadline = deadline or time.monotonic() + SECONDS  # the first has made the good ones
        if time.monotonic() > deadline and any(outcome.was_read for outcome in outcomes):
            break
    assert all(outcome.was_read for outcome in outcomes if not outcome.damage)


def write_numbers(folder: Path, rng: mutations.Rng) -> None:
    write_json(folder / "numbers.json", {"a": int(rng.integers(9)), "b": [1, 2, 3]})


def with_kind(monkeypatch: pytest.MonkeyPatch, read: Any, **options: Any) -> None:
    monkeypatch.setitem(kinds.KINDS, "numbers", kinds.Kind(write_numbers, read, ("numbers.json",), **options))


def outcomes(folder: Path, count: int = 30) -> list[trial.Outcome]:
    return [trial.run("numbers", seed, folder / "case") for seed in range(count)]


def read_numbers(folder: Path) -> Any:
    return read_json(folder / "numbers.json")


def test_what_is_refused_or_read_as_it_is_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kind(monkeypatch, read_numbers)
    found = outcomes(tmp_path)
    assert not any(outcome.is_finding for outcome in found)
    assert 3 < sum(outcome.was_read for outcome in found) < 27
    assert 3 < sum(not outcome.damage for outcome in found) < 20


def test_a_change_that_a_checksum_covers_and_that_is_read_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kind(monkeypatch, read_numbers, summed=("*.json",))
    found = [outcome for outcome in outcomes(tmp_path) if outcome.is_finding]
    assert found
    assert all("numbers.json was changed, a checksum covers it" in outcome.message for outcome in found)
    assert all(outcome.damage for outcome in found)
    trial._good_digests.cache_clear()
    with_kind(monkeypatch, lambda folder: None, summed=("*.json",))  # the change changes nothing
    assert not any(outcome.is_finding for outcome in outcomes(tmp_path))


def _refuse(folder: Path) -> Any:
    raise lj.AdapterError("no")


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda folder: 1 / 0, r"ZeroDivisionError: division by zero \(test_attack.py:\d+"),
        (lambda folder: {"a": np.array([np.nan])}, "not all of it is finite"),
        (_refuse, r"a good folder is refused: no|doesn't name the folder: no"),
    ],
)
def test_a_finding_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, found: str) -> None:
    with_kind(monkeypatch, read)
    for outcome in outcomes(tmp_path, 6):
        assert outcome.is_finding
        with pytest.raises(AssertionError, match=found):
            raise AssertionError(outcome.message)


def test_what_was_read_is_held_against_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(folder: Path, value: Any) -> None:
        assert value == {"a": 0}, "other values"

    with_kind(monkeypatch, read_numbers, check=check)
    assert any(outcome.is_finding and "other values" in outcome.message for outcome in outcomes(tmp_path))


def test_a_trial_is_the_same_again(tmp_path: Path) -> None:
    for kind in ("config", "CSV", "task"):
        for seed in range(4):
            both = []
            for name in ("one", "other"):
                damage = trial.make_case(kind, seed, tmp_path / name)
                files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
                both.append((damage, [path.read_bytes() for path in files if not path.is_symlink()]))
            assert both[0] == both[1]


@pytest.mark.parametrize(
    ("name", "content", "ways"),
    [
        ("a.json", b'{"a": [1, 2], "b": {"c": "d"}}', {"bytes", "length", "entries"}),
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n', {"bytes", "length", "entries"}),
        ("a.yaml", b"a: 1\nb: [x, y]\nc: {d: e}\n", {"bytes", "length", "entries"}),
        ("a.csv", b"a,b\n1,2\n3,4\n", {"bytes", "length", "cells"}),
        ("a.jinja", b"{{ messages }}", {"bytes", "length", "snippets"}),
        ("a.safetensors", b'\x38\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  abcdefgh', None),
    ],
)
def test_the_damage_is_of_every_sort(tmp_path: Path, name: str, content: bytes, ways: set[str] | None) -> None:
    path, rng = tmp_path / name, np.random.default_rng(0)
    sorts: collections.Counter[str] = collections.Counter()
    changed = 0
    for _ in range(150):
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        told = mutations.mutate(path, rng)
        sorts["no file" if "in place of" in told else told.split()[0]] += 1
        changed += "in place of" in told or path.read_bytes() != content
    assert sorts.keys() == {*(ways or {"bytes", "length", "entries", "values"}), "no file"}
    assert changed > 120


PROGRAM = """
import os, time
from tests.attack import kinds, trial
def write(folder, rng): (folder / "a.txt").write_text("a")
def ends(folder): os.abort()
def hangs(folder): time.sleep(60)
def grows(folder): return len(bytearray(1 << 31))
def reads(folder): return 1
for read in (ends, hangs, grows, reads):
    kinds.KINDS[read.__name__] = kinds.Kind(write, read, ('a.txt',))
trial.serve()
"""


def test_limits_end_a_trial_and_not_the_attack(tmp_path: Path) -> None:
    with trial.Worker(seconds=2.0, program=PROGRAM) as worker:
        for kind, found in (
            ("ends", "the process died (exit -6)"),
            ("grows", "MemoryError"),
            ("reads", None),
            ("hangs", "it took more than 2 s"),
        ):
            outcome = worker.run(kind, 1, tmp_path / "case")
            assert outcome.is_finding == (found is not None)
            assert (found or "") in outcome.message


def test_the_script_runs_a_trial_again_and_keeps_what_is_found(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--seed",
        "5",
        "--cases",
        "2",
        "--kind",
        "task",
        "--findings",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 findings"
    assert not list(tmp_path.iterdir())

    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    damage = trial.make_case("task", 5, tmp_path / "case")
    fuzz.keep(trial.Outcome(False, "broke", damage, True), "task", 5, tmp_path / "case", tmp_path / "findings")
    told = (tmp_path / "findings" / "task-5" / "FINDING.txt").read_text()
    assert "broke" in told
    assert "scripts/fuzz.py --kind 'task' --seed 5 --cases 1" in told
    assert (tmp_path / "findings" / "task-5" / "task.json").read_bytes() == (tmp_path / "case/task.json").read_bytes()
