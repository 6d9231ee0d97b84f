"""Metrics against their definitions, and their edges."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.training.errors import ConfigError
from lora_jax.training.run.progress import format_metrics
from lora_jax.training.run.setup import choose_metric
from lora_jax.training.task import Classification, Regression

TWO = Classification(labels=("a", "b"))
NUMBER = Regression()


def test_classification_by_hand():
    # Predictions 0 0 1 1 1 against targets 0 1 1 1 0: one pair of mistakes.
    outputs = np.array([[2, 0], [1, 0], [0, 1], [0, 3], [0, 1]], np.float32)
    targets = np.array([0, 1, 1, 1, 0])
    found = TWO.measure(outputs, targets)
    assert found["accuracy"] == pytest.approx(3 / 5)
    # F1 of a: 2·1/(2+2); of b: 2·2/(3+3).
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Matthews: (tp·tn − fp·fn) / sqrt(...), with tp=2, tn=1, fp=1, fn=1.
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    probabilities = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(5), targets]).mean(), rel=1e-6)


def test_regression_by_hand():
    outputs, targets = np.array([1.0, 2.0, 4.0], np.float32), np.array([1.0, 3.0, 2.0], np.float32)
    found = NUMBER.measure(outputs, targets)
    assert found["pearson"] == pytest.approx(np.corrcoef(outputs, targets)[0, 1])
    assert found["spearman"] == pytest.approx(0.5)
    assert found["loss"] == pytest.approx((0 + 1 + 4) / 3)


def test_constant_outputs_have_no_correlation():
    found = NUMBER.measure(np.ones(3), np.arange(3, dtype=np.float32))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_correlation_with_constant_targets_is_undefined(rows):
    for outputs in (np.arange(rows), np.ones(rows)):
        found = NUMBER.measure(outputs, np.full(rows, 2.5, np.float32))
        assert (found["pearson"], found["spearman"]) == (None, None)
        assert found["loss"] == pytest.approx(np.mean((outputs - 2.5) ** 2))
        assert format_metrics(found) == f"pearson undefined  spearman undefined  loss {found['loss']:.3f}"


def test_predictions_of_one_label_have_a_matthews_of_zero():
    """As scikit-learn and GLUE have it; only one label in the targets is undefined."""
    assert TWO.measure(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))["matthews"] == 0.0
    assert TWO.measure(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1]))["matthews"] is None


def test_one_label_only_and_large_logits():
    found = TWO.measure(np.array([[1e4, 0.0], [1e4, 0.0]]), np.array([0, 0]))
    assert found == {"accuracy": 1.0, "macro_f1": 1.0, "matthews": None, "loss": 0.0}


def test_metric_must_be_of_the_task():
    assert TWO.check_metric("macro_f1") == "macro_f1"
    assert choose_metric(TWO, "matthews", np.array([0, 1])) == "matthews"
    assert choose_metric(TWO, None, np.array([1, 1])) == "accuracy"
    assert choose_metric(NUMBER, None, None) == "pearson"
    assert choose_metric(NUMBER, None, np.array([0.5])) == "loss"
    for task, name in ((TWO, "matthews"), (NUMBER, "pearson"), (NUMBER, "spearman")):
        with pytest.raises(ConfigError, match=rf"`metric` {name} is undefined on `dev`, .* choose `loss`"):
            choose_metric(task, name, np.array([1, 1, 1]))
    with pytest.raises(ConfigError, match=r"`metric` is 'accuracy', and a regression has pearson, spearman, loss"):
        NUMBER.check_metric("accuracy")
