"""`load`: what it takes from a folder, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import FileError, read_safetensors, write_safetensors
from lora_jax.models import loading
from lora_jax.paths import leaves_by_path
from tests.tiny_bert import write_tiny_bert


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


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


# ----------------------------------------------------------------------------------------------------------- contents


def test_every_leaf_is_its_tensor(tiny: Path):
    tensors = read_safetensors(tiny / "model.safetensors")
    found = leaves(models.load(tiny, task="classification", num_labels=3))
    kernel = found["encoder/layers/1/mlp/up/kernel"]
    assert kernel.shape == (32, 64)
    np.testing.assert_array_equal(kernel, tensors["encoder.layer.1.intermediate.dense.weight"].T)
    np.testing.assert_array_equal(found["pooler/bias"], tensors["pooler.dense.bias"])
    np.testing.assert_array_equal(found["embeddings/norm/scale"], tensors["embeddings.LayerNorm.weight"])
    np.testing.assert_array_equal(found["embeddings/word/embedding"], tensors["embeddings.word_embeddings.weight"])


def test_no_leaf_without_use(tiny: Path):
    assert set(models.load(tiny).params) == {"embeddings", "encoder"}
    mean = models.load(tiny, task="regression", pooling="mean")
    assert set(mean.params) == {"embeddings", "encoder", "classifier"}
    assert set(models.load(tiny, task="regression").params) == {"embeddings", "encoder", "classifier", "pooler"}


def test_names_are_those_of_the_transformers_class(tiny: Path):
    path = "encoder/layers/0/attention/query/kernel"
    assert models.load(tiny).names[path] == "encoder.layer.0.attention.self.query"
    model = models.load(tiny, task="regression")
    assert model.names[path] == "bert.encoder.layer.0.attention.self.query"
    assert model.names.keys() == leaves(model).keys()


def test_params_are_plain_and_can_be_donated(tiny: Path):
    params = models.load(tiny).params
    assert all(type(leaf).__name__ == "ArrayImpl" for leaf in jax.tree.leaves(params))
    assert type(params["encoder"]["layers"]["0"]) is dict
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("old", ["prefix", "gamma", "buffers", "pretraining heads"])
def test_older_checkpoints_are_read(folder: Path, tiny: Path, old: str):
    def change(tensors: dict[str, np.ndarray]) -> None:
        if old == "prefix":
            for name in list(tensors):
                tensors[f"bert.{name}"] = tensors.pop(name)
        elif old == "gamma":
            for name in [name for name in tensors if "LayerNorm" in name]:
                tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        elif old == "buffers":
            tensors["embeddings.position_ids"] = np.arange(64)[None]
        else:
            tensors["cls.predictions.bias"] = np.zeros(3, np.float32)

    edit_tensors(folder, change)
    assert_equal_leaves(models.load(folder, task="regression"), models.load(tiny, task="regression"))


def test_parts_and_an_index_are_one_checkpoint(folder: Path, tiny: Path):
    split_into_parts(folder)
    assert_equal_leaves(models.load(folder), models.load(tiny))


def split_into_parts(folder: Path) -> dict[str, str]:
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for part in set(parts.values()):
        write_safetensors(folder / part, {name: tensors[name] for name in tensors if parts[name] == part})
    write_index(folder, parts)
    return parts


def write_index(folder: Path, parts: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def test_parts_in_a_hub_cache_are_links_to_blobs(folder: Path, tiny: Path, tmp_path: Path):
    split_into_parts(folder)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert_equal_leaves(models.load(snapshot), models.load(tiny))


@pytest.mark.parametrize("held", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16"])
def test_every_dtype_is_read_as_asked(tmp_path: Path, held: Any, dtype: Any):
    folder = write_tiny_bert(tmp_path, layers=1, dtype=held)
    tensor = read_safetensors(folder / "model.safetensors")["encoder.layer.0.output.dense.bias"]
    assert tensor.dtype == held
    found = leaves(models.load(folder, dtype=dtype))
    wanted = jnp.dtype(dtype or jnp.float32)
    assert {leaf.dtype for leaf in found.values()} == {wanted}
    np.testing.assert_array_equal(found["encoder/layers/0/mlp/down/bias"], tensor.astype(wanted))


# --------------------------------------------------------------------------------------------------------------- heads


def test_a_new_head_is_drawn_from_the_seed_and_its_path(tiny: Path):
    one, again = (leaves(models.load(tiny, task="classification", num_labels=500)) for _ in range(2))
    other = leaves(models.load(tiny, task="classification", num_labels=500, seed=1))
    np.testing.assert_array_equal(one["classifier/kernel"], again["classifier/kernel"])
    assert np.abs(one["classifier/kernel"] - other["classifier/kernel"]).max() > 0.01
    assert abs(one["classifier/kernel"].std() - 0.02) < 0.001  # `initializer_range`
    assert not one["classifier/bias"].any()
    mean = leaves(models.load(tiny, task="classification", num_labels=500, pooling="mean"))
    np.testing.assert_array_equal(one["classifier/kernel"], mean["classifier/kernel"])


def test_a_base_without_a_pooler_gets_one_with_a_warning(tmp_path: Path):
    folder = write_tiny_bert(tmp_path, layers=1, pooler=False)
    with pytest.warns(UserWarning, match=r'has no pooler, so a new one was drawn.*also_train=\("pooler", "classi') as w:
        model = models.load(folder, task="regression")
    assert w[0].filename == __file__
    assert np.abs(leaves(model)["pooler/kernel"]).max() > 0.01
    models.load(folder)
    models.load(folder, task="regression", pooling="mean")


def with_head(folder: Path, outputs: int) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["classifier.weight"] = np.ones((outputs, 32), np.float32)
        tensors["classifier.bias"] = np.full(outputs, 2, np.float32)

    edit_tensors(folder, add)


@pytest.mark.parametrize("num_labels", [None, 3])
def test_a_head_of_the_checkpoint_is_used(folder: Path, num_labels: int | None):
    with_head(folder, 3)
    head = models.load(folder, task="classification", num_labels=num_labels).params["classifier"]
    np.testing.assert_array_equal(head["kernel"], np.ones((32, 3)))
    np.testing.assert_array_equal(head["bias"], [2, 2, 2])
    assert "classifier" not in models.load(folder).params


def test_a_head_of_another_size_is_refused(folder: Path):
    with_head(folder, 3)
    with pytest.raises(FileError, match=r"has a head with 3 outputs, not 4: omit `num_labels`"):
        models.load(folder, task="classification", num_labels=4)
    with pytest.raises(FileError, match=r"has a head with 3 outputs, not 1"):
        models.load(folder, task="regression")


# ------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "causal-lm"}, r'`task` of a bert must be "classification", "regression" or None, got \'causal-lm\''),
        ({"task": "tagging"}, r'`task` must be "classification", "regression", "causal-lm" or None, got \'tagging\''),
        ({"pooling": "max"}, r'`pooling` must be "first" or "mean", got \'max\''),
        ({"task": "classification"}, r"`num_labels` is required: .* has no head"),
        (
            {"task": "classification", "num_labels": 1},
            r"`num_labels` must be an integer of at least 2, got 1; .*regression",
        ),
        ({"task": "classification", "num_labels": 2.0}, r"`num_labels` must be an integer of at least 2, got 2.0"),
        ({"task": "regression", "num_labels": 2}, r"`num_labels` must be 1 or omitted for regression, got 2"),
        ({"num_labels": 2}, r"`num_labels` needs a `task`"),
        ({"dtype": "int8"}, r"`dtype` must be float32, bfloat16, .*, got int8"),
        ({"dtype": "float64"}, r"`dtype` must be .*float64 if JAX enables it, got float64"),
    ],
)
def test_a_bad_argument_is_refused(tiny: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        models.load(tiny, **options)


# ------------------------------------------------------------------------------------------------------------ bad files


def drop(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QUERY), rf"the checkpoint doesn't fit its config.json: missing {QUERY}\."),
        (drop("pooler.dense.bias"), r"missing pooler.dense.bias\."),
        (drop("embeddings.word_embeddings.weight"), r"missing embeddings.word_embeddings.weight"),
        (put("adapter.down", np.ones(2)), r"unexpected adapter.down\."),
        (put("encoder.layer.1.gate.weight", np.ones(2)), r"unexpected encoder.layer.1.gate.weight"),
        (put("classifier.weight", np.ones((1, 32), np.float32)), r"missing classifier.bias"),
        (put("classifier.weight", np.ones((), np.float32)), r"missing classifier.bias"),
        (put(QUERY, np.ones((32, 31), np.float32)), rf"'{QUERY}' must have shape \(32, 32\), got \(32, 31\)"),
        (put(QUERY, np.ones((32, 32), np.int32)), rf"'{QUERY}' must have a float dtype, got int32"),
        (put("encoder.layer.2.x", np.ones(2)), r"`num_hidden_layers` 2, but the checkpoint has 3 layers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable[..., Any], message: str):
    edit_tensors(folder, change)
    with pytest.raises(FileError, match=message):
        models.load(folder, task="regression")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"vocab_size": 2_000_000_000},
            r"has `vocab_size` 2,000,000,000 and `hidden_size` 32, but the tensor 'embedd",
        ),
        ({"hidden_size": 1_000_000_000}, r"`hidden_size` 1,000,000,000, but the tensor .* has shape"),
        ({"num_hidden_layers": 1_000_000_000}, r"has `num_hidden_layers` 1,000,000,000, but the checkpoint has 2"),
        ({"intermediate_size": 2**31 - 1}, r"has `intermediate_size` 2,147,483,647"),
        ({"max_position_embeddings": 10**9}, r"has `max_position_embeddings` 1,000,000,000"),
        ({"type_vocab_size": 10**9}, r"has `type_vocab_size` 1,000,000,000"),
        ({"vocab_size": 10**30}, r"config.json: `vocab_size` must be a positive integer"),
        ({"num_attention_heads": 5}, r"config.json: `hidden_size` \(32\) must be a multiple of `num_attention_heads`"),
        ({"hidden_act": "mish"}, r"config.json: `hidden_act` must be one of .*, got 'mish'"),
        ({"model_type": "t5"}, r"config.json: `model_type` must be one of 'bert', .*got 't5'"),
        (
            {"position_embedding_type": "relative_key_query"},
            r"config.json: `position_embedding_type` must be 'absolute', got 'relative_key_q",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_memory_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, Any], message: str
):
    edit_config(folder, **entries)
    monkeypatch.setattr(loading, "skeleton", lambda *_, **__: pytest.fail("built before the sizes were checked"))
    with pytest.raises(FileError, match=message):
        models.load(folder)


def test_a_broken_config_is_refused(folder: Path):
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"config.json: the file is not JSON"):
        models.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(FileError, match=r"config.json must be a JSON object, got list"):
        models.load(folder)


def test_a_truncated_checkpoint_is_refused(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match=r"model.safetensors is no whole safetensors file .*Fetch or save it again"):
        models.load(folder)


def test_a_header_of_100_gigabytes_is_refused(folder: Path):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 100 * 10**9) + b"{}")
    with pytest.raises(FileError, match=r"claims a header of 100,000,000,000 bytes"):
        models.load(folder)


def test_a_pickle_is_refused_with_the_way_out(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"has no weights: neither `model.safetensors` nor"):
        models.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileError, match=r"only as a pickle \(pytorch_model.bin\).*save_pretrained\(folder\)`"):
        models.load(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", "..\\x.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, file: str):
    parts = split_into_parts(folder)
    write_index(folder, {**parts, QUERY: file})
    with pytest.raises(FileError, match=r"would leave .*a name inside the folder is expected"):
        models.load(folder)


def test_an_index_cannot_name_a_link_that_leads_out(folder: Path, tmp_path: Path):
    parts = split_into_parts(folder)
    part = folder / parts[QUERY]
    part.rename(tmp_path / "outside.safetensors")
    part.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(FileError, match=r"is a link that leaves"):
        models.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_file_is_a_link_that_leads_out(tiny: Path, tmp_path: Path, name: str):
    shutil.copytree(tiny, tmp_path / "base")
    file = tmp_path / "base" / name
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(FileError, match=rf"The name '{name}' is a link that leaves .*base"):
        models.load(tmp_path / "base")
    file.unlink()
    (tmp_path / "base" / "inside").symlink_to("within")
    (tmp_path / "outside").rename(tmp_path / "base" / "within")
    file.symlink_to("inside")  # whatever stays within is fine
    assert_equal_leaves(models.load(tmp_path / "base"), models.load(tiny))


def test_links_into_a_hub_cache(tiny: Path, tmp_path: Path):
    """As a snapshot has them, also where a link leads to it; and as files fetched elsewhere were once linked."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot, fetched = blobs.parent / "snapshots" / "c0ffee", tmp_path / "fetched"
    for folder in (snapshot, fetched, blobs):
        folder.mkdir(parents=True)
    for file in tiny.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (fetched / file.name).symlink_to(blobs / file.name)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, fetched, tmp_path / "link"):
        assert_equal_leaves(models.load(folder), models.load(tiny))
        models.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: [], r"must have a `weight_map` from tensor names to file names"),
        (lambda parts: {**parts, QUERY: 3}, r"must have a `weight_map`"),
        (
            lambda parts: {**parts, QUERY: "pytorch_model.bin"},
            r"must name safetensors files only, got 'pytorch_model.bin'",
        ),
        (lambda parts: {**parts, QUERY: "absent.safetensors"}, r"absent.safetensors doesn't exist"),
        (lambda parts: {**parts, "x": parts[QUERY]}, r"holds the tensor 'x', but it doesn't"),
        (lambda parts: {name: parts[name] for name in parts if name != QUERY}, rf"missing {QUERY}"),
    ],
)
def test_a_bad_index_is_refused(folder: Path, change: Callable[..., Any], message: str):
    write_index(folder, change(split_into_parts(folder)))
    with pytest.raises(FileError, match=message):
        models.load(folder)


