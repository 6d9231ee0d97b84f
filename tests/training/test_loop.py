"""A whole run on a tiny base: what is learnt, what is written, what is refused, what survives."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files, optimizer
from lora_jax.training import CheckpointError, NotFiniteError, RunFolderError, TrainConfig, load_predictor, train
from lora_jax.training.config import resolve
from lora_jax.training.data.sources import read_examples
from lora_jax.training.errors import ConfigError
from lora_jax.training.run import loop
from lora_jax.training.run.checkpoint import Checkpoints
from lora_jax.training.run.events import Evaluated, Note, StepDone
from lora_jax.training.run.folder import RunFolder, held_alone
from lora_jax.training.run.setup import prepare_run
from lora_jax.training.task import Classification

from .test_checkpoint import threads_left_to_end


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
    run = prepare_run(TrainConfig(**options, output="out"), lambda event: None)
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


def counted_tokens(run):
    """What the last checkpoint says of all steps before it."""
    (file,) = (run / "checkpoints" / "step_40" / "progress").glob("metadata")
    return json.loads(file.read_text())["progress"]["meter"]["tokens"]


def test_interrupted_anywhere_it_ends_the_same(finished, options, tmp_path):
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    first, second = 13, 33  # within an epoch, and at the first step of one
    for step in (first, second):
        with pytest.raises(Interrupted):
            train(config, on_progress=interrupt_at(step))
    result = train(config)
    assert result.resumed_from == (second - 1) // 8 * 8, (first, second)
    assert_same_run(result.output, finished.output)
    assert result.metrics == finished.metrics
    assert [row["step"] for row in result.history] == [row["step"] for row in finished.history]
    assert result.padding_share == finished.padding_share
    assert counted_tokens(result.output) == counted_tokens(finished.output)


@pytest.mark.parametrize("method", ["full", "norms", "bitfit"])
def test_in_bfloat16_what_is_trained_moves_and_goes_on_after_an_interruption(method, options, data, tmp_path):
    """As in float32, though most steps are below the leaves' rounding. The leaves, rounded, are what is evaluated and
    saved: the adapter, loaded, scores what the run did."""
    options = {**options, "dev": None, "dtype": "bfloat16", "method": method, "lr": 1e-3, "accumulate": 2}
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    result = train(config)
    run = prepare_run(config, lambda event: None)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        state = checkpoints.restore(result.steps, run.state).state
    moved = []
    for (path, start), end, copy in zip(
        jax.tree_util.tree_leaves_with_path(run.state.trainable),
        *map(jax.tree.leaves, (state.trainable, state.optimizer.copies)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (end.dtype, copy.dtype) == ("bfloat16", "float32")
        np.testing.assert_allclose(np.asarray(end, np.float32), copy, rtol=2.0**-8, atol=1e-6)
        if not name.endswith(("key/bias", "embedding")):  # no gradient: under softmax, or of words that no text has
            moved.append((np.asarray(start, np.float32) != copy).mean())
    assert min(moved) == 1.0
    test = read_examples(data["test"], text="text", label="label")
    assert load_predictor(result.output).evaluate(test) == pytest.approx(result.metrics["test"], rel=1e-6)

    broken = TrainConfig(**options, output=str(tmp_path / "broken"))
    with pytest.raises(Interrupted):
        train(broken, on_progress=interrupt_at(19))
    assert train(broken).resumed_from == 16
    assert_same_run(tmp_path / "broken", result.output)


def test_a_bfloat16_run_of_before_there_were_copies_is_refused(options, tmp_path, monkeypatch):
    config = TrainConfig(**{**options, "dtype": "bfloat16", "method": "norms"}, output=str(tmp_path / "run"))
    with monkeypatch.context() as before:
        before.setattr(optimizer, "with_masters", lambda tx, moves: tx)
        # Optax adds bfloat16 gradients to float32 moments.
        with jax.numpy_dtype_promotion("standard"), pytest.raises(Interrupted):
            train(config, on_progress=interrupt_at(12))
    with pytest.raises(CheckpointError, match=r"step 8 in .* is of an earlier lora_jax, which .* lost small updates"):
        train(config)


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
    assert (result.metrics["dev"]["pearson"] or 0) > 0.7
    assert "accuracy" not in result.history[0]
    (prediction,) = load_predictor(result.output).predict(["the film was very good"])
    assert isinstance(prediction.label, float)
    assert prediction.probability is None


def test_a_dev_set_of_one_row_has_no_correlation(options, tmp_path):
    """Which is said, and no reason to lower the rate: the loss chooses, unless a correlation is asked for."""
    (tmp_path / "one.tsv").write_text("text\tscore\ngood\t1.5\n")
    chosen = {**options, "task": "regression", "label": "score", "pooling": "mean", "steps": 2, "eval_every": 1}
    chosen |= {"dev": str(tmp_path / "one.tsv"), "test": str(tmp_path / "one.tsv")}
    told = []
    result = train(TrainConfig(**chosen, output=str(tmp_path / "run")), on_progress=told.append)
    assert result.chosen == "best loss on dev"
    note = "dev: pearson is undefined, as all targets are equal; loss is used instead"
    assert note in [event.message for event in told if isinstance(event, Note)]
    for split in ("dev", "test"):
        assert (result.metrics[split]["pearson"], result.metrics[split]["spearman"]) == (None, None)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]["pearson"] is None
    assert [row["spearman"] for row in result.history if row["split"] == "dev"] == [None, None]
    with pytest.raises(ConfigError, match=r"`metric` spearman is undefined on `dev`"):
        train(TrainConfig(**chosen, metric="spearman", output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_dropout_rate_replaces_the_base_s(options, tmp_path):
    def loss(dropout):
        run = prepare_run(TrainConfig(**{**options, "dropout": dropout}, output="out"), lambda event: None)
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
    with pytest.raises(RunFolderError, match=r"must be a folder"):
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
    run = prepare_run(TrainConfig(**{**config.to_dict(), "train": str(tmp_path / "long.tsv")}), notes.append)
    messages = [note.message for note in notes if isinstance(note, Note)]
    assert "train: 1 of 2 texts truncated to 32 tokens" in messages
    assert "`max_length` 99 is more than the base's positions: 32 is used" in messages
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
    with pytest.raises(NotFiniteError, match=r"became (nan|inf) at step \d+ of 40.*lower `lr` than 1e\+38"):
        train(config)


@pytest.fixture
def run_again(finished, options, tmp_path):
    folder = Path(shutil.copytree(finished.output, tmp_path / "copy"))
    return folder, TrainConfig(**options, output=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "40"}, r"results\.json: `steps` can't be '40'"),
        ({"metrics": {"dev": 0.5}}, r"results\.json: `metrics` can't be"),
        ({"labels": "ab"}, r"results\.json: `labels` can't be 'ab'"),
        ({"percent": float("inf")}, r"results\.json: `percent` can't be inf"),
        ({"extra": 1}, r"results\.json has `extra`, which no run writes"),
        (None, r"results\.json must hold a JSON object, got a list"),
        ({"chosen": ...}, r"results\.json lacks `chosen`"),
    ],
)
def test_results_that_no_run_wrote_are_made_anew(run_again, finished, change, message):
    folder, config = run_again
    results = json.loads((folder / "results.json").read_text())
    del results["checksum"]
    results = [] if change is None else {k: v for k, v in {**results, **change}.items() if v is not ...}
    (folder / "results.json").write_text(json.dumps(results))
    notes: list[str] = []
    assert train(config, on_progress=lambda event: notes.append(str(event))).metrics == finished.metrics
    assert any("made anew from the checkpoint" in note and re.search(message, note) for note in notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl isn't the log of a run: line 1 is not UTF-8"),
        (
            "metrics.jsonl",
            b'{"split": "dev"}\n',
            r"metrics\.jsonl isn't the log of a run: line 1 is no object",
        ),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", r"metrics\.jsonl isn't the log of a run: line 1 is JSON nested"),
        ("config.yaml", b"epoch: 0\n", r"config\.yaml: 'epoch' is no option.*Fix the file, or choose another folder"),
        ("config.yaml", b"epochs: 1\nepochs: 2\n", r"config\.yaml.*`epochs` is there twice"),
    ],
)
def test_files_of_a_run_that_were_damaged_are_named(run_again, finished, name, content, message):
    """Of a complete run the log isn't needed."""
    folder, config = run_again
    (folder / name).write_bytes(content + (folder / name).read_bytes())
    if name == "config.yaml":
        with pytest.raises(RunFolderError, match=message):
            train(config)
        return
    notes: list[str] = []
    result = train(config, on_progress=lambda event: notes.append(str(event)))
    assert (result.metrics, result.history) == (finished.metrics, [])
    assert any("the log of this run can't be read" in note and re.search(message, note) for note in notes)


