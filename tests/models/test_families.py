"""RoBERTa, XLM-RoBERTa and DistilBERT from their folders and back. For BERT see `test_loading`, `test_saving`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import FileError, read_json, read_safetensors, read_safetensors_header, write_safetensors
from lora_jax.models import loading
from lora_jax.models.families import bundled as families
from lora_jax.paths import leaves_by_path
from tests.tiny_encoders import PREFIXES, write_tiny

NEW = ("roberta", "xlm-roberta", "distilbert")
CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
HEADS = {
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}
QUERY = {
    "roberta": "encoder.layer.1.attention.self.query.weight",
    "xlm-roberta": "encoder.layer.1.attention.self.query.weight",
    "distilbert": "transformer.layer.1.attention.q_lin.weight",
}
every_family = pytest.mark.parametrize("family", NEW)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return lambda family, name="base", **options: write_tiny(
        tmp_path / name, family, hidden=16, heads=2, positions=16, **options
    )


def leaves(model: models.Model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(model.params).items()}


def assert_equal_leaves(a: models.Model, b: models.Model) -> None:
    assert leaves(a).keys() == leaves(b).keys()
    for path, leaf in leaves(a).items():
        np.testing.assert_array_equal(leaf, leaves(b)[path], err_msg=path)


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


# ------------------------------------------------------------------------------------------------------------- contents


@every_family
def test_every_leaf_is_its_tensor(family: str, write: Callable[..., Path]):
    """Each tensor of the folder once, under the module that `names` gives; kernels transposed."""
    folder = write(family, head=3, prefix=PREFIXES[family])
    tensors = read_safetensors(folder / "model.safetensors")
    model = models.load(folder, task="classification")
    seen = set()
    for path, leaf in leaves(model).items():
        name = f"{model.names[path]}.{'bias' if path.endswith('bias') else 'weight'}"
        np.testing.assert_array_equal(leaf, tensors[name].T if path.endswith("kernel") else tensors[name], err_msg=path)
        seen.add(name)
    assert {name for name in tensors if name not in seen and "pooler" not in name} == set()
    assert model.names.keys() == leaves(model).keys()


@pytest.mark.parametrize(
    ("family", "path", "module"),
    [
        ("roberta", "encoder/layers/1/attention/output/bias", "encoder.layer.1.attention.output.dense"),
        ("distilbert", "encoder/layers/1/attention/output/bias", "transformer.layer.1.attention.out_lin"),
    ],
)
def test_without_a_head_the_names_have_no_prefix(family: str, path: str, module: str, write: Callable[..., Path]):
    model = models.load(write(family))
    assert model.names[path] == module
    assert set(model.params) == {"embeddings", "encoder"}


BESIDE = {
    "roberta": ("lm_head.bias", "lm_head.dense.weight", "lm_head.layer_norm.weight", "lm_head.decoder.weight"),
    "xlm-roberta": ("lm_head.bias", "lm_head.decoder.weight"),
    "distilbert": ("vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.bias"),
}


@every_family
def test_what_checkpoints_hold_beside_the_model_is_left_aside(family: str, write: Callable[..., Path]):
    """The prefix, a buffer of old versions, the head of pretraining; and RoBERTa's pooler, there or not."""
    plain = models.load(write(family), task="regression")
    folder = write(family, "other", prefix=PREFIXES[family], **({} if family == "distilbert" else {"pooler": False}))
    extra: dict[str, Any] = {name: np.zeros(3, np.float32) for name in BESIDE[family]}
    extra[f"{PREFIXES[family]}embeddings.position_ids"] = np.arange(16)[None]
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    assert_equal_leaves(models.load(folder, task="regression"), plain)


# ---------------------------------------------------------------------------------------------------------------- heads


@every_family
def test_a_new_head_is_drawn_in_both_layers(family: str, write: Callable[..., Path]):
    folder = write(family)
    one, again = (leaves(models.load(folder, task="classification", num_labels=400)) for _ in range(2))
    other = leaves(models.load(folder, task="classification", num_labels=400, seed=1))
    for layer in ("dense", "output"):
        kernel = one[f"classifier/{layer}/kernel"]
        np.testing.assert_array_equal(kernel, again[f"classifier/{layer}/kernel"])
        assert np.abs(kernel - other[f"classifier/{layer}/kernel"]).max() > 0.01
        assert abs(kernel.std() - 0.02) < 0.003  # `initializer_range`
        assert not one[f"classifier/{layer}/bias"].any()


