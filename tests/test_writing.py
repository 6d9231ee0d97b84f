"""Killed at any step of a write, a folder holds the earlier files or the new ones, whole; and the next write works."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files, interop
from lora_jax.files import FileError, folders, locks, new_folder, replacing, settle
from lora_jax.files.locks import BusyError, locked
from lora_jax.study.runs.results import ResultsFile
from lora_jax.training import TrainConfig
from lora_jax.training.config import resolve
from lora_jax.training.config_file import read_yaml, write_yaml
from lora_jax.training.data import token_cache
from lora_jax.training.data.encoding import Encoded
from lora_jax.training.examples import Columns
from lora_jax.training.run.folder import RunFolder
from lora_jax.training.run.inputs import RunInputs, read_inputs, write_inputs
from lora_jax.training.run.result import RunResult, read_result, write_result
from lora_jax.training.task import Classification
from lora_jax.training.task_file import TaskFile, read_task, save_task_adapter
from tests.result_rows import result_row
from tests.tiny_bert import write_tiny_bert

BASE = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
NAMES = {"dense/kernel": "dense", "dense/bias": "dense"}
METHOD = lj.LoRA(rank=1, alpha=1, targets=("dense/kernel",))
_STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


class Killed(BaseException):
    """Nothing that comes after it is done: clean-up isn't either."""


class Steps:
    """Changes to the file system: so many are done, and none from then on."""

    def __init__(self, most: int) -> None:
        self.most, self.done, self.is_dead = most, 0, False

    def take(self) -> None:
        if self.done >= self.most:
            self.is_dead = True
            raise Killed
        self.done += 1


class Writing:
    """A file whose every `write` is a step; one that is killed in it has written half."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: Any) -> None:
        if not self._steps.is_dead and self._steps.done == self._steps.most:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
        self._steps.take()
        self._file.write(data)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[Steps]:
    """From its `step`-th call of the file system on, this process does nothing to it; what it held is let go."""
    steps = Steps(step)

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reads = name == "open" and not (args[1] if len(args) > 1 else 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads:
                steps.take()
            return original(*args, **options)

        return call

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("xwa"):
            return original_open(path, mode, *args, **options)
        steps.take()
        return Writing(original_open(path, mode, *args, **options), steps)

    original_open = Path.open
    with pytest.MonkeyPatch.context() as patch:
        for name in _STEPS:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        patch.setattr(Path, "open", opened)
        yield steps


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def adapter(value: float) -> Any:
    params = lj.attach(BASE, METHOD, key=jax.random.key(0))
    return jax.tree.map(
        lambda leaf, moves: leaf * 0 + value if moves else leaf, params, lj.trainable_mask(params, METHOD)
    )


def save_adapter(folder: Path, value: float) -> None:
    lj.save_adapter(folder, adapter(value), METHOD)


def load_adapter(folder: Path) -> float:
    params = lj.load_adapter(folder, BASE).params
    values = {float(x) for factor in (params["dense"]["kernel"].a, params["dense"]["kernel"].b) for x in factor.ravel()}
    (value,) = values
    return value


def save_peft(folder: Path, value: float) -> None:
    interop.export_peft(folder, adapter(value), METHOD, names=NAMES, base_name=f"base-{value}")


def load_peft(folder: Path) -> float:
    params, _ = interop.import_peft(folder, BASE, names=NAMES)
    (value,) = {float(x) for x in params["dense"]["kernel"].a.ravel()}
    assert interop.read_peft_config(folder)["base_model_name_or_path"] == f"base-{value}"
    return value


def save_delta(folder: Path, value: float) -> None:
    tuned = {"dense": {"kernel": BASE["dense"]["kernel"], "bias": jnp.full(3, value)}}
    interop.export_delta(folder, tuned, BASE, names=NAMES)


def load_delta(folder: Path) -> float:
    (value,) = {float(x) for x in interop.apply_delta(folder, BASE, names=NAMES)["dense"]["bias"]}
    return value


def save_parts(folder: Path, value: float) -> None:
    """As a model in `value` files and the one that lists them."""
    names = [f"part-{number}-of-{value:g}" for number in range(int(value))]
    with replacing(folder, (*names, "list"), obsolete=lambda name: name.startswith("part-")) as staging:
        for name in names:
            files.write_text(staging / name, f"{value}")
        files.write_json(staging / "list", names)


def load_parts(folder: Path) -> float:
    settle(folder)
    names = files.read_json(folder / "list")
    assert sorted(path.name for path in folder.glob("part-*")) == sorted(names)
    (value,) = {float((folder / name).read_text()) for name in names}
    return value


def save_new(folder: Path, value: float) -> None:
    """A folder that is new: there is no earlier one."""
    if value == 2:
        with new_folder(folder, "output") as staging:
            files.write_text(staging / "one", f"{value}")
            files.write_text(staging / "two", f"{value}")


def load_new(folder: Path) -> float:
    if not folder.exists():
        return 1.0
    (value,) = {float((folder / name).read_text()) for name in ("one", "two")}
    return value


@functools.cache
def model() -> lj.models.Model:
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_bert(folder, layers=1, hidden=4, heads=1, positions=8)
        return lj.models.load(folder, task="classification", num_labels=2)


@functools.cache
def source() -> str:
    """The base of the model, for its configuration and tokenizer; removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return str(write_tiny_bert(folder.name, layers=1, hidden=4, heads=1, positions=8))


