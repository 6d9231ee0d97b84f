"""Killed at any step of a write, a folder holds the earlier files or the new ones, whole; and the next write works."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files, interop
from lora_jax.files import FileError, new_folder, replacing, settle
from lora_jax.files.locks import BusyError, locked

BASE = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
NAMES = {"dense/kernel": "dense", "dense/bias": "dense"}
METHOD = lj.LoRA(rank=1, alpha=1, targets=("dense/kernel",))
_STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


class Killed(BaseException):
    """Nothing that comes after it is done: clean-up isn't either."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[list[str]]:
    """From its `step`-th call of the file system on, this process does nothing to it; what it held is let go."""
    done: list[str] = []

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reads = name == "open" and not (args[1] if len(args) > 1 else 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads:
                if len(done) >= step:
                    raise Killed
                done.append(name)
            return original(*args, **options)

        return call

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "x" in mode or "w" in mode:
            if len(done) >= step:
                raise Killed
            done.append("create")
        return original_open(path, mode, *args, **options)

    original_open = Path.open
    with pytest.MonkeyPatch.context() as patch:
        for name in _STEPS:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        patch.setattr(Path, "open", opened)
        yield done


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


KINDS = {
    "adapter": (save_adapter, load_adapter, {"adapter.safetensors", "lora_jax_adapter.json"}),
    "peft": (save_peft, load_peft, {"adapter_model.safetensors", "adapter_config.json"}),
    "delta": (save_delta, load_delta, {"delta.safetensors", "lora_jax_delta.json"}),
    "parts": (save_parts, load_parts, {"part-0-of-3", "part-1-of-3", "part-2-of-3", "list"}),
    "new folder": (save_new, load_new, {"one", "two"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step_of_a_write(kind, tmp_path):
    save, load, names = KINDS[kind]
    found = []
    for step in range(1000):
        folder = tmp_path / f"{step}" / "out"
        save(folder, 1.0)
        with contextlib.suppress(Killed), killed_at(step) as done:
            save(folder, 2.0)
        if kind != "new folder":  # the next writer, where nobody has read since
            shutil.copytree(folder, folder.with_name("next"))
            save(folder.with_name("next"), 3.0)
            assert load(folder.with_name("next")) == 3.0, step
            assert {path.name for path in folder.with_name("next").iterdir()} == names, step
            shutil.rmtree(folder.with_name("next"))
        found.append(load(folder))
        if len(done) < step:  # it needs no more than these
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
    assert step > 8
    # The new files are in force from one step on.
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}


def test_others_never_read_files_of_two_writes(tmp_path):
    """Whoever knows nothing of `settle` finds the file that is read first gone, or all files of one write."""
    for step in range(1000):
        folder = tmp_path / f"{step}"
        save_parts(folder, 1.0)
        with contextlib.suppress(Killed), killed_at(step) as done:
            save_parts(folder, 2.0)
        if (folder / "list").exists():
            names = json.loads((folder / "list").read_text())
            assert {(folder / name).read_text() for name in names} == {f"{float(len(names))}"}, step
        if len(done) < step:
            break


def test_a_kill_while_another_s_write_is_put_in_its_place(tmp_path):
    """A reader may be killed too, at whatever step."""
    for step in range(100):
        folder = tmp_path / f"{step}"
        save_parts(folder, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_place", killed)
            patch.setattr(files, "_withdraw", killed)
            with pytest.raises(Killed):
                save_parts(folder, 2.0)
        with contextlib.suppress(Killed), killed_at(step) as done:
            settle(folder)
        assert load_parts(folder) == 2.0
        if len(done) < step:
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
    save, load, names = KINDS[kind]
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
            patch.setattr(files, "_PATIENCE", 0.1)
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
sys.path.insert(0, sys.argv[2])
import importlib.util
spec = importlib.util.spec_from_file_location("locks", sys.argv[2] + "/lora_jax/locks.py")
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
with locks.locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_a_lock_says_who_holds_it_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path), str(Path(__file__).parents[1])]
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
        assert {path.name for path in folder.iterdir()} == KINDS["adapter"][2]


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


def test_a_new_folder_whose_name_begins_as_a_neighbour_s_leaves_that_alone(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "out.v2", "output") as other:
        (other / "a").write_text("x")
        with files.new_folder(tmp_path / "out", "output"):
            pass
    assert (tmp_path / "out.v2" / "a").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.v2"]
