"""Checkpoints: what is kept, what comes back, and what a full disk leaves."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.errors import CheckpointError, NotFiniteError
from lora_jax.training.run.checkpoint import Checkpoint, Checkpoints, RunProgress
from lora_jax.training.run.meter import MeterState
from lora_jax.training.run.step import TrainState

METHOD = lj.LoRA(rank=2, alpha=2, targets=("w",))


def state(step, value=1.0, width=4):
    params = lj.attach({"w": jnp.ones((4, width)), "v": jnp.ones(3)}, METHOD, key=jax.random.key(0))
    trainable, _ = lj.partition(params, lj.trainable_mask(params, METHOD))
    trainable = jax.tree.map(lambda x: x + value, trainable)
    return TrainState(trainable, optax.adam(1e-3).init(trainable), jnp.asarray(step, jnp.int32))


def progress(step: int) -> RunProgress:
    meter: MeterState = {"seconds": 0.5, "waiting": 0.0, "tokens": step, "slots": step, "window": []}
    return {"iterator": {"next_index": step}, "meter": meter, "data": "", "dev": None}


def save(checkpoints, step, score=None, **options):
    checkpoints.save(Checkpoint(state(step, **options), jax.random.key(7), progress(step)), score=score)


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([None, None, None], [2, 3], None),
        ([0.5, 0.9, 0.7], [2, 3], 2),
        ([0.5, 0.7, 0.9], [2, 3], 3),
        ([0.9, 0.9, 0.7], [2, 3], 2),  # the later of equals
        ([-3.0, -1.0, None], [2, 3], 2),
    ],
)
def test_best_and_last_are_kept_two_at_least(scores, kept, best, tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step, score in enumerate(scores, start=1):
            save(checkpoints, step, score)
        assert (checkpoints.last_step, checkpoints.best_step) == (3, best)
    assert steps(tmp_path / "c") == kept
    with Checkpoints(tmp_path / "c") as again:  # the same after a restart
        assert (again.last_step, again.best_step) == (3, best)


def test_everything_comes_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, 0.5, value=3.0)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(5, state(0))
    expected = state(5, value=3.0)
    assert jax.tree.structure(found.state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found.state, expected)
    assert found.progress == progress(5)
    assert jax.random.key_data(found.key).tolist() == jax.random.key_data(jax.random.key(7)).tolist()


def test_the_base_is_not_in_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, width=50_000)  # 800 kB of base, 400 kB of factor and moments of it: 1.2 MB
        found = checkpoints.restore(1, state(0, width=50_000))
    sizes = [leaf.size for leaf in jax.tree.leaves(found.state)]
    assert 4 * 50_000 not in sizes
    assert sizes.count(2 * 50_000) == 3


def test_nothing_of_a_state_that_is_not_finite(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(NotFiniteError, match=r"isn't finite at step 2: no checkpoint is written") as caught:
            save(checkpoints, 2, value=jnp.nan)
        assert caught.value.step == 2
    assert steps(tmp_path) == [1]


def test_what_a_killed_process_left_is_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    unfinished = tmp_path / "step_2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_bytes(b"x")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step == 1
        save(checkpoints, 2)
    assert steps(tmp_path) == [1, 2]


@contextlib.contextmanager
def threads_left_to_end():
    """Orbax's threads outlive a failed read by a moment, and their own errors would be laid to the next test."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
    try:
        yield
        time.sleep(0.5)
        gc.collect()
    finally:
        sys.unraisablehook = hook


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    with Checkpoints(tmp_path / "a") as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(CheckpointError, match=r"The checkpoint of step 1 .* belongs to another model or method"):
            checkpoints.restore(1, state(0, width=5))
    for path in (tmp_path / "a" / "step_1" / "arrays").glob("**/d/*"):
        path.write_bytes(b"")
    with (
        threads_left_to_end(),
        Checkpoints(tmp_path / "a") as checkpoints,
        pytest.raises(CheckpointError, match=r"can't be read: .* Delete its folder"),
    ):
        checkpoints.restore(1, state(0))


@pytest.mark.parametrize(
    "name",
    ["run[1]", "lora[r=8]", "gs:/bucket/run", "gs://bucket/run", "s3:/x", "a*b?", "a\\b", "%20#|&", "a\nb", "größe"],
)
def test_names_that_others_read_as_patterns_or_schemes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(name) / "checkpoints"
    for step in (1, 2, 3):
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, step, 1 / step)
            assert checkpoints.restore(step, state(0)).progress == progress(step)
            assert (checkpoints.last_step, checkpoints.best_step) == (step, 1)
    assert steps(folder) == [1, 3]


def test_a_link_that_has_no_plain_name_either(tmp_path, monkeypatch):
    (tmp_path / "t[mp]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[mp]"))
    with pytest.raises(
        CheckpointError,
        match=r"can't be opened: .*run\[1\] has characters that are read as a pattern or a scheme: rename it",
    ):
        Checkpoints(tmp_path / "run[1]")
    assert not list((tmp_path / "t[mp]").iterdir())


def test_scores_are_those_that_were_sealed(tmp_path):
    """What Orbax keeps beside them chooses nothing."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 0.9)
        save(checkpoints, 2, 0.5)
    (path,) = (tmp_path / "step_2" / "metrics").glob("metrics")
    assert json.loads(path.read_text()) == {"score": 0.5}
    path.write_text('{"score": 0.99}')
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step == 1


@pytest.mark.parametrize(("step", "reason"), [(2, "its arrays aren't those that were written"), (3, "it is of step 3")])
def test_arrays_of_another_checkpoint(step, reason, tmp_path):
    """They are whole and of the same shapes."""
    for name, number, value in (("mine", 2, 1.0), ("other", step, 9.0)):
        with Checkpoints(tmp_path / name) as checkpoints:
            save(checkpoints, number, value=value)
    shutil.rmtree(tmp_path / "mine" / "step_2" / "arrays")
    shutil.copytree(tmp_path / "other" / f"step_{step}" / "arrays", tmp_path / "mine" / "step_2" / "arrays")
    with (
        Checkpoints(tmp_path / "mine") as checkpoints,
        pytest.raises(CheckpointError, match=rf"The checkpoint of step 2 in .* can't be read: {reason}\. Delete"),
    ):
        checkpoints.restore(2, state(0))


def test_what_is_still_being_written_when_a_save_fails_is_removed(tmp_path, monkeypatch):
    """Orbax writes in threads; one may go on after the error of another, and make its folder anew."""
    unfinished = tmp_path / "checkpoints" / "step_2.orbax-checkpoint-tmp"
    quiet = threading.Event()

    def go_on() -> None:
        for number in range(30):
            unfinished.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed in between
                (unfinished / f"{number}").write_text("x")
            time.sleep(0.01)
        quiet.set()

    def failing(*args: object, **kwargs: object) -> None:
        threading.Thread(target=go_on).start()
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(unfinished.parent) as checkpoints:
        save(checkpoints, 1, None)
        monkeypatch.setattr(checkpoints._manager, "save", failing)
        with pytest.raises(CheckpointError, match=r"the disk .* is full\. That of step 1 is intact"):
            save(checkpoints, 2, None)
    assert quiet.wait(10)
    assert [path.name for path in unfinished.parent.iterdir()] == ["step_1"]
