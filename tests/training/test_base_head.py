"""A base that brings a trained head: its labels keep their outputs, or the head is replaced, and a note says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import read_safetensors, write_safetensors
from lora_jax.inference.classify import load_run_adapter
from lora_jax.models import CheckpointHead
from lora_jax.tools.convert import convert_adapter
from lora_jax.tools.merge import merge_adapter
from lora_jax.training import TrainConfig, load_predictor, train
from lora_jax.training.data.base_head import choose_head
from lora_jax.training.run.events import Note
from lora_jax.training.task import Classification, Regression
from tests.tiny_encoders import write_tiny


def with_head(base: str, folder: Path, bias: tuple[float, ...], **config) -> str:
    """The base with a head that gives every text the same logits."""
    shutil.copytree(base, folder)
    tensors = read_safetensors(folder / "model.safetensors")
    width = tensors["pooler.dense.weight"].shape[0]
    tensors["classifier.weight"] = np.zeros((len(bias), width), np.float32)
    tensors["classifier.bias"] = np.array(bias, np.float32)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return str(folder)


@pytest.fixture
def short(options):
    """Two steps that change nothing worth mentioning."""
    return {**options, "steps": 2, "lr": 1e-9, "weight_decay": 0.0}


def run(config: TrainConfig):
    notes: list[str] = []
    result = train(config, on_progress=lambda event: notes.append(event.message) if isinstance(event, Note) else None)
    return result, "\n".join(notes)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"0": "pos", "1": "neg"}, "kept, with its order of the labels: 'pos', 'neg'"),
        ({"1": "neg", "0": "pos"}, "its order of the labels: 'pos', 'neg'"),
        ({"0": "POS", "1": " Neg"}, "its order of the labels: 'pos', 'neg' (which the base calls 'POS', ' Neg')"),
    ],
    ids=["the same", "written in another order", "spelled in another way"],
)
def test_a_head_of_the_same_labels_goes_on(names, told, base, short, tmp_path):
    """It answers `pos` to everything; sorted labels would make `neg` of that."""
    source = with_head(base, tmp_path / "base", (5.0, -5.0), id2label=names)
    result, notes = run(TrainConfig(**{**short, "base": source}, output=str(tmp_path / "run")))
    assert told in notes
    assert result.labels == ("pos", "neg")
    (prediction,) = load_predictor(result.output).predict(["bad poor hate"])
    assert prediction.label == "pos"
    assert prediction.probability == pytest.approx(1 / (1 + np.exp(-10)), abs=1e-4)
    # Who merges it reads the same names.
    merge_adapter(result.output, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "pos", "1": "neg"}
    assert models.checkpoint_head(tmp_path / "merged") == CheckpointHead(2, ("pos", "neg"))


@pytest.mark.parametrize(
    ("bias", "config", "told"),
    [
        (
            (5.0, -5.0),
            {"id2label": {"0": "yes", "1": "no"}},
            "it has the labels 'yes', 'no', and the training data has",
        ),
        ((5.0, 0.0, -5.0), {}, "it has 3 outputs without names, and the training data has the labels 'neg', 'pos'"),
        ((5.0,), {"id2label": {"0": "score"}}, "it has one output, and the training data has the labels"),
    ],
    ids=["other names", "another number", "a regression's"],
)
def test_a_head_of_other_labels_is_replaced(bias, config, told, base, options, tmp_path):
    source = with_head(base, tmp_path / "base", bias, **config)
    chosen = {**options, "base": source}
    result, notes = run(TrainConfig(**chosen, output=str(tmp_path / "run")))
    assert f"the base's trained head is replaced by a new one: {told}" in notes
    assert result.labels == ("neg", "pos")
    assert (result.metrics["test"]["accuracy"] or 0) > 0.9
    # Loading, merging and converting the adapter give it a new head, too.
    found = load_run_adapter(result.output)
    assert found.task_file.new_head
    assert models.absent_leaves(found.model, source) == ["classifier/bias", "classifier/kernel"]
    texts = ["good great", "bad poor hate"]
    expected = load_predictor(result.output).outputs(texts)
    merge_adapter(result.output, tmp_path / "merged")
    merged = models.load(tmp_path / "merged", task="classification")
    tokens = models.load_tokenizer(tmp_path / "merged").encode(texts[0]).ids
    np.testing.assert_allclose(merged.apply(merged.params, np.array([tokens])), expected[:1], atol=1e-4)
    conversion = convert_adapter(result.output, tmp_path / "peft", to="peft")
    assert "the outputs are, in this order, 'neg', 'pos'" in conversion.notices[-1]
    again = convert_adapter(tmp_path / "peft", tmp_path / "again", to="lora_jax", labels=["neg", "pos"])
    assert again.base == source


def test_a_regression_keeps_one_output_and_leaves_three(base, short, tmp_path):
    chosen = {**short, "task": "regression", "label": "score"}
    one = with_head(base, tmp_path / "one", (1.5,))
    result, notes = run(TrainConfig(**{**chosen, "base": one}, output=str(tmp_path / "run")))
    assert "the base's trained head is kept: it also predicts one number" in notes
    assert load_predictor(result.output).predict(["good"])[0].label == pytest.approx(1.5, abs=1e-4)
    three = with_head(base, tmp_path / "three", (1.0, 2.0, 3.0), id2label={"0": "a", "1": "b", "2": "c"})
    result, notes = run(TrainConfig(**{**chosen, "base": three}, output=str(tmp_path / "other")))
    assert "replaced by a new one: it has the labels 'a', 'b', 'c', and the task is to predict a number" in notes
    assert load_predictor(result.output).predict(["good"])[0].label == pytest.approx(0.0, abs=0.5)


MNLI = CheckpointHead(3, ("contradiction", "neutral", "entailment"))


@pytest.mark.parametrize(
    ("labels", "head", "order"),
    [
        (("contradiction", "entailment", "neutral"), MNLI, MNLI.labels),
        (("0", "1", "2"), MNLI, None),  # GLUE's numbers mean another order
        (("contradiction", "entailment"), MNLI, None),
        (("1", "2"), CheckpointHead(2, ("1 star", "2 stars")), None),
        (("0", "1", "2"), CheckpointHead(3, None), ("0", "1", "2")),
        (("LABEL_0", "LABEL_1"), CheckpointHead(2, None), ("LABEL_0", "LABEL_1")),
        (("1", "2"), CheckpointHead(2, None), None),  # from 1 on: they number something else
        (("no", "yes"), CheckpointHead(2, None), None),
        (("NO", "No"), CheckpointHead(2, ("No", "NO")), ("No", "NO")),  # case tells them apart there as well
        (("NO", "No"), CheckpointHead(2, ("no", "yes")), None),
        (("not ok", "ok"), CheckpointHead(2, ("OK", "not\u00a0OK")), ("ok", "not ok")),
    ],
)
def test_the_order_is_found_by_name(labels, head, order):
    found = choose_head(Classification(labels=labels), head)
    assert (found.is_new, found.task.labels) == ((True, labels) if order is None else (False, order))
    assert found.note is not None


def test_without_a_head_nothing_is_said():
    assert choose_head(Regression(), None) == (Regression(), False, None)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, None),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "a", "1": "a"}}, None),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, None),
        ({"id2label": {"1": "a", "2": "b"}}, None),
        ({"id2label": ["a", "b"]}, None),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
    ],
)
def test_what_a_checkpoint_calls_its_outputs(config, labels, base, tmp_path):
    source = with_head(base, tmp_path / "base", (0.0, 1.0), **config)
    assert models.checkpoint_head(source) == CheckpointHead(2, labels)
    assert models.checkpoint_head(base) is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_new_head_is_that_of_a_base_without(family, tmp_path):
    """Both layers, where there are two; everything else is the checkpoint's."""
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "positions": 32}
    plain = write_tiny(tmp_path / "plain", family, **sizes)
    source = tmp_path / "base"
    if family == "bert":
        with_head(str(plain), source, (1.0, 2.0, 3.0))
    else:
        write_tiny(source, family, **sizes, head=3)
    new = models.load(source, task="classification", num_labels=2, seed=7, new_head=True).params
    other = models.load(plain, task="classification", num_labels=2, seed=7).params
    jax.tree.map(np.testing.assert_array_equal, new["classifier"], other["classifier"])
    own = models.load(source, task="classification").params
    np.testing.assert_array_equal(new["embeddings"]["word"]["embedding"], own["embeddings"]["word"]["embedding"])
    with pytest.raises(ValueError, match=r"`new_head` applies to classification and regression, and `task` is None"):
        models.load(source, new_head=True)


def test_an_adapter_of_before_loads_as_it_was(finished, tmp_path):
    """Its `task.json` says nothing of heads and baselines."""
    shutil.copytree(finished.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "task.json"
    content = json.loads(path.read_text())
    for name in ("new_head", "prior", "escape_special_tokens", "checksum"):
        del content[name]
    path.write_text(json.dumps(content))
    texts = ["good great", "bad"]
    np.testing.assert_array_equal(
        load_predictor(tmp_path / "adapter").outputs(texts), load_predictor(finished.output).outputs(texts)
    )
