"""The measures of a prediction, from scikit-learn. Rates are shares between 0 and 1."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .errors import ConfigError
from .task import Task

CLASSIFICATION = ("accuracy", "macro_f1", "matthews")
REGRESSION = ("pearson", "spearman")


def default_metric(task: Task) -> str:
    return "pearson" if task.is_regression else "accuracy"


def check_metric(name: str, task: Task) -> str:
    """`name`, if the task has such a metric."""
    names = (*(REGRESSION if task.is_regression else CLASSIFICATION), "loss")
    if name not in names:
        raise ConfigError(f"`metric` is {name!r}, and a {task.kind} has {', '.join(names)}.")
    return name


def better(metric: str, value: float) -> float:
    """A number that is larger the better the metric is."""
    return -value if metric == "loss" else value


def measure(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The metrics of a task, and the mean loss over rows.

    Args:
        task: whose metrics.
        outputs: logits `(rows, labels)`, or numbers `(rows,)` for a regression.
        targets: `(rows,)`.

    Returns:
        `accuracy`, `macro_f1` (mean of F1 over the labels that occur in targets or predictions), `matthews` and
        `loss`; or `pearson`, `spearman` and `loss`. A correlation with a constant is undefined and given as 0.
    """
    from scipy import stats
    from sklearn import metrics

    outputs = outputs.astype(np.float64)
    if task.is_regression:
        constant = min(np.ptp(outputs), np.ptp(targets)) == 0
        correlations: dict[str, Any] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
        return {
            **{name: 0.0 if constant else float(f(outputs, targets)[0]) for name, f in correlations.items()},
            "loss": float(np.mean((outputs - targets) ** 2)),
        }
    predicted = outputs.argmax(-1)
    shifted = outputs - outputs.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single label in a small file
        matthews = metrics.matthews_corrcoef(targets, predicted)
    return {
        "accuracy": float(metrics.accuracy_score(targets, predicted)),
        "macro_f1": float(metrics.f1_score(targets, predicted, average="macro")),
        "matthews": float(matthews),
        "loss": float(-log_probabilities[np.arange(len(targets)), targets].mean()),
    }
