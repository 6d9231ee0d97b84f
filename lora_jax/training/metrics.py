"""Metrics of predictions: scikit-learn's, SciPy's and perplexity. Rates are between 0 and 1."""

from __future__ import annotations

import math
import warnings

import numpy as np

LOWER_IS_BETTER = ("loss", "perplexity")
_OF_VARIATION = ("matthews", "pearson", "spearman")


def better(metric: str, value: float) -> float:
    """A number that is larger the better the metric is."""
    return -value if metric in LOWER_IS_BETTER else value


def is_undefined(metric: str, targets: np.ndarray) -> bool:
    """Whether a metric is undefined for these targets: a correlation with targets that don't vary."""
    return metric in _OF_VARIATION and np.ptp(targets) == 0


def classification_metrics(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """`accuracy`, `macro_f1` (mean of F1 over the labels that occur in targets or predictions), `matthews`, `loss`.

    `matthews` is `None`, undefined, where all targets are the same; 0 where all predictions are.

    Args:
        outputs: Logits `(rows, labels)`.
        targets: Indices of the labels, `(rows,)`.
    """
    from sklearn import metrics

    outputs = outputs.astype(np.float64)
    predicted = outputs.argmax(-1)
    shifted = outputs - outputs.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single label in a small file
        matthews = metrics.matthews_corrcoef(targets, predicted)
    return {
        "accuracy": float(metrics.accuracy_score(targets, predicted)),
        "macro_f1": float(metrics.f1_score(targets, predicted, average="macro")),
        "matthews": None if is_undefined("matthews", targets) else float(matthews),
        "loss": float(-log_probabilities[np.arange(len(targets)), targets].mean()),
    }


def regression_metrics(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """`pearson`, `spearman` and `loss`, the mean square.

    The correlations are `None`, undefined, where all targets are the same (in a single row, say); 0 where all outputs
    are, which follow nothing.

    Args:
        outputs, targets: Numbers, `(rows,)`.
    """
    from scipy import stats

    outputs = outputs.astype(np.float64)
    correlations = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    measured: dict[str, float | None] = {}
    for name, correlation in correlations.items():
        if is_undefined(name, targets):
            measured[name] = None
        else:
            measured[name] = float(correlation(outputs, targets)[0]) if np.ptp(outputs) else 0.0
    return measured | {"loss": float(np.mean((outputs - targets) ** 2))}


def language_metrics(sums: np.ndarray) -> dict[str, float | None]:
    """`perplexity`, `token_accuracy` and `loss`, the mean `-log p` (natural) of the target tokens.

    Args:
        sums: Sums over the target tokens of each row, `(rows, 3)`: `-log p`, the tokens that were the most probable,
            and all.

    Example:
        >>> language_metrics(np.array([[0.0, 1.0, 1.0], [3 * math.log(4), 0.0, 2.0]]))["perplexity"]
        4.0
    """
    loss, correct, count = sums.astype(np.float64).sum(axis=0)
    mean = loss / count
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": perplexity, "token_accuracy": float(correct / count), "loss": float(mean)}
