"""Killed by SIGKILL at random steps and in the middle of a save, or out of disk, a run ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax import files
from lora_jax.training import TrainConfig, train
from lora_jax.training.config_file import write_yaml

# argv: config.yaml, what to die in ("step", "save" or "nothing"), at which step or save.
RUN = """
import os, signal, sys, threading
from lora_jax.training import TrainConfig, train
from lora_jax.training.run.checkpoint import Checkpoints
from lora_jax.training.config_file import read_yaml
from lora_jax.training.run.events import StepDone

path, where, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
save = Checkpoints.save

def killed_save(self, checkpoint, **kwargs):
    if int(checkpoint.state.step) == number:
        threading.Timer(0.02, kill).start()
    save(self, checkpoint, **kwargs)

def listen(event):
    if where == "step" and isinstance(event, StepDone) and event.step == number:
        kill()

if where == "save":
    Checkpoints.save = killed_save
train(TrainConfig.from_dict(read_yaml(path)), on_progress=listen)
"""


# argv: config.yaml. From step 16 on no file may grow beyond 2,000 bytes: writing fails as it does on a full disk.
FULL_DISK = """
import resource, sys
from lora_jax.cli.main import main
from lora_jax.training.run.events import StepDone
from lora_jax.training.run.progress import LiveProgress

show = LiveProgress.__call__

def fill_the_disk(self, event):
    show(self, event)
    if isinstance(event, StepDone) and event.step == 16:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

LiveProgress.__call__ = fill_the_disk
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def execute(program: str, config: TrainConfig, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    write_yaml(folder / "config.yaml", config)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),  # pyright: ignore[reportAttributeAccessIssue]
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", program, str(folder / "config.yaml"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def run(config: TrainConfig, folder: Path, where: str = "nothing", number: int = 0) -> int:
    return execute(RUN, config, folder, where, str(number)).returncode


def assert_same_adapter(ours: Path, theirs: Path, note: str = "") -> None:
    mine, other = (files.read_safetensors(path / "adapter" / "adapter.safetensors") for path in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name], err_msg=f"{name}, {note}")


@pytest.mark.full
@pytest.mark.slow
def test_sigkill_at_steps_and_in_a_save(options, tmp_path):
    options = {**options, "epochs": 4, "method": {"name": "lora", "dropout": 0.1}, "accumulate": 2}
    whole = TrainConfig(**options, output=str(tmp_path / "whole"))
    assert run(whole, tmp_path) == 0

    broken = TrainConfig(**options, output=str(tmp_path / "broken"))
    first, second = sorted(random.Random(0).sample(range(1, 33), 2))
    for where, number in (("step", first), ("save", 16), ("step", second)):
        if number < (last_checkpoint(tmp_path / "broken") or 0):
            continue  # that step is behind it
        assert run(broken, tmp_path, where, number) in (-signal.SIGKILL, 0)
    assert run(broken, tmp_path) == 0

    assert_same_adapter(tmp_path / "broken", tmp_path / "whole", f"killed at {first}, in a save, at {second}")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("broken", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"]


def last_checkpoint(folder: Path) -> int | None:
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*[0-9]")]
    return max(steps, default=None)


@pytest.mark.full
@pytest.mark.slow
def test_full_disk(finished, options, tmp_path):
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    process = execute(FULL_DISK, config, tmp_path)
    assert process.returncode == 2
    message = process.stderr.splitlines()[-1]
    assert message.startswith("lora-jax train: error: The checkpoint of step 16 can't be written to")
    assert "That of step 8 is intact; free some space and start the run again" in message
    assert "Traceback" not in process.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_8"]

    result = train(config)  # the same command, with space again
    assert result.resumed_from == 8
    assert_same_adapter(result.output, finished.output)