def save_merged(folder: Path, value: float) -> None:
    filled = jax.tree.map(lambda leaf: leaf * 0 + value, model().params)
    lj.models.save_pretrained(folder, model(), filled, source=source(), max_shard_size=2000)


def load_merged(folder: Path) -> float:
    params = lj.models.load(folder, task="classification", num_labels=2).params
    (value,) = {float(x) for leaf in jax.tree.leaves(params) for x in (leaf.min(), leaf.max())}
    return value


def save_task(folder: Path, value: float) -> None:
    task = Classification(labels=("a", "b"))
    told = TaskFile(base="base", task=task, pooling="first", max_length=int(value), dtype="float32", columns=Columns())
    save_task_adapter(folder, adapter(value), METHOD, told)


def load_task(folder: Path) -> float:
    assert read_task(folder).max_length == load_adapter(folder)
    return load_adapter(folder)


def save_results(folder: Path, value: float) -> None:
    result = RunResult(
        output=folder,
        adapter=task_adapter(),
        metrics={"dev": {"loss": value}},
        chosen="last",
        chosen_step=1,
        steps=1,
        labels=("a", "b"),
        trainable=1,
        total=2,
        percent=50.0,
        adapter_bytes=1,
        train_seconds=1.0,
        step_ms=None,
        waiting_share=None,
        padding_share=0.0,
        truncated={},
        dropped={},
        resumed_from=None,
        history=[],
    )
    write_result(run_folder(folder), result)


def load_results(folder: Path) -> float:
    result = read_result(run_folder(folder), lambda event: pytest.fail(str(event)))
    assert result is not None
    loss = result.metrics["dev"]["loss"]
    assert loss is not None
    return loss


@functools.cache
def task_adapter() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    save_task(Path(folder.name), 1.0)
    return Path(folder.name)


def run_folder(folder: Path) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "_check", lambda *_: None)
        run = RunFolder(resolve(TrainConfig(train="train.tsv", output=str(folder))))
    run.adapter = task_adapter()
    return run


def save_log(folder: Path, value: float) -> None:
    run = run_folder(folder)
    run.rewind_log(int(value) - 1)  # as a run does that goes on
    run.log({"step": int(value)})


def load_log(folder: Path) -> float:
    return float(run_folder(folder).history()[-1]["step"])


