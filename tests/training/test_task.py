"""Labels, targets and losses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training.errors import ConfigError, DataError
from lora_jax.training.examples import Examples
from lora_jax.training.task import Classification, Regression, make_task


def examples(*labels):
    return Examples("dev.tsv", ["a"] * len(labels), None, list(labels))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([1, 0, 2], ("0", "1", "2")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["1", "x"], ("1", "x")),
    ],
)
def test_vocabulary_is_sorted(labels, expected):
    task = make_task("classification", examples(*labels))
    assert task.labels == expected
    assert task.num_labels == len(expected)
    assert [task.labels[i] for i in task.encode(examples(*labels))] == [
        str(label).lower() if isinstance(label, bool) else str(int(label)) if isinstance(label, float) else str(label)
        for label in labels
    ]


def test_unknown_label_names_the_row_and_the_nearest():
    task = make_task("classification", examples("question", "praise"))
    with pytest.raises(
        DataError,
        match=r"dev\.tsv, row 2 has the label 'questoin', which the training data lacks \(nearest: 'question'\)",
    ):
        task.encode(examples("praise", "questoin"))


def test_all_bad_labels_are_reported_at_once():
    task = make_task("classification", examples("question", "praise"))
    told = r"dev\.tsv has 2 bad rows: row 1 .* 'x', .* \(it has 'praise', 'question'\); row 3 .* 'praize'"
    with pytest.raises(DataError, match=told):
        task.encode(examples("x", "praise", "praize"))
    with pytest.raises(DataError, match=r"has 2 bad rows: row 1 has the label 0\.5, .*; row 3 has the label 1\.5"):
        make_task("classification", examples(0.5, 1.0, 1.5))


def test_one_label_is_not_enough():
    with pytest.raises(DataError, match=r"has only the label 'x': two or more"):
        make_task("classification", examples("x", "x"))


def test_fractions_are_no_classes():
    with pytest.raises(DataError, match=r"row 2 has the label 0\.5, .*task='regression'"):
        make_task("classification", examples(1.0, 0.5))


def test_regression_targets():
    task = make_task("regression", examples("1", "2.5"))
    assert task.num_labels is None
    np.testing.assert_array_equal(task.encode(examples("1", 2.5)), np.array([1, 2.5], np.float32))
    limit = float(np.finfo(np.float32).max)
    assert np.isfinite(task.encode(examples(limit, -limit))).all()
    for bad in ("high", "nan", "inf", 1e39, "-1e39", 10**400, "1e400", float("nan")):
        with pytest.raises(
            DataError, match=r"row 2 has the label .*, but a regression needs a finite number, .* 3.4e\+38"
        ):
            task.encode(examples("1", bad))


def test_unknown_kind():
    with pytest.raises(ConfigError, match=r"`task` must be one of classification, regression, .*got 'ranking'"):
        make_task("ranking", examples("a", "b"))


def test_losses_are_those_of_the_formula():
    task = Classification(labels=("a", "b", "c"))
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], np.float32)
    targets = np.array([1, 0])
    expected = -np.log(np.exp(logits)[[0, 1], targets] / np.exp(logits).sum(-1))
    np.testing.assert_allclose(task.losses(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-6)
    np.testing.assert_array_equal(task.correct(jnp.asarray(logits), jnp.asarray(targets)), [1.0, 0.0])

    task = Regression()
    np.testing.assert_allclose(task.losses(jnp.array([1.0, 3.0]), jnp.array([0.0, 5.0])), [1.0, 4.0])