@every_family
@pytest.mark.parametrize("num_labels", [None, 3])
def test_a_head_of_the_checkpoint_is_used(family: str, num_labels: int | None, write: Callable[..., Path]):
    folder = write(family, head=3, prefix=PREFIXES[family])
    tensors = read_safetensors(folder / "model.safetensors")
    found = models.load(folder, task="classification", num_labels=num_labels).params["classifier"]
    for layer, name in zip(("dense", "output"), HEADS[family], strict=True):
        np.testing.assert_array_equal(found[layer]["kernel"], tensors[f"{name}.weight"].T)
        np.testing.assert_array_equal(found[layer]["bias"], tensors[f"{name}.bias"])
    assert "classifier" not in models.load(folder).params


@every_family
def test_a_head_of_another_size_is_refused(family: str, write: Callable[..., Path]):
    folder = write(family, head=3)
    with pytest.raises(FileError, match=r"has a head with 3 outputs, not 4: omit `num_labels`"):
        models.load(folder, task="classification", num_labels=4)
    with pytest.raises(FileError, match=r"has a head with 3 outputs, not 1"):
        models.load(folder, task="regression")


@every_family
@pytest.mark.parametrize("layer", [0, 1])
def test_half_a_head_is_refused(family: str, layer: int, write: Callable[..., Path]):
    folder = write(family, head=3)
    name = HEADS[family][layer]
    edit_tensors(folder, lambda tensors: [tensors.pop(f"{name}.{leaf}") for leaf in ("weight", "bias")])
    with pytest.raises(FileError, match=rf"doesn't fit its config.json: missing {name}.bias, {name}.weight\."):
        models.load(folder, task="classification", num_labels=3)
    models.load(folder)


def test_a_new_head_needs_a_number_of_labels(write: Callable[..., Path]):
    with pytest.raises(ValueError, match=r"`num_labels` is required: .* has no head"):
        models.load(write("distilbert"), task="classification")


# ------------------------------------------------------------------------------------------------------------ bad files


@every_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda query, tensors: tensors.pop(query), r"missing {query}\."),
        (lambda query, tensors: tensors.update({"adapter.down": np.ones(2)}), r"unexpected adapter.down\."),
        (
            lambda query, tensors: tensors.update({query: np.ones((16, 15), np.float32)}),
            r"'{query}' must have shape \(16, 16\), got \(16, 15\)",
        ),
        (
            lambda query, tensors: tensors.update({query: np.ones((16, 16), np.int32)}),
            r"'{query}' must have a float dtype, got int32",
        ),
        (
            lambda query, tensors: tensors.update({query.replace(".1.", ".2."): tensors[query]}),
            r"config.json has `{layers}` 2, but the checkpoint has 3 layers",
        ),
        (
            lambda query, tensors: tensors.update({"cls.predictions.bias": np.ones(2)}),
            r"unexpected cls.predictions.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(family: str, change: Any, message: str, write: Callable[..., Path]):
    folder = write(family)
    edit_tensors(folder, lambda tensors: change(QUERY[family], tensors))
    layers = "n_layers" if family == "distilbert" else "num_hidden_layers"
    with pytest.raises(FileError, match=message.format(query=QUERY[family], layers=layers)):
        models.load(folder)


def test_distilbert_has_no_token_types(write: Callable[..., Path]):
    folder = write("distilbert")
    name = "embeddings.token_type_embeddings.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones((2, 16), np.float32)}))
    with pytest.raises(FileError, match=rf"unexpected {name}"):
        models.load(folder)


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("roberta", {"vocab_size": 2 * 10**9}, r"has `vocab_size` 2,000,000,000 and `hidden_size` 16"),
        ("roberta", {"type_vocab_size": 10**9}, r"has `type_vocab_size` 1,000,000,000"),
        ("roberta", {"pad_token_id": 10**9}, r"config.json: `pad_token_id` must be a token"),
        ("roberta", {"num_hidden_layers": 10**9}, r"has `num_hidden_layers` 1,000,000,000, but the checkpoint has 2"),
        ("xlm-roberta", {"max_position_embeddings": 10**9}, r"has `max_position_embeddings` 1,000,000,000"),
        ("distilbert", {"vocab_size": 2 * 10**9}, r"has `vocab_size` 2,000,000,000 and `dim` 16"),
        ("distilbert", {"max_position_embeddings": 10**9}, r"has `max_position_embeddings` 1,000,000,000 and `dim`"),
        ("distilbert", {"hidden_dim": 2**31 - 1}, r"has `hidden_dim` 2,147,483,647 and `dim` 16, .*ffn.lin1"),
        ("distilbert", {"n_layers": 10**9}, r"has `n_layers` 1,000,000,000, but the checkpoint has 2"),
        ("distilbert", {"n_heads": 5}, r"config.json: `dim` \(16\) must be a multiple of `n_heads` \(5\)"),
        ("distilbert", {"model_type": "albert"}, r"config.json: `model_type` must be one of 'bert', 'roberta'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_memory_is_taken(
    family: str,
    entries: dict[str, Any],
    message: str,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = write(family)
    edit_config(folder, **entries)
    monkeypatch.setattr(loading, "skeleton", lambda *_, **__: pytest.fail("built before the sizes were checked"))
    with pytest.raises(FileError, match=message):
        models.load(folder)


def test_a_folder_of_one_kind_that_says_another_is_refused(write: Callable[..., Path]):
    folder = write("roberta")
    edit_config(folder, model_type="distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    with pytest.raises(FileError, match=r"has `n_layers` 2, but the checkpoint has 0 layers"):
        models.load(folder)


# --------------------------------------------------------------------------------------------------------------- saving


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "classification", "num_labels": 3},
        {"task": "regression"},
        {"task": "classification", "num_labels": 3, "pooling": "mean"},
        {"task": "regression", "dtype": "bfloat16"},
    ],
)
def test_what_is_saved_is_loaded(family: str, options: dict[str, Any], write: Callable[..., Path], tmp_path: Path):
    base = write(family)
    model = models.load(base, **options)
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base)
    again = models.load(folder, **{name: value for name, value in options.items() if name != "num_labels"})
    assert again.config == model.config
    assert again.names == model.names
    for path, leaf in leaves_by_path(params).items():
        np.testing.assert_array_equal(leaves_by_path(again.params)[path], leaf, err_msg=path)