def test_an_index_of_many_files_is_refused_at_the_first_that_is_missing(folder: Path):
    (folder / "model.safetensors").unlink()
    parts = {f"tensor {i}": f"model-{i:05}.safetensors" for i in range(50_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    started = time.monotonic()
    with pytest.raises(FileError, match=r"model-00000\.safetensors doesn't exist"):
        models.load(folder)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused(folder: Path, name: str):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FileError, match=rf"{name} is a pipe|isn't a Hugging Face model folder"):
        models.load(folder)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_neither_pads_nor_cuts(folder: Path):
    tokenizer = models.load_tokenizer(folder)
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = models.load_tokenizer(folder)
    encoded = tokenizer.encode("The movie is not good!", "Why?")
    assert encoded.tokens == ["[CLS]", "the", "movie", "is", "not", "good", "!", "[SEP]", "why", "?", "[SEP]"]
    assert encoded.type_ids == [0] * 8 + [1] * 3


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_with_a_number_that_is_none_is_refused(folder: Path, dtype: Any, value: float):
    def damage(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[QUERY][3, 5] = value

    edit_tensors(folder, damage)
    with pytest.raises(FileError, match=rf"1 of 1,024 values in the tensor '{QUERY}' are NaN or infinite. The file is"):
        models.load(folder)


def test_a_number_that_the_dtype_has_not_is_refused(folder: Path):
    edit_tensors(folder, lambda tensors: tensors[QUERY].__setitem__((0, 0), 1e6))
    assert np.isfinite(models.load(folder, dtype="bfloat16").params["embeddings"]["norm"]["scale"]).all()
    with pytest.raises(FileError, match=rf"1 of 1,024 values in the tensor '{QUERY}' .*are too large for float16"):
        models.load(folder, dtype="float16")


def test_large_numbers_whose_sum_is_larger_are_read(folder: Path):
    edit_tensors(folder, lambda tensors: tensors[QUERY].fill(3e38))
    models.load(folder)


def test_a_tokenizer_that_reaches_beyond_the_embeddings_is_refused(folder: Path):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_special_tokens(["<extra>", "<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    message = (
        rf"tokenizer.json has ids up to {rows + 1}, but the embeddings have {rows} rows \(`vocab_size` in "
        rf"config.json\): no row for 2 tokens \('<extra>' {rows}, '<more>' {rows + 1}\). Use the tokenizer"
    )
    with pytest.raises(FileError, match=message):
        models.load_tokenizer(folder)
    edit_config(folder, vocab_size=rows + 2)
    assert models.load_tokenizer(folder).token_to_id("<more>") == rows + 1


def test_a_bad_tokenizer_is_refused(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileError, match=r"tokenizer.json can't be read by `tokenizers`"):
        models.load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileError, match=r"tokenizer.json doesn't exist. Write it with transformers"):
        models.load_tokenizer(folder)
