"""What a run depends on: each part by its content, and a base of the hub by its commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_jax import files
from lora_jax.training import RunFolderError, TrainConfig
from lora_jax.training.run.inputs import base_parts, read_inputs, source_sums
from lora_jax.training.run.setup import prepare_run
from tests.tiny_language import write_language_base

PARTS = {"train", "dev", "test", "labels", "base configuration", "base weights", "tokenizer"}


def inputs_of(options, **changes):
    return prepare_run(TrainConfig(**{**options, "output": "out", **changes}), lambda event: None).inputs


def test_equal_content_elsewhere_is_the_same(options, tmp_path):
    shutil.copytree(options["base"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["transformers_version"] = "9"  # says nothing of what is computed
    (tmp_path / "base" / "config.json").write_text(json.dumps(config, indent=7))
    mine, other = inputs_of(options), inputs_of(options, base=str(tmp_path / "base"))
    assert mine.parts.keys() == PARTS
    assert mine.differences(other) == ["`base`"]
    assert mine.differences(mine) == []
    assert mine.differences(inputs_of(options, log_every=1, tensorboard=True)) == []
    assert mine.differences(inputs_of(options, lr=1.0, test=None)) == ["`test`", "`lr`", "test"]


def test_a_base_in_the_cache_of_the_hub_is_identified_by_its_commit(options, tmp_path, monkeypatch):
    """Its weights needn't be read for that."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    shutil.copytree(options["base"], snapshot)
    monkeypatch.setattr("lora_jax.models.find_base", lambda source: snapshot)
    assert base_parts("a/b")["base weights"] == f"revision {commit}"
    # What is pinned may come out of the cache or a package: the same content is the same.
    pinned = base_parts("minilm")["base weights"]
    monkeypatch.setattr("lora_jax.models.find_base", lambda source: Path(options["base"]))
    assert base_parts("minilm")["base weights"] == pinned == base_parts("a/b")["base weights"]


def test_parts_of_a_large_base_are_read_whole(options, tmp_path):
    source = Path(options["base"])
    held = files.read_safetensors(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    names = sorted(held)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    def write() -> str:
        for part in set(places.values()):
            tensors = {name: held[name] for name in names if places[name] == part}
            files.write_safetensors(tmp_path / "base" / part, tensors)
        return base_parts(str(tmp_path / "base"))["base weights"]

    found = {write(), write()}
    assert len(found) == 1
    for name in (names[0], names[1]):  # one of each part
        held[name] = held[name] + 1e-6
        found.add(write())
    assert len(found) == 3


def test_the_inputs_of_a_language_model(tmp_path):
    base = write_language_base(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text('{"q": "a b", "a": "c"}\n{"q": "b", "a": "a c"}\n')
    options = {
        "task": "causal-lm",
        "base": base,
        "train": str(tmp_path / "train.jsonl"),
        "prompt": "q",
        "completion": "a",
        "max_length": 8,
        "batch_size": 2,
    }
    mine = inputs_of(options)
    assert mine.parts.keys() == PARTS - {"dev", "test"}
    (tmp_path / "train.jsonl").write_text('{"q": "a b", "a": "c"}\n{"q": "b a", "a": "c"}\n')  # the border moved
    assert mine.differences(inputs_of(options)) == ["train"]


def test_sources_are_told_by_their_bytes(options, tmp_path):
    sums = source_sums(TrainConfig(**options, output="out"))
    assert sums.keys() == {"train", "dev", "test"}
    hub = TrainConfig(**{**options, "dev": "owner/name@dev", "test": str(tmp_path / "gone.tsv")}, output="out")
    assert source_sums(hub) == {"train": sums["train"]}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"format": 2}, RunFolderError, "isn't that of a run, or is of another version"),
        ([], RunFolderError, "isn't that of a run"),
        ({"format": 1}, RunFolderError, "is incomplete"),
        ({"format": 1, "checksum": "x"}, files.FileError, "isn't what its `checksum` was written for"),
    ],
)
def test_a_file_that_is_none(content, error, message, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        read_inputs(tmp_path / "run.json")