def test_what_an_interruption_left_of_the_log_is_left_out(run_again):
    folder, config = run_again
    whole = train(config).history
    for rest in (b'{"step": 4', b"\0" * 40):
        log = folder / "metrics.jsonl"
        kept = log.read_bytes()
        log.write_bytes(kept + rest)
        assert train(config).history == whole
        log.write_bytes(kept)


# What a run depends on.


def copied(options, folder: Path) -> dict:
    """The same run, of files that may be changed."""
    shutil.copytree(options["base"], folder / "base")
    for split in ("train", "dev", "test"):
        shutil.copy(options[split], folder / f"{split}.tsv")
    return {**options, "base": str(folder / "base")} | {s: str(folder / f"{s}.tsv") for s in ("train", "dev", "test")}


def edit_text(old: str, new: str):
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_one_weight(path: Path) -> None:
    held = files.read_safetensors(path)
    name = max(held, key=lambda name: held[name].size)
    held[name] = held[name].copy()
    held[name].reshape(-1)[3] += 1e-3  # none that the fingerprint of an adapter samples
    files.write_safetensors(path, held)


CHANGES = {
    "a weight of the base": ("base/model.safetensors", change_one_weight, r"another base: the weights of .*base have"),
    "its settings": ("base/config.json", edit_text("1e-12", "1e-6"), r"another base: the config.json of .*base has"),
    "its tokenizer": (
        "base/tokenizer.json",
        edit_text("film", "cinema"),
        r"another tokenizer: the tokenizer of .*base has",
    ),
    "the dev set cut": ("dev.tsv", cut, r"another dev set: .*dev.tsv has changed since"),
    "a label of dev": ("dev.tsv", edit_text("\tpos", "\tneg"), r"another dev set: .*dev.tsv has changed since"),
    "a label of train": (
        "train.tsv",
        edit_text("\tpos", "\tneg"),
        r"other training data: .*train.tsv has changed since",
    ),
    "a text of test": ("test.tsv", edit_text("good", "great"), r"another test set: .*test.tsv has changed since"),
}


