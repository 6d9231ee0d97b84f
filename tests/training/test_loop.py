"""A whole run on a tiny base: what is learnt, what is written, what is refused, what survives."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.training import (
    NotFiniteError,
    RunFolderError,
    TrainConfig,
    load_predictor,
    loop,
    train,
)
from lora_jax.training.data import read_examples
from lora_jax.training.events import Evaluated, Note, StepDone
from lora_jax.training.setup import prepare
from lora_jax.training.task import Classification


class Interrupted(Exception):
    pass


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return files.read_safetensors(folder / "adapter" / "adapter.safetensors")


def assert_same_run(ours: Path, theirs: Path) -> None:
    mine, other = tensors(ours), tensors(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_tiny_model_learns(finished):
    assert finished.metrics["dev"]["accuracy"] >= 0.9
    assert finished.metrics["test"]["accuracy"] >= 0.9
    assert finished.chosen == "best accuracy on dev"
    assert finished.steps == 5 * -(-60 // 8)
    assert finished.labels == ("neg", "pos")
    assert finished.resumed_from is None
    assert finished.truncated == {"train": 0, "dev": 0, "test": 0}


def test_padding_is_what_the_batches_hold(finished, options):
    run = prepare(TrainConfig(**options, output="out"), lambda event: None)
    batches = [run.batches.batch(step) for step in range(run.steps)]
    tokens = sum(batch.tokens for batch in batches)
    assert tokens == 5 * run.splits["train"].lengths.sum()
    assert finished.padding_share == pytest.approx(
        1 - tokens / sum(batch.inputs["input_ids"].size for batch in batches)
    )


def test_the_folder_of_a_run(finished):
    assert sorted(path.name for path in finished.output.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "run.json",
    ]
    assert sorted(path.name for path in finished.adapter.iterdir()) == [
        "adapter.safetensors",
        "lora_jax_adapter.json",
        "task.json",
    ]
    results = json.loads((finished.output / "results.json").read_text())
    assert results["metrics"] == finished.metrics
    assert results["adapter_bytes"] == (finished.adapter / "adapter.safetensors").stat().st_size
    rows = [json.loads(line) for line in (finished.output / "metrics.jsonl").read_text().splitlines()]
    assert rows == finished.history
    assert [row["step"] for row in rows if row["split"] == "dev"] == [8, 16, 24, 32, 40]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(5, 41, 5))
    assert rows[-2]["loss"] < rows[0]["loss"]


def test_what_is_reported_is_what_the_adapter_scores(finished, data):
    predictor = load_predictor(finished.output)
    test = read_examples(data["test"], text="text", label="label")
    assert predictor.evaluate(test) == pytest.approx(finished.metrics["test"], rel=1e-5)


def test_a_complete_run_is_not_done_again(finished, options):
    notes = []
    again = train(TrainConfig(**options, output=str(finished.output)), on_progress=notes.append)
    assert again == finished
    assert len(notes) == 1
    assert "complete" in notes[0].message


def test_a_complete_run_from_before_waiting_was_measured_is_read(finished, options, tmp_path):
    shutil.copytree(finished.output, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    saved = json.loads(path.read_text())
    del saved["waiting_share"], saved["adapter_checksum"], saved["checksum"]  # nor were there these
    path.write_text(json.dumps(saved))
    again = train(TrainConfig(**options, output=str(tmp_path / "run")))
    assert again.waiting_share is None
    assert again.metrics == finished.metrics


def test_events(options, tmp_path):
    events = []
    config = TrainConfig(**{**options, "epochs": 1, "tensorboard": True}, output=str(tmp_path / "run"))
    train(config, on_progress=events.append)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, 9))
    assert all(event.steps == 8 and event.accuracy is not None for event in steps)
    assert steps[-1].tokens_per_second is not None
    assert steps[-1].seconds_left == 0
    assert [(e.split, e.best) for e in events if isinstance(e, Evaluated)] == [("dev", True), ("test", None)]
    assert any("trainable" in event.message for event in events if isinstance(event, Note))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def interrupt_at(step):
    def listen(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Interrupted

    return listen


def test_interrupted_anywhere_it_ends_the_same(finished, options, tmp_path):
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    first = random.SystemRandom().randint(1, 20)
    second = random.SystemRandom().randint(21, 40)
    for step in (first, second):
        with pytest.raises(Interrupted):
            train(config, on_progress=interrupt_at(step))
    result = train(config)
    assert result.resumed_from == (second - 1) // 8 * 8, (first, second)
    assert_same_run(result.output, finished.output)
    assert result.metrics == finished.metrics
    assert [row["step"] for row in result.history] == [row["step"] for row in finished.history]
    assert result.padding_share == finished.padding_share


def test_best_checkpoint_is_the_adapter(options, tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(Classification, "measure", lambda *args: {"accuracy": next(scores, 0.1), "loss": 1.0})
    result = train(TrainConfig(**{**options, "test": None, "epochs": 3}, output=str(tmp_path / "run")))
    assert (result.chosen_step, result.metrics["dev"]["accuracy"]) == (16, 0.9)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_16", "step_24"]


def test_without_dev_the_last_is_taken(options, tmp_path):
    result = train(TrainConfig(**{**options, "dev": None, "test": None, "epochs": 1}, output=str(tmp_path / "run")))
    assert (result.chosen, result.chosen_step, result.metrics) == ("last", 8, {})


@pytest.mark.parametrize("method", ["frozen", "bitfit", "full"])
def test_every_method_goes_through(method, options, data, tmp_path):
    config = TrainConfig(**{**options, "method": method, "steps": 2, "dev": None}, output=str(tmp_path / "run"))
    result = train(config)
    test = read_examples(data["test"], text="text", label="label")
    assert load_predictor(result.output).evaluate(test) == pytest.approx(result.metrics["test"], rel=1e-5)


def test_regression(options, data, tmp_path):
    chosen = {**options, "task": "regression", "label": "score", "pooling": "mean", "test": None}
    result = train(TrainConfig(**chosen, output=str(tmp_path / "run")))
    assert result.chosen == "best pearson on dev"
    assert result.metrics["dev"]["pearson"] > 0.7
    assert "accuracy" not in result.history[0]
    (prediction,) = load_predictor(result.output).predict(["the film was very good"])
    assert isinstance(prediction.label, float)
    assert prediction.probability is None


def test_dropout_rate_replaces_the_base_s(options, tmp_path):
    def loss(dropout):
        run = prepare(TrainConfig(**{**options, "dropout": dropout}, output="out"), lambda event: None)
        batch = run.batches.batch(0)
        params = lj.combine(run.state.trainable, run.frozen)
        return np.asarray(run.apply(params, **batch.inputs, dropout_key=jax.random.key(0)))

    assert not np.array_equal(loss(0.5), loss(None))
    np.testing.assert_array_equal(loss(0.1), loss(None))  # the tiny base's own rates


def test_another_run_in_the_folder_is_refused(finished, options):
    config = TrainConfig(**{**options, "seed": 5, "lr": 0.5}, output=str(finished.output))
    with pytest.raises(
        RunFolderError, match=r"holds another run: `lr` is 0\.03 there and 0\.5 here; `seed` is 0 there and 5 here"
    ):
        train(config)


def test_other_files_in_the_folder_are_left_alone(options, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"holds other files \(thesis\.tex\): choose a new or an empty folder"):
        train(TrainConfig(**options, output=str(tmp_path)))
    with pytest.raises(RunFolderError, match=r"is a file, and a folder is expected"):
        train(TrainConfig(**options, output=str(tmp_path / "thesis.tex")))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_data_leaves_no_folder(options, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.tsv doesn't exist"):
        train(TrainConfig(**{**options, "dev": str(tmp_path / "gone.tsv")}, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_unknown_label_in_dev_is_named(options, tmp_path):
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\tpos\nbad\tngetaive\n")
    with pytest.raises(ValueError, match=r"dev\.tsv, row 2 has the label 'ngetaive'"):
        train(TrainConfig(**{**options, "dev": str(tmp_path / "dev.tsv")}, output=str(tmp_path / "run")))


def test_changed_data_does_not_go_on(options, data, tmp_path):
    (tmp_path / "train.tsv").write_text(Path(data["train"]).read_text())
    config = TrainConfig(**{**options, "train": str(tmp_path / "train.tsv")}, output=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        train(config, on_progress=interrupt_at(10))
    (tmp_path / "train.tsv").write_text(Path(data["train"]).read_text().replace("good", "great"))
    with pytest.raises(RunFolderError, match=r"holds a run on other training data: .*train\.tsv has changed since"):
        train(config)


def test_long_texts_are_reported(options, tmp_path):
    notes = []
    config = TrainConfig(**{**options, "max_length": 99}, output=str(tmp_path / "run"))
    (tmp_path / "long.tsv").write_text("text\tlabel\n" + "good " * 50 + "\tpos\nbad\tneg\n")
    run = prepare(TrainConfig(**{**config.to_dict(), "train": str(tmp_path / "long.tsv")}), notes.append)
    messages = [note.message for note in notes if isinstance(note, Note)]
    assert "train: 1 of 2 texts cut at 32 tokens" in messages
    assert "`max_length` 99 is more than the base's positions: 32 are used" in messages
    assert run.splits["train"].truncated == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_at_once_and_keeps_the_last_good_checkpoint(what, options, tmp_path, monkeypatch):
    make = loop.make_step

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def run(state, frozen, batch, key):
            number = int(state.step) + 1
            state, output = step(state, frozen, batch, key)
            if number == 11:
                bad = np.float32(np.nan)
                state = state._replace(trainable=jax.tree.map(lambda x: x * bad, state.trainable))
                output = output._replace(grad_norm=output.grad_norm * bad)
                if what == "loss":
                    output = output._replace(loss=output.loss * bad)
            return state, output

        return run

    monkeypatch.setattr(loop, "make_step", poisoned)
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    message = r"The (loss|gradient's norm) became nan at step 11 of 40, .*the checkpoint of step 8 is kept"
    with pytest.raises(NotFiniteError, match=message) as caught:
        train(config)
    assert caught.value.step == 11
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_8"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_learning_rate_that_explodes(options, tmp_path):
    config = TrainConfig(**{**options, "lr": 1e38, "clip_norm": None, "warmup": 0.0}, output=str(tmp_path / "run"))
    with pytest.raises(NotFiniteError, match=r"became (nan|inf) at step \d+ of 40.*lower `lr` \(it is 1e\+38\)"):
        train(config)
