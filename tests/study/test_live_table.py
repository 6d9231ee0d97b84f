"""What is seen while a comparison runs: in a terminal, and in a file."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lora_jax.study import compare
from lora_jax.study.report.live_table import LiveTable
from lora_jax.training.errors import NotFiniteError
from lora_jax.training.run.events import Note, StepDone


def watched(settings, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with LiveTable(settings.seeds, console) as table:
        compare(settings, on_progress=table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def broken(fake):
    fake.errors = {("FullFineTune", 0.1, 0): NotFiniteError("The loss became nan [at] step 3", step=3)}


def test_a_line_for_each_run_in_a_file(small, broken):
    lines = watched(small, terminal=False).splitlines()
    assert lines[:2] == [
        "BitFit, rate 0.1, seed 0: accuracy dev 80.0, test 80.0 in 0:10",
        "full fine-tuning, rate 0.1, seed 0: FAILED: NotFiniteError: The loss became nan [at] step 3",
    ]
    assert len(lines) == 6


def test_a_table_in_a_terminal(small, broken):
    shown = watched(small, terminal=True)
    assert "run 2 of 6: full fine-tuning, rate 0.1, seed 0, about 0:15" in shown
    assert "90.0 ± 0.0" in shown


def test_steps_are_seen_and_a_runs_own_notes_are_not(small, fake, monkeypatch):
    def train(config, *, on_progress):
        on_progress(Note(message="trainable: 10 of 100 parameters"))
        on_progress(
            StepDone(
                step=3,
                steps=9,
                epoch=0.5,
                loss=1.25,
                accuracy=0.5,
                grad_norm=1.0,
                tokens_per_second=None,
                seconds_left=None,
            )
        )
        time.sleep(0.6)  # steps are drawn four times a second
        return fake(config)

    monkeypatch.setattr("lora_jax.study.runs.comparison.train", train)
    shown = watched(small, terminal=True)
    assert "step 3/9  loss 1.250" in shown
    assert "trainable" not in shown