@every_family
def test_the_folder_is_of_the_class_with_the_head(family: str, write: Callable[..., Path], tmp_path: Path):
    base = write(family)
    model = models.load(base, task="classification", num_labels=3)
    folder = models.save_pretrained(tmp_path / "out", model, model.params, source=base, labels=["a", "b", "c"])
    config = read_json(folder / "config.json")
    assert config["architectures"] == [f"{CLASSES[family]}ForSequenceClassification"]
    assert config["model_type"] == family
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    header = read_safetensors_header(folder / "model.safetensors")
    assert header[f"{HEADS[family][0]}.weight"].shape == (16, 16)
    assert header[f"{HEADS[family][1]}.weight"].shape == (3, 16)
    beside = {f"{name}.{leaf}" for name in HEADS[family] for leaf in ("weight", "bias")}
    assert {name for name in header if not name.startswith(PREFIXES[family])} == beside
    assert not any("pooler" in name for name in header)  # the class has none
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@every_family
@pytest.mark.parametrize("options", [{}, {"task": "regression", "pooling": "mean"}])
def test_the_class_without_a_head_keeps_its_pooler(
    family: str, options: dict[str, Any], write: Callable[..., Path], tmp_path: Path
):
    base = write(family, prefix=PREFIXES[family])
    model = models.load(base, **options)
    folder = models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    assert read_json(folder / "config.json")["architectures"] == [f"{CLASSES[family]}Model"]
    found = read_safetensors(folder / "model.safetensors")
    pooler = {name for name in found if name.startswith("pooler.")}
    assert pooler == (set() if family == "distilbert" else {"pooler.dense.weight", "pooler.dense.bias"})
    theirs = read_safetensors(base / "model.safetensors")
    for name in pooler:
        np.testing.assert_array_equal(found[name], theirs[PREFIXES[family] + name])


def test_a_base_of_another_kind_is_refused(write: Callable[..., Path], tmp_path: Path):
    model = models.load(write("roberta"))
    with pytest.raises(ValueError, match=r"`source` must be a 'roberta', .* a 'xlm-roberta': pass the base"):
        models.save_pretrained(tmp_path / "out", model, model.params, source=write("xlm-roberta", "other"))
    assert not (tmp_path / "out").exists()


def test_a_family_says_what_is_transposed(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A layout that keeps `(in, out)` in the checkpoint is read and written as it is."""
    folder = write("distilbert", head=3)
    plain = models.load(folder, task="classification")
    kernels = {path for path in leaves(plain) if path.endswith("kernel") and path.startswith("encoder")}
    tensors = {f"{str(plain.names[path]).removeprefix('distilbert.')}.weight" for path in kernels}
    edit_tensors(folder, lambda held: held.update({name: np.ascontiguousarray(held[name].T) for name in tensors}))
    family = families.FAMILIES["distilbert"]
    names = dataclasses.replace(
        family.names, is_transposed=lambda path: path.startswith("classifier/") and "kernel" in path
    )
    other = dataclasses.replace(family, names=names, sizes={})
    monkeypatch.setitem(families.FAMILIES, "distilbert", other)
    model = models.load(folder, task="classification")
    assert_equal_leaves(model, plain)
    saved = models.save_pretrained(tmp_path / "out", model, model.params, source=folder)
    written, given = read_safetensors(saved / "model.safetensors"), read_safetensors(folder / "model.safetensors")
    for name in tensors:
        np.testing.assert_array_equal(written[f"distilbert.{name}"], given[name])
