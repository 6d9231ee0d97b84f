"""Predictions from a saved adapter."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.cli.main import main
from lora_jax.files import FileError
from lora_jax.inference.classify import Predictor, load_run_adapter
from lora_jax.models import load_tokenizer
from lora_jax.tools.merge import merge_adapter
from lora_jax.training import TrainConfig, TrainingError, load_predictor, train
from lora_jax.training.task_file import read_task

TEXTS = ["good great", "the plot bad poor hate", "love good", "poor " * 40, "great thanks"]


@pytest.fixture(scope="module")
def predictor(finished):
    return load_predictor(finished.output)


def test_labels_and_probabilities(predictor):
    found = predictor.predict(TEXTS)
    labels = [prediction.label for prediction in found]
    assert (labels[0], labels[1], labels[4]) == ("pos", "neg", "pos")
    for prediction in found:
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert prediction.probability == max(prediction.probabilities)


def test_order_and_company_do_not_matter(predictor):
    together = predictor.outputs(TEXTS)
    for text, output in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(predictor.outputs([text])[0], output, atol=1e-5)
    assert predictor.predict([]) == []


def test_run_folder_and_adapter_folder_are_the_same(finished, predictor):
    other = load_predictor(finished.adapter)
    np.testing.assert_array_equal(other.outputs(TEXTS), predictor.outputs(TEXTS))


def test_merged_folder_gives_the_same_outputs(finished, predictor, tmp_path):
    folder = merge_adapter(finished.output, tmp_path / "merged")
    model = lj.models.load(folder, task="classification")
    tokenizer = lj.models.load_tokenizer(folder)
    merged = Predictor(model.apply, model.params, task=predictor.task, tokenizer=tokenizer, max_length=32)
    np.testing.assert_allclose(merged.outputs(TEXTS), predictor.outputs(TEXTS), atol=1e-5)
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    assert labels == {"0": "neg", "1": "pos"}
    with pytest.raises(FileError, match=r"isn't a new or empty folder"):
        merge_adapter(finished.output, folder)


def test_a_folder_without_an_adapter(tmp_path, finished):
    with pytest.raises(TrainingError, match=r"holds no adapter of a run \(task\.json is missing\)"):
        load_predictor(tmp_path)
    shutil.copy(finished.output / "config.yaml", tmp_path)
    with pytest.raises(TrainingError, match=r"its run isn't complete; run the same command to resume it"):
        load_predictor(tmp_path)


def test_another_base_is_refused(finished, tmp_path):
    from tests.tiny_bert import write_tiny_bert

    other = write_tiny_bert(tmp_path / "other", seed=9, layers=1, hidden=16, heads=2, positions=32)
    with pytest.raises(ValueError, match=r"was trained on another base"):
        load_run_adapter(finished.output, base=str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, r"has format 9, and this version reads 1"),
        ({"max_length": "long"}, r"`max_length` can't be 'long'"),
        ({"max_length": 0}, r"`max_length` can't be 0"),
        ({"labels": ["a"]}, r"`labels` is \['a'\], and two names or more"),
        ({"labels": None}, r"`labels` can't be None"),
        ({"labels": ["neg", "pos", "neg"]}, r"`labels` has 'neg' twice, and each is expected once"),
        ({"pooling": "last"}, r"`pooling` can't be 'last'"),
        ({"task": "ranking"}, r"`task` must be one of .*, got 'ranking'"),
        ({"base": None}, r"`base` can't be None"),
        ({"new_head": 1}, r"`new_head` can't be 1"),
        ({"prior": [0.5]}, r"`prior` can't be \[0.5\]"),
        ({"prior": [0.5, "x"]}, r"`prior` can't be \[0.5, 'x'\]"),
    ],
)
def test_a_task_file_is_checked(change, message, finished, tmp_path):
    content = json.loads((finished.adapter / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(content | change))
    with pytest.raises(TrainingError, match=message):
        read_task(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 512}, r"`max_length` is 512, but the base .* has 32 positions. The adapter belongs to another"),
        ({"labels": ["a", "b", "c"], "prior": []}, r"classifier"),
    ],
)
def test_a_task_file_for_another_adapter_or_base(change, message, finished, tmp_path):
    shutil.copytree(finished.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "task.json"
    content = json.loads(path.read_text()) | change
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_predictor(tmp_path / "adapter")


def test_special_tokens_in_a_text_are_told_and_escaped(options, tmp_path, capsys):
    """A classifier's `[SEP]` divides a pair, whoever wrote it."""
    base = tmp_path / "base"
    shutil.copytree(options["base"], base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.save(str(base / "tokenizer.json"))
    (tmp_path / "rows.tsv").write_text("text\tlabel\ngood\tpos\nbad [SEP] good\tneg\n")
    chosen = {**options, "base": str(base), "train": str(tmp_path / "rows.tsv"), "steps": 1, "dev": None, "test": None}
    notes = []
    for name, escaped in (("plain", False), ("escaped", True)):
        config = TrainConfig(**chosen, escape_special_tokens=escaped, output=str(tmp_path / name))
        train(config, on_progress=lambda event: notes.append(getattr(event, "message", "")))
    told = [note for note in notes if "special tokens" in note]
    assert told == [
        "train: 1 of 2 texts spell out special tokens: '[SEP]'. They act as control tokens there; "
        "`escape_special_tokens=True` takes them as plain text"
    ]
    plain, escaped = (load_predictor(tmp_path / name) for name in ("plain", "escaped"))
    texts = ["good [SEP] bad"]
    assert plain.encode(texts).ids.tolist().count(tokenizer.token_to_id("[SEP]")) == 2
    assert escaped.encode(texts).ids.tolist().count(tokenizer.token_to_id("[SEP]")) == 1
    (tmp_path / "texts.txt").write_text("good [SEP] bad\n")
    arguments = ["predict", "--adapter", str(tmp_path / "plain"), str(tmp_path / "texts.txt")]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "note: 1 of 1 texts spell out special tokens: '[SEP]'" in told
    assert "`--escape-special-tokens` takes them as plain text" in told
    assert main([*arguments, "--escape-special-tokens"]) == 0
    assert "note" not in capsys.readouterr().err


def test_a_tokenizer_with_more_types_than_the_base_is_refused(options, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(options["base"], base)
    tensors = files.read_safetensors(base / "model.safetensors")
    tensors["embeddings.token_type_embeddings.weight"] = tensors["embeddings.token_type_embeddings.weight"][:1]
    files.write_safetensors(base / "model.safetensors", tensors)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"type_vocab_size": 1}))
    (tmp_path / "rows.tsv").write_text("text\tother\tlabel\ngood\tfilm\tpos\nbad\tplot\tneg\n")
    chosen = {**options, "base": str(base), "train": str(tmp_path / "rows.tsv"), "steps": 1, "dev": None, "test": None}
    train(TrainConfig(**chosen, output=str(tmp_path / "single")))  # one text has one type
    with pytest.raises(
        files.FileError, match=r"second text of a pair the token type 1, and the model has 1 types \(`type_vocab"
    ):
        train(TrainConfig(**chosen, text_pair="other", output=str(tmp_path / "pairs")))


@pytest.mark.parametrize("change", [{"labels": ["pos", "neg"]}, {"max_length": 31}, {"base": "other"}, {"more": 1}])
def test_a_task_file_that_was_changed(change, finished, tmp_path):
    """What each entry by itself may be; the message says how a change that is meant is accepted."""
    content = json.loads((finished.adapter / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(content | change))
    with pytest.raises(FileError, match=r"task.json isn't what its `checksum` was written for: .* remove the entry"):
        read_task(tmp_path)
    del content["checksum"]
    (tmp_path / "task.json").write_text(json.dumps(content | change))
    read_task(tmp_path)