@pytest.fixture(scope="module")
def begun(options, tmp_path_factory):
    """A run that was interrupted after a checkpoint, and one before; and the options of both."""
    folder = tmp_path_factory.mktemp("begun")
    mine = copied(options, folder)
    for name, step in (("late", 10), ("early", 3)):
        with pytest.raises(Interrupted):
            train(TrainConfig(**mine, output=str(folder / name)), on_progress=interrupt_at(step))
    return folder, mine


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_is_named_and_not_gone_on_with(case, begun):
    folder, mine = begun
    name, change, message = CHANGES[case]
    before = (folder / name).read_bytes()
    try:
        change(folder / name)
        for output in ("late", "early"):
            held = sorted((path, path.stat().st_mtime_ns) for path in (folder / output).rglob("*") if path.is_file())
            with pytest.raises(RunFolderError, match=rf"`output` .*{output} holds a run on .*{message}"):
                train(TrainConfig(**mine, output=str(folder / output)))
            after = sorted((path, path.stat().st_mtime_ns) for path in (folder / output).rglob("*") if path.is_file())
            assert after == held
    finally:
        (folder / name).write_bytes(before)


def test_options_that_were_changed_where_they_are_kept(begun, tmp_path):
    folder, mine = begun
    shutil.copytree(folder / "late", tmp_path / "run")
    edit_text("lr: 0.03", "lr: 0.05")(tmp_path / "run" / "config.yaml")
    with pytest.raises(RunFolderError, match="holds a run on other options: `lr` has changed since"):
        train(TrainConfig(**{**mine, "lr": 0.05}, output=str(tmp_path / "run")))
    edit_text("0.03", "0.05")(tmp_path / "run" / "run.json")
    with pytest.raises(files.FileError, match=r"run\.json isn't what its `checksum` was written for"):
        train(TrainConfig(**{**mine, "lr": 0.05}, output=str(tmp_path / "run")))


