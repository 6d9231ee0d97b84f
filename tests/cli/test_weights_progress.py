"""The bar of weights that are read or written: in a terminal, and only where it takes a while."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora_jax.cli.weights_progress import WeightsProgress

TOTAL = 2_000_000


def shown(*events: tuple[int, int], terminal: bool, delay: float = 0.0) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with WeightsProgress(console, delay=delay) as progress:
        for event in events:
            progress(*event)
    return out.getvalue()


def test_a_bar_in_a_terminal_for_reading_and_then_for_writing():
    once = shown((0, TOTAL), (TOTAL // 2, TOTAL), (TOTAL, TOTAL), terminal=True)
    assert "weights" in once
    assert "2.0/2.0 MB" in once
    again = ((0, 2 * TOTAL), (TOTAL, 2 * TOTAL), (2 * TOTAL, 2 * TOTAL))
    twice = shown((0, TOTAL), (TOTAL // 2, TOTAL), (TOTAL, TOTAL), *again, terminal=True)
    assert twice.index("2.0/2.0 MB") < twice.index("4.0/4.0 MB")


def test_nothing_where_there_is_no_terminal():
    assert shown((0, TOTAL), (TOTAL // 2, TOTAL), (TOTAL, TOTAL), terminal=False) == ""


def test_nothing_where_it_takes_no_time():
    assert shown((0, TOTAL), (TOTAL // 2, TOTAL), (TOTAL, TOTAL), terminal=True, delay=60.0) == ""


def test_the_terminal_is_left_in_order_after_an_error():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)

    def read() -> None:
        with WeightsProgress(console, delay=0.0) as progress:
            progress(0, TOTAL)
            progress(1, TOTAL)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().rindex(visible) > out.getvalue().rindex(hidden)
