"""What one answer to every text scores: each score of a model has to be held against it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .metrics import better
from .task import LabelledTask


class Baseline(NamedTuple):
    """The best answer of who reads no text, and what it scores.

    Attributes:
        answer: In words: `"'no'"`, the most frequent label of the training rows, or `"the mean, 2.5"`.
        metrics: On the rows that a model is scored on.
    """

    answer: str
    metrics: dict[str, float]

    def is_beaten(self, metric: str, value: float | None, *, by: float = 0.0) -> bool:
        """Whether a score is better, and by more than so much; an undefined one isn't."""
        if value is None or math.isnan(value):
            return False
        return better(metric, value) - better(metric, self.metrics[metric]) > by + 1e-9

    def is_tied(self, metric: str, value: float | None) -> bool:
        return value is not None and math.isclose(value, self.metrics[metric], abs_tol=1e-9)


def baseline_of(task: LabelledTask, prior: np.ndarray, targets: np.ndarray) -> Baseline:
    """The baseline on some rows.

    Args:
        task: Says what is answered, and has the metrics.
        prior: Of the training rows, see `LabelledTask.prior`.
        targets: Of the rows to score.

    Example:
        >>> from lora_jax.training.task import Classification
        >>> task = Classification(labels=("no", "yes"))
        >>> found = baseline_of(task, np.array([0.75, 0.25]), np.array([0, 1]))
        >>> found.answer, found.metrics["accuracy"], round(found.metrics["loss"], 2)
        ("'no'", 0.5, 0.84)
    """
    return Baseline(task.answer(prior), task.measure_prior(prior, targets))
