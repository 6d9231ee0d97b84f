"""Killed by SIGKILL, at random steps and in the middle of a save, a run ends with the same bits."""

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
from lora_jax.training import TrainConfig
from lora_jax.training.config import write_yaml

# argv: config.yaml, what to die in ("step", "save" or "nothing"), at which step or save.
RUN = """
import os, signal, sys, threading
from lora_jax.training import TrainConfig, train
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.config import read_yaml
from lora_jax.training.events import StepDone

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


def run(config: TrainConfig, folder: Path, where: str = "nothing", number: int = 0) -> int:
    write_yaml(folder / "config.yaml", config)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),  # pyright: ignore[reportAttributeAccessIssue]
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", RUN, str(folder / "config.yaml"), where, str(number)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode


@pytest.mark.slow
def test_sigkill_at_random_steps(options, tmp_path):
    options = {**options, "epochs": 4, "method": {"name": "lora", "dropout": 0.1}, "accumulate": 2}
    whole = TrainConfig(**options, output=str(tmp_path / "whole"))
    assert run(whole, tmp_path) == 0

    broken = TrainConfig(**options, output=str(tmp_path / "broken"))
    first, second = sorted(random.SystemRandom().sample(range(1, 33), 2))
    for where, number in (("step", first), ("save", 16), ("step", second)):
        if number < (last_checkpoint(tmp_path / "broken") or 0):
            continue  # that step is behind it
        assert run(broken, tmp_path, where, number) in (-signal.SIGKILL, 0)
    assert run(broken, tmp_path) == 0

    ours, theirs = (
        files.read_safetensors(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("broken", "whole")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=f"{name}, killed at {first}, in a save, at {second}")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("broken", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"]


def last_checkpoint(folder: Path) -> int | None:
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*[0-9]")]
    return max(steps, default=None)
