"""The scores of one answer to all texts, which a model has to beat."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .metrics import better
from .task import LabelledTask


class Baseline(NamedTuple):
    """The best single answer to all texts, and its scores.

    Attributes:
        answer: Answer in words: `"'no'"`, the most frequent training label, or `"the mean, 2.5"`.
        metrics: Metrics on the examples that a model is scored on.
    """

    answer: str
    metrics: dict[str, float]

    def is_beaten(self, metric: str, value: float | None, *, by: float = 0.0) -> bool:
        """Whether a score is better by more than `by`; an undefined one isn't."""
        if value is None or math.isnan(value):
            return False
        return better(metric, value) - better(metric, self.metrics[metric]) > by + 1e-9

    def is_tied(self, metric: str, value: float | None) -> bool:
        return value is not None and math.isclose(value, self.metrics[metric], abs_tol=1e-9)


def baseline_of(task: LabelledTask, prior: np.ndarray, targets: np.ndarray) -> Baseline:
    """Computes the baseline of some examples.

    Args:
        task: Task with the metrics.
        prior: Prior of the training examples, see `LabelledTask.prior`.
        targets: Targets of the examples to score.

    Example:
        >>> from lora_jax.training.task import Classification
        >>> task = Classification(labels=("no", "yes"))
        >>> found = baseline_of(task, np.array([0.75, 0.25]), np.array([0, 1]))
        >>> found.answer, found.metrics["accuracy"], round(found.metrics["loss"], 2)
        ("'no'", 0.5, 0.84)
    """
    return Baseline(task.answer(prior), task.measure_prior(prior, targets))
