"""Every score stands beside what one answer to all texts scores."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.training import TrainConfig, train
from lora_jax.training.baseline import Baseline, baseline_of
from lora_jax.training.config_file import read_yaml
from lora_jax.training.run.events import Evaluated
from lora_jax.training.run.progress import verdict
from lora_jax.training.task import Classification, Regression

THREE = Classification(labels=("a", "b", "c"))


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_a_classification_by_hand():
    prior = THREE.prior(np.array([0, 1, 1, 1, 1, 2, 2, 0]))
    np.testing.assert_allclose(prior, [0.25, 0.5, 0.25])
    found = baseline_of(THREE, prior, np.array([0, 1, 1, 2]))
    assert found.answer == "'b'"
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx((2 * 2 / (2 * 2 + 2)) / 3)
    assert found.metrics["matthews"] == 0.0
    assert found.metrics["loss"] == pytest.approx((np.log(4) + 2 * np.log(2) + np.log(4)) / 4)


def test_the_loss_on_the_training_rows_is_the_entropy_of_their_labels():
    targets = np.array([0] * 7 + [1] * 2 + [2])
    shares = np.array([0.7, 0.2, 0.1])
    found = baseline_of(THREE, THREE.prior(targets), targets)
    assert found.metrics["loss"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_a_majority_elsewhere_doesn_t_help():
    """The answer is that of the training rows, whatever the scored ones hold."""
    found = baseline_of(THREE, THREE.prior(np.array([0, 0, 1, 2])), np.array([1, 1, 1, 0]))
    assert (found.answer, found.metrics["accuracy"]) == ("'a'", 0.25)


def test_a_regression_by_hand():
    task = Regression()
    found = baseline_of(task, task.prior(np.array([1.0, 2.0, 6.0], np.float32)), np.array([2.0, 4.0], np.float32))
    assert found.answer == "the mean, 3"
    assert found.metrics == {"pearson": 0.0, "spearman": 0.0, "loss": 1.0}


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("accuracy", 0.91, None),
        ("accuracy", 0.9, "no better than always answering 'a': tied at accuracy 90.0 %"),
        ("accuracy", 0.5, "no better than always answering 'a': accuracy 50.0 % against 90.0 %"),
        ("loss", 0.3, None),
        ("loss", 0.5, "no better than always answering 'a': loss 0.500 against 0.400"),
        ("matthews", float("nan"), "no better than always answering 'a': matthews nan % against 0.0 %"),
        ("matthews", None, "no better than always answering 'a': matthews undefined against 0.0 %"),
    ],
)
def test_what_is_no_better_is_said(metric, value, said):
    baseline = Baseline("'a'", {"accuracy": 0.9, "matthews": 0.0, "loss": 0.4})
    assert verdict(baseline, metric, value) == said


def test_a_run_tells_and_keeps_it(finished, options, data, tmp_path):
    assert {split: held.metrics["accuracy"] for split, held in finished.baselines.items()} == {"dev": 0.5, "test": 0.5}
    saved = json.loads((finished.output / "results.json").read_text())
    assert saved["baselines"]["test"]["answer"] == "'neg'"
    config = TrainConfig(**read_yaml(finished.output / "config.yaml"))
    assert train(config).baselines == finished.baselines  # read again, as it is complete

    events = []
    train(TrainConfig(**{**options, "steps": 1}, output=str(tmp_path / "run")), on_progress=events.append)
    told = [event.baseline for event in events if isinstance(event, Evaluated)]
    assert [baseline.answer for baseline in told if baseline is not None] == ["'neg'"] * 2


def test_results_of_before_are_read(finished, options, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output, folder)
    results = json.loads((folder / "results.json").read_text())
    for name in ("baselines", "metric", "checksum", "adapter_checksum"):
        del results[name]
    (folder / "results.json").write_text(json.dumps(results))
    again = train(TrainConfig(**{**read_yaml(folder / "config.yaml"), "output": str(folder)}))
    assert (again.baselines, again.metric, again.metrics) == ({}, None, finished.metrics)


def test_the_commands_print_it(base, data, tmp_path, capsys):
    """A rate of nearly nothing: the head answers as it was drawn."""
    flags = ("--train", data["train"], "--dev", data["dev"], "--base", base, "--steps", 1, "--lr", 1e-9)
    assert run("train", *flags, "--buckets", 1, "--output", tmp_path / "run") == 0
    text = capsys.readouterr()
    assert "labels: 'neg' 30, 'pos' 30" in text.err
    assert "(always 'neg': accuracy 50.0 %)" in text.err
    assert "dev baseline    accuracy 50.0 %" in text.out
    score = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["dev"]["accuracy"]
    assert ("dev warning     no better than always answering 'neg'" in text.out) == (score <= 0.5)

    # What is answered is the majority of the training rows, though here all are of the other label.
    (tmp_path / "pos.tsv").write_text("text\tlabel\n" + "good film\tpos\n" * 4)
    assert run("eval", "--adapter", tmp_path / "run", "--test", tmp_path / "pos.tsv", "--json") == 0
    baseline = json.loads(capsys.readouterr().out)["baseline"]
    assert (baseline["answer"], baseline["metrics"]["accuracy"]) == ("'neg'", 0.0)


def test_predictions_of_eval_are_those_of_predict(finished, data, tmp_path, capsys, monkeypatch):
    path = tmp_path / "predicted.jsonl"
    assert run("eval", "--adapter", finished.output, "--test", data["test"], "--predictions", path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["given_label"] for row in rows] == ["neg", "pos"] * 6
    assert all(list(row) == ["text", "given_label", "label", "probability"] for row in rows)
    capsys.readouterr()
    lines = "".join(json.dumps({"text": row["text"], "label": row["given_label"]}) + "\n" for row in rows)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run("predict", "--adapter", finished.output, "--jsonl") == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in again] == [row["label"] for row in rows]
    (tmp_path / "odd.tsv").write_text("probability\tlabel\ngood\tpos\nbad\tneg\n")
    flags = ("--adapter", finished.output, "--test", tmp_path / "odd.tsv", "--text", "probability")
    assert run("eval", *flags, "--predictions", path) == 0
    assert [json.loads(line)["given_probability"] for line in path.read_text().splitlines()] == ["good", "bad"]


def test_predictions_of_a_regression_on_pairs(options, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"a": f"good {word}", "b": "bad", "y": number}) + "\n" for number, word in enumerate("xyz"))
    )
    chosen = {**options, "task": "regression", "text": "a", "text_pair": "b", "label": "y", "steps": 1}
    chosen |= {"train": str(tmp_path / "rows.jsonl"), "dev": None, "test": None}
    result = train(TrainConfig(**chosen, output=str(tmp_path / "run")))
    path = tmp_path / "out.jsonl"
    assert (
        run("eval", "--adapter", result.output, "--test", tmp_path / "rows.jsonl", "--predictions", path, "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["baseline"]["answer"] == "the mean, 1"
    (tmp_path / "one.jsonl").write_text('{"a": "good x", "b": "bad", "y": 1}\n')  # what doesn't vary
    assert run("eval", "--adapter", result.output, "--test", tmp_path / "one.jsonl") == 0
    shown = capsys.readouterr().out
    assert "pearson undefined" in shown
    assert "undefined against" not in shown
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["a"], first["b"], first["given_label"]) == ("good x", "bad", 0)
    assert isinstance(first["label"], float)
