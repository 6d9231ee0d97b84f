"""What is shown while a run goes on."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from lora_jax.training.run.events import Evaluated, Note, StepDone, WeightsRead
from lora_jax.training.run.meter import Meter
from lora_jax.training.run.progress import LiveProgress, format_bytes, format_seconds


def step(number, **changes):
    values = {
        "step": number,
        "steps": 100,
        "epoch": number / 10,
        "loss": 1.0,
        "accuracy": 0.5,
        "grad_norm": 1.0,
        "tokens_per_second": 1000.0,
        "seconds_left": 62.0,
    }
    return StepDone(**{**values, **changes})


def shown(*events, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with LiveProgress(console) as progress:
        for event in events:
            progress(event)
            if terminal:
                progress._live.refresh()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    events = [Note(message="hello"), *(step(i, loss=float(i)) for i in range(1, 101))]
    text = shown(*events, Evaluated(step=100, split="dev", metrics={"accuracy": 0.9}, best=True), terminal=False)
    lines = text.splitlines()
    assert lines == [
        "hello",
        "step 1/100  loss 1.000  accuracy 50.0 %  1,000 tokens/s  1:02 left",
        "step 100/100  loss 90.500  accuracy 50.0 %  1,000 tokens/s  1:02 left",  # the mean of the last 20
        "step 100  dev: accuracy 90.0 %  (best so far)",
    ]
    assert "\x1b" not in text


def test_one_live_line_in_a_terminal():
    text = shown(step(1), step(2, accuracy=None, loss=3.0), terminal=True)
    assert "step 2/100  loss 2.000" in text
    assert text.count("\n") <= 2


def test_weights_are_shown_in_a_terminal_alone():
    events = [WeightsRead(done=done, total=2_000_000) for done in (0, 1_000_000, 2_000_000)]
    assert "weights  1 MB of 2 MB" in shown(*events, step(1), terminal=True)
    assert shown(*events, terminal=False) == ""


def test_formats():
    assert [format_seconds(s) for s in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    assert [format_bytes(n) for n in (0, 999, 1500, 1_336_344, 272_000_000, 2.5e9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "1.34 MB",
        "272 MB",
        "2.5 GB",
    ]


def test_compiling_does_not_count_as_pace():
    meter = Meter(tokens=10, slots=20, seconds=5.0)
    meter.start()
    for length, pause in ((8, 0.2), (8, 0.01), (8, 0.01), (16, 0.2), (16, 0.01)):
        meter.dispatch((4, length))
        time.sleep(pause)
        meter.count(tokens=20, slots=32, loss=1.0, correct=2.0, count=4.0)
    meter.stop()
    assert 5.4 < meter.seconds < 10
    assert meter.step_ms is not None
    assert meter.step_ms < 150
    assert meter.tokens_per_second is not None
    assert meter.tokens_per_second > 100
    assert (meter.tokens, meter.slots) == (110, 180)
    assert meter.take_means() == {"loss": 1.0, "accuracy": 0.5}
    assert Meter(**meter.state()).state()["tokens"] == 110


def test_waiting_for_batches_is_counted():
    def slow() -> Any:
        for number in range(3):
            time.sleep(0.05)
            yield number

    meter, batches = Meter(seconds=1.0, waiting=0.5), slow()
    meter.start()
    assert [meter.wait_for(batches) for _ in range(3)] == [0, 1, 2]
    meter.stop()
    assert 0.65 < meter.waiting < 1.0
    assert meter.waiting_share == meter.waiting / meter.seconds
    assert Meter(**meter.state()).waiting == meter.waiting


def test_a_note_is_shown_letter_by_letter():
    note = Note(message="label [red]x[/y] :smile: \x1b[2J\x1b]0;title\x07\nsecond")
    for terminal in (True, False):
        text = shown(note, Evaluated(step=1, split="[/dev]\x9b", metrics={"accuracy": 0.5}), terminal=terminal)
        assert r"label [red]x[/y] :smile: \x1b[2J\x1b]0;title\x07\nsecond" in text
        assert r"[/dev]\x9b" in text
        assert "\x1b[2J" not in text
        assert "\x07" not in text
