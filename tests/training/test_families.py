"""Training, prediction, merging and inspection on every family of encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.inference.classify import Predictor, load_run_adapter
from lora_jax.training import load_predictor
from tests.tiny_encoders import write_tiny

TEXTS = ["good great", "the plot bad poor hate", "love good", "poor " * 80]  # the last is cut
HEAD = {f"classifier/{layer}/{leaf}" for layer in ("dense", "output") for leaf in ("kernel", "bias")}


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "positions": 32}
    return {family: write_tiny(folder / family, family, **sizes) for family in ("roberta", "distilbert")}


@pytest.mark.parametrize(("family", "pooling"), [("roberta", "first"), ("roberta", "mean"), ("distilbert", "first")])
def test_train_predict_merge_inspect(family, pooling, bases, data, tmp_path, capsys):
    base, output = bases[family], tmp_path / "out"
    flags = ["--train", data["train"], "--test", data["test"], "--base", base, "--pooling", pooling]
    flags += ["--epochs", 5, "--batch-size", 8, "--lr", 3e-2, "--dropout", 0.02, "--buckets", 1]
    assert run("train", *flags, "--output", output) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["metrics"]["test"]["accuracy"] > 0.9
    capsys.readouterr()

    # The adapter holds both layers of the head, and factors of every linear layer.
    assert run("inspect", "--adapter", output, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"]["max_length"] == 32  # RoBERTa's table has two rows more, which are no token's
    tensors = {tensor["name"] for tensor in report["tensors"]}
    assert {name for name in tensors if name.startswith("classifier")} == HEAD
    assert len(tensors - HEAD) == 2 * 6
    assert run("inspect", "--base", base, "--pooling", pooling, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == results["trainable"]

    predictor = load_predictor(output)
    assert [prediction.label for prediction in predictor.predict(TEXTS[:3])] == ["pos", "neg", "pos"]
    if pooling == "mean":
        # No class of transformers gives its head the mean: it would load a merged folder, and take the first token.
        assert run("merge", "--adapter", output, "--output", tmp_path / "merged") == 2
        assert "its head sees the mean over the tokens, and no class of transformers does" in capsys.readouterr().err
        found = load_run_adapter(output)
        lj.models.save_pretrained(tmp_path / "merged", found.model, lj.merge_params(found.params), source=base)
    else:
        assert run("merge", "--adapter", output, "--output", tmp_path / "merged") == 0
    model = lj.models.load(tmp_path / "merged", task="classification", pooling=pooling)
    merged = Predictor(
        model.apply,
        model.params,
        task=predictor.task,
        tokenizer=lj.models.load_tokenizer(tmp_path / "merged"),
        max_length=32,
    )
    np.testing.assert_allclose(merged.outputs(TEXTS), predictor.outputs(TEXTS), atol=1e-4)
