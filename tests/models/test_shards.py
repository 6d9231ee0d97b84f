"""Large checkpoints: several files and an index, written leaf by leaf, whole or not there; and the progress of it."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.files import FileError, read_safetensors
from lora_jax.models import saving
from lora_jax.models.checkpoint.shards import HostTensor, index, is_weights_file, shard, size_in_bytes
from lora_jax.models.checkpoint.weight_files import locate_tensors
from lora_jax.paths import leaves_by_path
from tests.tiny_bert import write_tiny_bert
from tests.tiny_decoders import write_tiny_decoder

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def assert_equal(a: Any, b: Any) -> None:
    a, b = leaves_by_path(a), leaves_by_path(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_parts_is_the_model(tmp_path: Path, family: str, scan: bool):
    base = write_tiny_decoder(tmp_path / "base", family)
    model = models.load(base, task="causal-lm", scan_layers=scan)
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    limit = 6_000
    whole = models.save_pretrained(tmp_path / "whole", model, params, source=base)
    folder = models.save_pretrained(tmp_path / "parts", model, params, source=base, max_shard_size=limit)
    assert not (folder / WEIGHTS).exists()
    assert not list(whole.glob("model-*"))
    assert_equal(models.load(folder, task="causal-lm", scan_layers=scan).params, params)

    # As transformers names, sizes and lists them; a tied head once.
    content = json.loads((folder / INDEX).read_text())
    files = {path.name: read_safetensors(path) for path in parts(folder)}
    assert list(files) == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    tensors = read_safetensors(whole / WEIGHTS)
    assert content["weight_map"] == {name: file for file, held in files.items() for name in held}
    assert content["weight_map"].keys() == tensors.keys() == locate_tensors(base).keys()
    assert content["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    sizes = [sum(tensor.nbytes for tensor in held.values()) for held in files.values()]
    assert all(size <= limit or len(held) == 1 for size, held in zip(sizes, files.values(), strict=True))
    assert len(sizes) > 3


def test_sizes():
    assert [size_in_bytes(size) for size in (7, "7", "7B", "7kB", "7KB", "7 MB", "0.5GB", "1TB")] == [
        *(7, 7, 7, 7_000, 7_000, 7_000_000, 500_000_000, 10**12)
    ]
    for size in (0, -1, True, 1.5, "", "GB", "5 gigs", "-1GB", "0GB", "5GiB", None, "9" * 400):
        with pytest.raises(
            ValueError, match=r'`max_shard_size` must be a positive number of bytes, or text such as "5GB"'
        ):
            size_in_bytes(size)  # pyright: ignore[reportArgumentType]


def test_a_tensor_larger_than_a_file_has_one_of_its_own():
    tensors = {name: np.zeros(size, np.int8) for name, size in (("a", 3), ("b", 20), ("c", 4), ("d", 6), ("e", 1))}
    assert [list(part) for part in shard(tensors, 10).values()] == [["a"], ["b"], ["c", "d"], ["e"]]
    assert [list(part) for part in shard(tensors, 34).values()] == [list("abcde")]
    assert index(shard(tensors, 10))["metadata"] == {"total_size": 34}
    assert shard({}, 10) == {WEIGHTS: {}}


def test_a_bad_size_is_refused_before_anything_is_written(tmp_path: Path):
    base = write_tiny_bert(tmp_path / "base", layers=1)
    model = models.load(base)
    with pytest.raises(ValueError, match="`max_shard_size` must be"):
        models.save_pretrained(tmp_path / "out", model, model.params, source=base, max_shard_size="5 gigs")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("scan", [False, True])
def test_memory_is_taken_for_one_leaf(tmp_path: Path, scan: bool):
    """What is counted is NumPy's: copies of transposed kernels, or of the file if it were put together first."""
    base = write_tiny_decoder(tmp_path / "base", "llama", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    model = models.load(base, task="causal-lm", scan_layers=scan)
    largest = 4 * 128 * 512
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    models.save_pretrained(tmp_path / "warm", model, model.params, source=base)  # what is imported and cached at first
    tracemalloc.start()
    try:
        models.save_pretrained(tmp_path / "out", model, model.params, source=base, max_shard_size="1MB")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(parts(tmp_path / "out")) > 4
    assert peak < 3 * largest < whole / 4


def test_a_tensor_is_what_the_leaf_says():
    stack = jnp.arange(24.0).reshape(2, 3, 4)
    for leaf in (stack, np.asarray(stack)):
        tensor = HostTensor(leaf, 1, True)
        assert (tensor.shape, tensor.nbytes, tensor.dtype) == ((4, 3), 48, np.float32)
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(stack)[1].T)
    np.testing.assert_array_equal(np.asarray(HostTensor(stack[0])), stack[0])
    assert HostTensor(stack.astype(jnp.bfloat16)).nbytes == 48