def save_inputs(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inputs = RunInputs(options={"lr": value}, parts={}, sources={}, formats={}, versions={})
    write_inputs(folder / "run.json", inputs)


def load_inputs(folder: Path) -> float:
    rate = read_inputs(folder / "run.json").options["lr"]
    assert isinstance(rate, float)
    return rate


def save_options(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "config.yaml", TrainConfig(train="train.tsv", output="out", lr=value))


def load_options(folder: Path) -> float:
    rate = read_yaml(folder / "config.yaml")["lr"]
    assert isinstance(rate, float)
    return rate


def save_row(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = ResultsFile(folder / "results.jsonl")
    results.append(result_row(f"{value}", rate=value, score=0.5))
    if value == 3:
        results.append(result_row("failed", error="x"))
        assert results.forget_failures() == 1


def load_row(folder: Path) -> float:
    return list(ResultsFile(folder / "results.jsonl").rows.values())[-1]["rate"]


def save_tokens(folder: Path, value: float) -> None:
    ids = np.full(4, int(value), np.int32)
    token_cache._write(folder / "a.safetensors", Encoded(ids, ids * 0, np.array([0, 4]), 0, 8))


def load_tokens(folder: Path) -> float:
    found = token_cache._read(folder / "a.safetensors", Encoded)
    assert found is not None
    return float(found.ids[0])


class Drawn:
    """Stands for a figure of Matplotlib's."""

    def __init__(self, value: float) -> None:
        self.value = value

    def savefig(self, file: Any, **_: Any) -> None:
        for _part in range(3):
            file.write(f"{self.value}\n".encode())


def save_figure(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_figure(folder / "a.png", Drawn(value))


def load_figure(folder: Path) -> float:
    first, *others = (folder / "a.png").read_text().split()
    assert others == [first, first]
    return float(first)


class Kind(NamedTuple):
    """A kind of folder.

    Attributes:
        save: Writes one of a value.
        load: The value of one that is whole.
        names: Names of its files.
        steps: A number of steps that a write needs at least.
    """

    save: Callable[[Path, float], None]
    load: Callable[[Path], float]
    names: set[str]
    steps: int = 5


ADAPTER = {"adapter.safetensors", "lora_jax_adapter.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
SHARDS = {*(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)), "model.safetensors.index.json"}
KINDS = {
    "adapter": Kind(save_adapter, load_adapter, ADAPTER, 20),
    "adapter of a run": Kind(save_task, load_task, {*ADAPTER, "task.json"}, 25),
    "peft": Kind(save_peft, load_peft, {"adapter_model.safetensors", "adapter_config.json"}, 20),
    "delta": Kind(save_delta, load_delta, {"delta.safetensors", "lora_jax_delta.json"}, 20),
    "merged model": Kind(save_merged, load_merged, {*SHARDS, *TOKENIZER, "config.json"}, 30),
    "parts": Kind(save_parts, load_parts, {"part-0-of-3", "part-1-of-3", "part-2-of-3", "list"}, 20),
    "new folder": Kind(save_new, load_new, {"one", "two"}, 12),
    "results": Kind(save_results, load_results, {"results.json"}),
    "log": Kind(save_log, load_log, {"metrics.jsonl"}),
    "inputs": Kind(save_inputs, load_inputs, {"run.json"}),
    "options": Kind(save_options, load_options, {"config.yaml"}),
    "rows of a comparison": Kind(save_row, load_row, {"results.jsonl"}, 3),
    "tokens": Kind(save_tokens, load_tokens, {"a.safetensors"}),
    "figure": Kind(save_figure, load_figure, {"a.png"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step_of_a_write(kind, tmp_path, monkeypatch):
    save, load, names, least = KINDS[kind]
    monkeypatch.setattr(locks, "_YOUNG", -1.0)  # what a kill left of a single file goes with the next write
    found, step = [], 0
    for step in range(1000):
        folder = tmp_path / f"{step}" / "out"
        save(folder, 1.0)
        with contextlib.suppress(Killed), killed_at(step) as steps:
            save(folder, 2.0)
        if kind != "new folder":  # the next writer, where nobody has read since
            shutil.copytree(folder, folder.with_name("next"))
            save(folder.with_name("next"), 3.0)
            assert load(folder.with_name("next")) == 3.0, step
            assert {path.name for path in folder.with_name("next").iterdir()} == names, step
            shutil.rmtree(folder.with_name("next"))
        found.append(load(folder))
        if steps.done < step:  # it needs no more than these
            break
        # What is elsewhere read by name is of one write, or not whole and can't be read at all.
        if kind != "new folder":
            save(folder, 3.0)
            assert load(folder) == 3.0, step
        elif found[-1] == 1.0:
            save(folder, 2.0)
            assert load(folder) == 2.0, step
        assert {path.name for path in folder.iterdir()} == names, step  # nothing is left of the kill
        beside = {path.name for path in folder.parent.iterdir()} - {"out"}
        assert beside <= ({".out.lora_jax.lock"} if kind == "new folder" and found[-1] == 2.0 else set()), step
    assert step >= least
    # The new files are in force from one step on.
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}


def test_others_never_read_files_of_two_writes(tmp_path):
    """Whoever knows nothing of `settle` finds the file that is read first gone, or all files of one write."""
    for step in range(1000):
        folder = tmp_path / f"{step}"
        save_parts(folder, 1.0)
        with contextlib.suppress(Killed), killed_at(step) as steps:
            save_parts(folder, 2.0)
        if (folder / "list").exists():
            names = json.loads((folder / "list").read_text())
            assert {(folder / name).read_text() for name in names} == {f"{float(len(names))}"}, step
        if steps.done < step:
            break


def test_a_kill_while_the_write_of_another_is_put_in_its_place(tmp_path):
    """A reader may be killed too, at whatever step."""
    step = 0
    for step in range(100):
        folder = tmp_path / f"{step}"
        save_parts(folder, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "_place", killed)
            patch.setattr(folders, "_withdraw", killed)
            with pytest.raises(Killed):
                save_parts(folder, 2.0)
        with contextlib.suppress(Killed), killed_at(step) as steps:
            settle(folder)
        assert load_parts(folder) == 2.0
        if steps.done < step:
            break
    assert step > 5


def import_peft(folder: Path) -> float:
    params, _ = interop.import_peft(folder, BASE, names=NAMES)
    (value,) = {
        float(x) for factor in (params["dense"]["kernel"].a, params["dense"]["kernel"].b) for x in factor.ravel()
    }
    return value


@pytest.mark.parametrize(("kind", "rounds"), [("adapter", 100), ("peft", 30), ("delta", 30)])
def test_two_threads_save_and_one_reads(kind, rounds, tmp_path):
    """Each read is of one save, whole, and none fails."""
    folder = tmp_path / "adapter"
    save, load, names, _ = KINDS[kind]
    load = import_peft if kind == "peft" else load
    save(folder, 1.0)
    failures: list[BaseException] = []

    def keep_saving(value: float) -> None:
        try:
            for _ in range(rounds):
                save(folder, value)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_saving, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    seen, reads = set(), 0
    while any(thread.is_alive() for thread in threads):
        seen.add(load(folder))
        reads += 1
    for thread in threads:
        thread.join()
    assert not failures
    assert reads > 5
    assert seen <= {1.0, 2.0}
    assert {path.name for path in folder.iterdir()} == names


def test_what_a_live_writer_is_at_work_on_is_left_to_it(tmp_path):
    with replacing(tmp_path, ("a",)) as staging:
        files.write_text(staging / "a", "mine")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "_PATIENCE", 0.1)
            with (
                pytest.raises(
                    FileError, match=rf"is being written by process {os.getpid()} on .*, since .*\. Wait for it"
                ),
                replacing(tmp_path, ("a",)),
            ):
                raise AssertionError
        assert staging.exists()
    assert (tmp_path / "a").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_has_one_writer(tmp_path):
    with new_folder(tmp_path / "out", "output") as staging:
        with (
            pytest.raises(FileError, match=rf"`output` .*out is being written by process {os.getpid()}"),
            new_folder(tmp_path / "out", "output"),
        ):
            raise AssertionError
        assert staging.exists()
        with new_folder(tmp_path / "other", "output"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


HOLD = """
import sys, time
from pathlib import Path
from lora_jax.files import locks
with locks.locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_a_lock_says_who_holds_it_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with pytest.raises(BusyError, match=rf"^process {process.pid} on \S+, since \d{{4}}-"), locked(path):
            raise AssertionError
    finally:
        process.kill()  # SIGKILL
        process.wait()
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert path.exists()  # it could not be taken away
    with locked(path) as held:
        assert held
    assert not path.exists()


def test_a_lock_is_nothing_to_write_through(tmp_path):
    """A folder from elsewhere may have a link, or lies, where the lock is to be."""
    (tmp_path / "precious").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with locked(tmp_path / "link") as held:
        assert not held
    assert (tmp_path / "precious").read_text() == "text"
    for content in ("", "[1]", '{"process": "x", "host": "\\u001b[2J", "since": 1}', "x" * 10_000):
        with locked(tmp_path / "lock"):
            (tmp_path / "lock").write_text(content)
            with pytest.raises(BusyError, match=r"^another process$"), locked(tmp_path / "lock"):
                raise AssertionError
    with locked(tmp_path / "none" / "lock") as held:  # there is no such folder
        assert not held


def test_single_files_of_killed_writers_go_with_the_next_write(tmp_path):
    for name in ("a.json", "b.json"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(Killed):
                files.write_json(tmp_path / name, [1])
    left = {path.name.split(".")[1]: path for path in tmp_path.iterdir()}
    files.write_json(tmp_path / "a.json", [2])
    assert left["a"].exists()  # too young to tell a writer that has just begun
    for path in left.values():
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    with files.in_use(left["a"]):  # a slow writer
        files.write_json(tmp_path / "a.json", [2])
        assert left["a"].exists()
    files.write_json(tmp_path / "a.json", [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left["b"].name, "a.json"])


@pytest.mark.parametrize(
    "plan",
    [
        {"names": ["../x"], "obsolete": [], "read_elsewhere": True},
        {"names": ["a"], "obsolete": ["/etc/passwd"], "read_elsewhere": True},
        {"names": ["a", 3], "obsolete": [], "read_elsewhere": True},
        {"names": [], "obsolete": [], "read_elsewhere": True},
        {"names": ["a"]},
        [],
    ],
)
def test_a_plan_from_elsewhere_moves_nothing_across_folders(plan, tmp_path):
    folder = tmp_path / "folder"
    (folder / ".written-0").mkdir(parents=True)
    (folder / ".written-0" / ".plan.json").write_text(json.dumps(plan))
    (tmp_path / "x").write_text("text")
    with pytest.raises(FileError, match=r"is no plan of a write. Remove the folder"):
        settle(folder)
    assert (tmp_path / "x").read_text() == "text"


def test_a_link_is_no_write_that_waits(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    plan = {"names": ["secret"], "obsolete": [], "read_elsewhere": False}
    (tmp_path / "elsewhere" / ".plan.json").write_text(json.dumps(plan))
    (tmp_path / "elsewhere" / "secret").write_text("text")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".written-0").symlink_to(tmp_path / "elsewhere")
    settle(folder)
    assert (tmp_path / "elsewhere" / "secret").exists()


def test_a_save_of_an_earlier_version_that_was_cut_short(tmp_path):
    """It left its description in `.saving-…`, with the tensors in their place already; or both there."""
    save_adapter(tmp_path / "old", 1.0)
    save_adapter(tmp_path / "new", 2.0)
    for moved in (True, False):
        folder = tmp_path / f"{moved}"
        shutil.copytree(tmp_path / "old", folder)
        (folder / ".saving-0").mkdir()
        for name, place in (
            ("adapter.safetensors", "." if moved else ".saving-0"),
            ("lora_jax_adapter.json", ".saving-0"),
        ):
            shutil.copy(tmp_path / "new" / name, folder / place / name)
        assert load_adapter(folder) == (2.0 if moved else 1.0)
        save_adapter(folder, 3.0)
        assert {path.name for path in folder.iterdir()} == KINDS["adapter"].names


def test_a_folder_that_is_written_over_and_over(tmp_path):
    (tmp_path / "a").write_text("1")

    def read() -> str:
        (tmp_path / "a").write_text((tmp_path / "a").read_text() + "1")
        return "text"

    with pytest.raises(FileError, match="is written over and over"):
        files.read_together(tmp_path, ("a",), read, tries=5)


def test_factors_that_are_not_what_the_method_says(tmp_path):
    """A checksum that was removed leaves this check: scales and ranks stand in two places."""
    save_adapter(tmp_path, 1.0)
    path = tmp_path / "lora_jax_adapter.json"
    plain = json.loads(path.read_text())
    for change, message in (
        (
            lambda d: d["adapted"]["dense/kernel"].update(scale=1000.0),
            r"has the alpha 1000 by .* and the method says 1",
        ),
        (
            lambda d: d["method"].update(rank=10**9),
            r"`dense/kernel` has the rank 1 by .* and the method says 1000000000:",
        ),
        (lambda d: d["method"].update(alpha_overrides={"/dense/kernel": 3.0}), r"has the alpha 1 .* method says 3"),
    ):
        content = json.loads(json.dumps(plain))
        del content["checksum"]
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(lj.AdapterError, match=message):
            lj.load_adapter(tmp_path, BASE)
    np.testing.assert_equal(plain["method"]["rank"], 1)


def test_a_new_folder_whose_name_begins_like_its_neighbour_leaves_that_alone(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "out.v2", "output") as other:
        (other / "a").write_text("x")
        with files.new_folder(tmp_path / "out", "output"):
            pass
    assert (tmp_path / "out.v2" / "a").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.v2"]
