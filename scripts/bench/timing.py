"""Interleaved timing: candidates take turns, so that a slow moment of the machine hits them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Ratio(NamedTuple):
    """Median of the rounds' ratios of two candidates, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Times:
    """Seconds of every candidate in every round."""

    def __init__(self, seconds: dict[str, list[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> Ratio:
        """Of the medians' kind that a busy machine bends least: round by round, then the median."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]
        if len(ratios) < 2:
            return Ratio(*ratios * 3)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(middle, low, high)


def interleave(candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1, calls: int = 1) -> Times:
    """Runs every candidate once a round, in turn; `warm_up` rounds more are not counted.

    Args:
        candidates: functions without arguments; what they return is waited for where JAX computes it.
        rounds: rounds that count.
        warm_up: rounds before them.
        calls: calls in a row that make one measurement, for what takes microseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - start) / calls)
    return Times(seconds)