# ------------------------------------------------------------------------------------------------- whole or not there


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "base", layers=1)


@pytest.mark.parametrize("before", ["1kB", "5GB"])
@pytest.mark.parametrize("after", ["1kB", "2kB", "5GB"])
def test_a_new_model_takes_the_place_of_the_old(base: Path, tmp_path: Path, before: str, after: str):
    """No file of the old one stays that would be read first, or not be in the index."""
    model = models.load(base)
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    models.save_pretrained(tmp_path / "out", model, model.params, source=base, max_shard_size=before)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base, max_shard_size=after)
    assert_equal(models.load(folder).params, params)
    named = {path.name for path in folder.iterdir() if is_weights_file(path.name)}
    models.save_pretrained(tmp_path / "fresh", model, params, source=base, max_shard_size=after)
    assert named == {path.name for path in (tmp_path / "fresh").iterdir() if is_weights_file(path.name)}
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failing", [0, 3])
def test_a_failure_leaves_the_earlier_model_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
):
    model = models.load(base)
    models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    earlier, real, count = snapshot(tmp_path / "out"), saving.write_safetensors, 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > failing:
            raise FileError("the disk is full")
        real(*arguments, **options)

    monkeypatch.setattr(saving, "write_safetensors", full)
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    for folder in (tmp_path / "out", tmp_path / "new"):
        count = 0
        with pytest.raises(FileError, match="the disk is full"):
            models.save_pretrained(folder, model, params, source=base, max_shard_size="4kB")
    assert snapshot(tmp_path / "out") == earlier
    assert not list((tmp_path / "new").iterdir())


def test_a_kill_between_the_files_leaves_the_new_ones(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Others find none that loads until they have been read here."""
    model = models.load(base)
    folder = models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target) == folder / INDEX:
            raise KeyboardInterrupt
        replace(source, target)

    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            models.save_pretrained(folder, model, params, source=base, max_shard_size="4kB")
    assert not (folder / "config.json").exists()
    jax.tree.map(np.testing.assert_array_equal, models.load(folder).params, params)
    assert not (folder / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("scan", [False, True])
def test_progress_is_told_in_bytes(tmp_path: Path, scan: bool):
    base = write_tiny_decoder(tmp_path / "base", "gpt2", dtype=jnp.bfloat16)
    told: list[tuple[int, int]] = []
    model = models.load(base, task="causal-lm", scan_layers=scan, progress=lambda *event: told.append(event))
    tensors = read_safetensors(base / WEIGHTS)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert [told[0], told[-1]] == [(0, total), (total, total)]
    assert len(told) == 1 + len(tensors)
    assert sorted({done for done, _ in told}) == [done for done, _ in told]

    told.clear()
    models.save_pretrained(
        tmp_path / "out", model, model.params, source=base, max_shard_size="3kB", progress=lambda *e: told.append(e)
    )
    assert [told[0], told[-1]] == [(0, 2 * total), (2 * total, 2 * total)]  # float32 now
    assert len(told) == 1 + len(tensors)


def test_an_error_in_a_listener_stops_the_save_and_leaves_nothing(base: Path, tmp_path: Path):
    model = models.load(base)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.save_pretrained(tmp_path / "out", model, model.params, source=base, progress=stop)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(KeyboardInterrupt):
        lj.models.load(base, progress=stop)
