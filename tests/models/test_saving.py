"""`save_pretrained`: what it writes comes back, here and (tests/parity) in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import files, models
from lora_jax.files import read_json, read_metadata, read_safetensors, read_safetensors_header
from lora_jax.paths import leaves_by_path
from tests.tiny_bert import write_tiny_bert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("saving") / "base", layers=1, torch_dtype="float16")


def trained(model: models.Model) -> Any:
    return jax.tree.map(lambda leaf: leaf * 1.5, model.params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "classification", "num_labels": 3},
        {"task": "regression"},
        {"task": "classification", "num_labels": 3, "pooling": "mean"},
        {"task": "classification", "num_labels": 3, "dtype": "bfloat16"},
    ],
)
def test_what_is_saved_is_loaded(base: Path, tmp_path: Path, options: dict[str, Any]):
    model = models.load(base, **options)
    params = trained(model)
    folder = models.save_pretrained(tmp_path / "new" / "out", model, params, source=base)
    again = models.load(folder, **{name: value for name, value in options.items() if name != "num_labels"})
    assert again.config == model.config
    for path, leaf in leaves_by_path(params).items():
        np.testing.assert_array_equal(leaves_by_path(again.params)[path], leaf, err_msg=path)


def test_the_folder_is_a_hugging_face_folder(base: Path, tmp_path: Path):
    model = models.load(base, task="classification", num_labels=3)
    models.save_pretrained(tmp_path / "out", model, model.params, source=base, labels=["no", "yes", "may be"])
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "may be"}
    assert config["label2id"] == {"no": 0, "yes": 1, "may be": 2}
    assert config["problem_type"] == "single_label_classification"
    assert (config["dtype"], config.get("torch_dtype")) == ("float32", None)
    assert config["hidden_size"] == 32
    names = read_safetensors_header(tmp_path / "out" / "model.safetensors")
    assert names["bert.encoder.layer.0.intermediate.dense.weight"].shape == (64, 32)
    assert names["classifier.weight"].shape == (3, 32)
    assert read_metadata(tmp_path / "out" / "model.safetensors") == {"format": "pt"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert models.load_tokenizer(tmp_path / "out").encode("good").tokens == ["[CLS]", "good", "[SEP]"]


def test_regression_says_so(base: Path, tmp_path: Path):
    model = models.load(base, task="regression")
    models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "LABEL_0"}


@pytest.mark.parametrize("options", [{}, {"task": "regression", "pooling": "mean"}])
def test_a_pooler_that_the_model_does_not_use_is_kept(base: Path, tmp_path: Path, options: dict[str, Any]):
    model = models.load(base, **options)
    models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["BertModel"]
    kept = read_safetensors(tmp_path / "out" / "model.safetensors", ["pooler.dense.weight"])["pooler.dense.weight"]
    theirs = read_safetensors(base / "model.safetensors", ["pooler.dense.weight"])["pooler.dense.weight"]
    np.testing.assert_array_equal(kept, theirs)


def test_the_sources_own_labels_are_kept(base: Path, tmp_path: Path):
    model = models.load(base, task="classification", num_labels=2)
    models.save_pretrained(tmp_path / "one", model, model.params, source=base, labels=["bad", "good"])
    again = models.load(tmp_path / "one", task="classification")
    models.save_pretrained(tmp_path / "two", again, again.params, source=tmp_path / "one")
    assert read_json(tmp_path / "two" / "config.json")["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        ({}, ["a"], r"`labels` must have 2 names, one for each output, got 1"),
        ({}, ["a", "a"], r"`labels` must have no duplicates, got a, a"),
        ({"extra": {"kernel": np.ones(2)}}, None, r"isn't this model's tree: unexpected extra/kernel"),
        ({"classifier": {"kernel": np.ones((32, 2))}}, None, r"isn't this model's tree: missing classifier/bias"),
        (
            {"classifier": {"kernel": np.ones((32, 3)), "bias": np.ones(2)}},
            None,
            r"`params` at classifier/kernel must have shape \(32, 2\), got \(32, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path, change: Any, labels: Any, message: str):
    model = models.load(base, task="classification", num_labels=2)
    with pytest.raises(ValueError, match=message):
        models.save_pretrained(tmp_path / "out", model, {**model.params, **change}, source=base, labels=labels)
    assert not (tmp_path / "out").exists()


def test_the_base_is_not_overwritten(base: Path):
    model = models.load(base)
    with pytest.raises(ValueError, match=r"`folder` must not be the base's own.*choose another"):
        models.save_pretrained(base, model, model.params, source=base)


def test_leaves_of_two_dtypes_are_saved_as_the_wider(base: Path, tmp_path: Path):
    model = models.load(base, task="regression", dtype=jnp.bfloat16)
    head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) + 1e-4, model.params["classifier"])
    models.save_pretrained(tmp_path / "out", model, {**model.params, "classifier": head}, source=base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    tensors = files.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32", "bfloat16"}
    np.testing.assert_array_equal(tensors["classifier.bias"], head["bias"])