def test_it_goes_on_from_folders_of_earlier_versions(begun, finished, tmp_path):
    """They have no `run.json`, and progress without a checksum or the meter's window."""
    folder, mine = begun
    shutil.copytree(folder / "late", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "step_8" / "progress" / "metadata"
    progress = json.loads(path.read_text())["progress"]
    assert progress["iterator"] == {"next_index": 8}
    del progress["meter"]["window"]
    path.write_text(json.dumps(progress))
    result = train(TrainConfig(**mine, output=str(tmp_path / "run")))
    assert result.resumed_from == 8
    assert_same_run(result.output, finished.output)
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("anew", [{"new_head": True}, {"task": Classification(labels=("pos", "neg"))}])
def test_a_run_of_before_whose_labels_had_other_numbers_is_refused(anew, begun, tmp_path, monkeypatch):
    """It sorted the labels, and kept any head of their number."""
    folder, mine = begun
    shutil.copytree(folder / "late", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    monkeypatch.setattr(loop, "prepare_run", lambda *args: prepare_run(*args)._replace(**anew))
    with pytest.raises(RunFolderError, match=r"holds a run of an earlier version, which had the labels in another"):
        train(TrainConfig(**mine, output=str(tmp_path / "run")))


def test_other_versions_are_told(begun, tmp_path):
    folder, mine = begun
    shutil.copytree(folder / "late", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    content["versions"]["jax"] = "0.1"
    path.write_text(json.dumps(files.with_checksum(content)))
    notes = []

    def listen(event):
        if isinstance(event, Note):
            notes.append(event.message)
        interrupt_at(9)(event)

    with pytest.raises(Interrupted):
        train(TrainConfig(**mine, output=str(tmp_path / "run")), on_progress=listen)
    assert any("the last bits may differ: jax 0.1 is " in note for note in notes)
    content["formats"]["batches"] = 0
    path.write_text(json.dumps(files.with_checksum(content)))
    with pytest.raises(
        RunFolderError, match="another version of lora_jax: what it makes of the same inputs has changed"
    ):
        train(TrainConfig(**mine, output=str(tmp_path / "run")))


def test_the_log_is_that_of_a_run_in_one_go(begun, finished, tmp_path):
    """The first mean after a checkpoint, which may lie within a window, is of the whole window."""
    folder, mine = begun
    shutil.copytree(folder / "late", tmp_path / "run")
    result = train(TrainConfig(**mine, output=str(tmp_path / "run")))
    rows, whole = (
        [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in history]
        for history in (result.history, finished.history)
    )
    assert result.resumed_from == 8
    assert rows == whole


# Damage.


def checkpoint_files(output: Path, step: int, name: str) -> list[Path]:
    held = [path for path in (output / "checkpoints" / f"step_{step}").rglob(name) if path.is_file()]
    assert held
    return held


def reword(path: Path, change, *, sealed: bool) -> None:
    content = json.loads(path.read_text())
    change(content)
    if sealed:
        del content["checksum"]
    path.write_text(json.dumps(content))


DAMAGE = {
    "arrays gone": lambda output: [path.write_bytes(b"") for path in checkpoint_files(output, 16, "d/*")],
    "arrays of another step": lambda output: [
        shutil.rmtree(output / "checkpoints" / "step_16" / "arrays"),
        shutil.copytree(output / "checkpoints" / "step_8" / "arrays", output / "checkpoints" / "step_16" / "arrays"),
    ],
    "progress edited": lambda output: reword(
        checkpoint_files(output, 16, "progress/metadata")[0],
        lambda content: content["progress"]["iterator"].update(next_index=3),
        sealed=False,
    ),
    "no progress": lambda output: [
        path.write_bytes(b"{") for path in checkpoint_files(output, 16, "progress/metadata")
    ],
}


@pytest.fixture(scope="module")
def twice(options, tmp_path_factory):
    """A run that was interrupted after its second checkpoint, which is the best too."""
    output = tmp_path_factory.mktemp("twice") / "run"
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output=str(output)), on_progress=interrupt_at(17))
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_16", "step_8"]
    return output


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_has_one_before_it(case, twice, options, finished, tmp_path):
    shutil.copytree(twice, tmp_path / "run")
    DAMAGE[case](tmp_path / "run")
    notes: list[str] = []
    with threads_left_to_end():
        result = train(
            TrainConfig(**options, output=str(tmp_path / "run")),
            on_progress=lambda event: notes.append(event.message) if isinstance(event, Note) else None,
        )
    assert any(note.startswith("an earlier checkpoint is used: that of step 16 is damaged, ") for note in notes)
    assert "resuming from step 8 of 40" in notes
    assert result.resumed_from == 8
    assert_same_run(result.output, finished.output)
    assert result.metrics == finished.metrics


def test_a_run_whose_checkpoints_are_all_damaged(twice, options, tmp_path):
    shutil.copytree(twice, tmp_path / "run")
    for step in (8, 16):
        for path in checkpoint_files(tmp_path / "run", step, "progress/metadata"):
            path.write_bytes(b"{")
    with threads_left_to_end(), pytest.raises(CheckpointError, match=r"The checkpoint of step 8 in .* can't be read"):
        train(TrainConfig(**options, output=str(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_16")
    with (
        threads_left_to_end(),
        pytest.raises(CheckpointError, match=r"Delete its folder step_8 to start again, or choose another `output`"),
    ):
        train(TrainConfig(**options, output=str(tmp_path / "run")))


@pytest.mark.parametrize("position", [3, -1, 17, 1e300, "8", None, True])
def test_a_position_that_is_not_the_checkpoint_s(position, twice, options, tmp_path):
    """Without its checksum, as one who means a change would leave it."""
    shutil.copytree(twice, tmp_path / "run")
    for step in (8, 16):
        reword(
            checkpoint_files(tmp_path / "run", step, "progress/metadata")[0],
            lambda content: content["progress"]["iterator"].update(next_index=position),
            sealed=True,
        )
    with pytest.raises(RunFolderError, match=r"The checkpoint of step 16 .* was changed: its position in the data is"):
        train(TrainConfig(**options, output=str(tmp_path / "run")))


LOSSES = {
    "adapter": lambda run: shutil.rmtree(run / "adapter"),
    "tensors": lambda run: (run / "adapter" / "adapter.safetensors").unlink(),
    "tensors cut": lambda run: (run / "adapter" / "adapter.safetensors").write_bytes(b"1234"),
    "description": lambda run: (run / "adapter" / "lora_jax_adapter.json").write_text("{}"),
    "a number in it": lambda run: edit_text('"rank": 8', '"rank": 9')(run / "adapter" / "lora_jax_adapter.json"),
    "task": lambda run: (run / "adapter" / "task.json").unlink(),
    "labels swapped": lambda run: reword(
        run / "adapter" / "task.json", lambda content: content["labels"].reverse(), sealed=False
    ),
    "no results": lambda run: (run / "results.json").write_text("{}"),
    "no object": lambda run: (run / "results.json").write_text("[]"),
    "half of the results": lambda run: (run / "results.json").write_text('{"metrics": {'),
    "better results": lambda run: reword(
        run / "results.json", lambda content: content["metrics"]["test"].update(accuracy=1.01), sealed=False
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_is_lost_of_a_complete_run_is_made_anew(case, options, finished, tmp_path):
    shutil.copytree(finished.output, tmp_path / "run")
    LOSSES[case](tmp_path / "run")
    notes: list[str] = []
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    result = train(config, on_progress=lambda event: notes.append(str(event)))
    assert any("made anew from the checkpoint" in note for note in notes)
    assert result.metrics == finished.metrics
    for name in ("adapter.safetensors", "lora_jax_adapter.json", "task.json"):
        assert (result.adapter / name).read_bytes() == (finished.adapter / name).read_bytes()
    assert train(config) == result


def test_another_adapter_in_place_of_that_of_a_run_is_left_alone(options, finished, tmp_path):
    shutil.copytree(finished.output, tmp_path / "run")
    lj.save_adapter(tmp_path / "run" / "adapter", {"w": jax.numpy.ones(2)}, lj.FullFineTune())
    before = tensors(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"isn't the adapter of the run in .*run\. Move it elsewhere"):
        train(TrainConfig(**options, output=str(tmp_path / "run")))
    assert tensors(tmp_path / "run").keys() == before.keys()


def test_a_complete_run_on_data_that_has_changed(finished, options, tmp_path):
    mine = copied(options, tmp_path)
    config = TrainConfig(**{**mine, "epochs": 1}, output=str(tmp_path / "run"))
    result = train(config)
    path = tmp_path / "dev.tsv"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\n", b"\r\n"))  # the same rows
    assert train(config) == result
    cut(path)
    with pytest.raises(RunFolderError, match=r"holds a run on another dev set: .*dev.tsv has changed since"):
        train(config)
    path.unlink()  # it isn't needed any more
    assert train(config) == result


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"3\n", b'{"step": 8}\n{\n{"step": 16}\n', b'{"split": "dev"}\n'])
def test_a_log_that_is_none(content, twice, options, tmp_path):
    shutil.copytree(twice, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl isn't the log of a run: .*remove it to resume without"):
        train(TrainConfig(**options, output=str(tmp_path / "run")))


def test_a_folder_belongs_to_one_process_at_a_time(twice, options, tmp_path):
    shutil.copytree(twice, tmp_path / "run")
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    with held_alone(tmp_path / "run"), pytest.raises(RunFolderError, match=r"run is in use by process \d+ on .*: wait"):
        train(config)
    told = []

    def listen(event):
        if isinstance(event, StepDone) and not told:
            with pytest.raises(RunFolderError, match="is in use by process") as caught:
                train(config)
            told.append(caught.value)
            raise Interrupted

    for output in (tmp_path / "run", tmp_path / "new"):  # one that goes on, and one that begins
        told.clear()
        config = TrainConfig(**options, output=str(output))
        with pytest.raises(Interrupted):
            train(config, on_progress=listen)
        assert told
        assert not (output / ".lora_jax.lock").exists()


def test_two_that_begin_in_one_folder(options, tmp_path):
    """The one that comes second, having read all its data, finds the first's."""
    config = TrainConfig(**options, output=str(tmp_path / "run"))
    other = TrainConfig(**{**options, "seed": 1}, output=str(tmp_path / "run"))
    mine, second = RunFolder(resolve(config)), RunFolder(resolve(other))
    with mine, second:
        mine.start()
        with pytest.raises(RunFolderError, match="is in use by process"):
            second.start()
    with pytest.raises(RunFolderError, match=r"holds another run: `seed` is 0 there and 1 here"), second:
        second.start()


@pytest.mark.parametrize("name", ["train", "output", "base"])
def test_names_that_are_not_utf8(name, options):
    with pytest.raises(ConfigError, match=rf"`{name}` 'r\\udcff' isn't UTF-8: rename it, or set `PYTHONUTF8=1`"):
        TrainConfig(**{**options, "output": "run", name: "r\udcff"})
