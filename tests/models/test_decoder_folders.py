"""Decoders from their folders and back: tensors, names, shards, tied heads, stacked layers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import FileError, read_json, read_safetensors, write_safetensors
from lora_jax.models import leaf_reader, loading
from lora_jax.paths import leaves_by_path
from tests.tiny_decoders import CLASSES, FAMILIES, split_into_parts, write_tiny_decoder
from tests.tiny_encoders import write_tiny

every_family = pytest.mark.parametrize("family", FAMILIES)
both_forms = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
UP = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.up_proj.weight"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny_decoder(tmp_path_factory.mktemp(family) / "base", family) for family in FAMILIES}


@pytest.fixture
def folder(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["llama"], tmp_path / "base"))


def leaves(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}


def assert_equal(a: Any, b: Any) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@every_family
@both_forms
def test_every_leaf_is_its_tensor(family: str, scan: bool, bases: dict[str, Path]):
    """Each tensor of the folder once, under the module that `names` gives; a `Linear` transposed, a `Conv1D` not."""
    tensors = read_safetensors(bases[family] / "model.safetensors")
    model = models.load(bases[family], task="causal-lm", scan_layers=scan)
    params = models.unstack_layers(model.params) if scan else model.params
    seen = set()
    for path, leaf in leaves(params).items():
        module = model.names[path]
        module = module if isinstance(module, str) else module[0]  # a tied head has no tensor
        name = f"{module}.{'bias' if path.endswith('bias') else 'weight'}"
        turned = path.endswith("kernel") and (family != "gpt2" or path.startswith("lm_head"))
        np.testing.assert_array_equal(leaf, tensors[name].T if turned else tensors[name], err_msg=path)
        seen.add(name)
    assert seen == tensors.keys()
    assert model.names.keys() == leaves(params).keys()


@every_family
def test_a_stacked_tree_is_the_stack_of_the_other(family: str, bases: dict[str, Path]):
    one, other = (models.load(bases[family], task="causal-lm", scan_layers=scan) for scan in (False, True))
    assert_equal(models.stack_layers(one.params), other.params)
    assert type(other.params["layers"]["mlp"]["up"]["kernel"]).__name__ == "ArrayImpl"


@every_family
def test_without_a_head_the_names_have_no_prefix(family: str, bases: dict[str, Path], tmp_path: Path):
    bare = write_tiny_decoder(tmp_path, family, bare=True)
    model, other = models.load(bare), models.load(bases[family])
    assert_equal(model.params, other.params)
    assert set(model.params) == {"embeddings", "layers", "norm"}
    assert model.names["layers/0/mlp/up/kernel"] == ("h.0.mlp.c_fc" if family == "gpt2" else "layers.0.mlp.up_proj")
    if family == "gpt2":  # its published weights have no prefix, and a tied head
        assert_equal(models.load(bare, task="causal-lm").params, model.params)
    else:
        with pytest.raises(FileError, match=r"doesn't fit its config.json: missing lm_head.weight\."):
            models.load(bare, task="causal-lm")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_buffers_of_old_versions_are_left_aside(family: str, bases: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    buffers = {
        "gpt2": ("transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias"),
        "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    }[family]
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones((1, 1)) for name in buffers}))
    assert_equal(models.load(folder, task="causal-lm").params, models.load(bases[family], task="causal-lm").params)


@both_forms
def test_parts_are_read_as_one_each_tensor_once(
    folder: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, scan: bool
):
    split_into_parts(folder)
    held: list[int] = []
    real = leaf_reader.read_tensors

    def counted(tensors: Any, names: Any) -> Any:
        for name, array in real(tensors, names):
            held.append(array.nbytes)
            yield name, array

    monkeypatch.setattr(leaf_reader, "read_tensors", counted)
    model = models.load(folder, task="causal-lm", scan_layers=scan)
    monkeypatch.undo()
    assert len(held) == len(read_safetensors(bases["llama"] / "model.safetensors"))  # each read once
    assert_equal(model.params, models.load(bases["llama"], task="causal-lm", scan_layers=scan).params)


@both_forms
@pytest.mark.parametrize("held", [ml_dtypes.bfloat16, np.float16])
def test_every_dtype_is_read_as_asked(tmp_path: Path, held: Any, scan: bool):
    folder = write_tiny_decoder(tmp_path, "gpt2", dtype=held)
    tensor = read_safetensors(folder / "model.safetensors")["transformer.h.2.mlp.c_fc.weight"]
    for dtype in (jnp.float32, jnp.bfloat16):
        params = models.load(folder, dtype=dtype, scan_layers=scan).params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        layers = params["layers"]
        found = layers["mlp"]["up"]["kernel"][2] if scan else layers["2"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(found, tensor.astype(jnp.dtype(dtype)))


@both_forms
def test_params_can_be_donated(bases: dict[str, Path], scan: bool):
    params = models.load(bases["llama"], scan_layers=scan).params
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# ----------------------------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_tied_head_may_be_in_the_checkpoint(family: str, tmp_path: Path):
    folder = write_tiny_decoder(tmp_path, family, tie_word_embeddings=True)
    plain = models.load(folder, task="causal-lm")
    word = {"gpt2": "transformer.wte.weight", "qwen2": "model.embed_tokens.weight"}[family]
    edit_tensors(folder, lambda tensors: tensors.__setitem__("lm_head.weight", tensors[word]))
    assert_equal(models.load(folder, task="causal-lm").params, plain.params)
    edit_tensors(folder, lambda tensors: tensors.__setitem__("lm_head.weight", tensors[word] + 1))
    with pytest.raises(
        FileError, match=r"ties the head to the embeddings, but 'lm_head.weight' differs .*pass `tie_word_embed"
    ):
        models.load(folder, task="causal-lm")
    assert_equal(models.load(folder).params, plain.params)  # without logits it means nothing
    untied = models.load(folder, task="causal-lm", tie_word_embeddings=False).params
    np.testing.assert_array_equal(
        untied["lm_head"]["kernel"].T, np.asarray(plain.params["embeddings"]["word"]["embedding"]) + 1
    )


@every_family
@both_forms
def test_a_tied_head_becomes_a_leaf_of_its_own(family: str, scan: bool, tmp_path: Path):
    """The same function, and a folder of an untied model; and back, where the two are equal."""
    folder = write_tiny_decoder(tmp_path / "base", family, tie_word_embeddings=True)
    tied = models.load(folder, task="causal-lm", scan_layers=scan)
    model = models.load(folder, task="causal-lm", scan_layers=scan, tie_word_embeddings=False)
    ids = np.array([[3, 9, 4]])
    np.testing.assert_allclose(model.apply(model.params, ids), tied.apply(tied.params, ids), atol=1e-5)
    word = "embeddings/word/embedding"
    assert (model.names["lm_head/kernel"], model.names[word]) == (tied.names[word][1], tied.names[word][0])
    assert model.names["lm_head/kernel"] == "lm_head"

    saved = models.save_pretrained(tmp_path / "out", model, model.params, source=folder)
    assert read_json(saved / "config.json")["tie_word_embeddings"] is False
    assert_equal(models.load(saved, task="causal-lm", scan_layers=scan).params, model.params)
    back = models.load(saved, task="causal-lm", scan_layers=scan, tie_word_embeddings=True)
    assert_equal(back.params, tied.params)
    assert read_json(models.save_pretrained(tmp_path / "tied", back, back.params, source=saved) / "config.json")[
        "tie_word_embeddings"
    ]


def test_an_untied_head_that_is_missing_is_not_made_up(folder: Path):
    edit_tensors(folder, drop("lm_head.weight"))
    with pytest.raises(FileError, match=r"missing lm_head.weight\."):
        models.load(folder, task="causal-lm", tie_word_embeddings=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_is_the_embeddings_if_it_is_tied(family: str, tied: bool, tmp_path: Path):
    folder = write_tiny_decoder(tmp_path, family, tie_word_embeddings=tied)
    model = models.load(folder, task="causal-lm")
    ids = np.array([[3, 9, 4]])
    hidden = np.asarray(models.load(folder).apply({k: v for k, v in model.params.items() if k != "lm_head"}, ids))
    word = np.asarray(model.params["embeddings"]["word"]["embedding"])
    kernel = word.T if tied else np.asarray(model.params["lm_head"]["kernel"])
    np.testing.assert_allclose(model.apply(model.params, ids), hidden @ kernel, atol=2e-5)


# --------------------------------------------------------------------------------------------------------------- saving


@every_family
@both_forms
@pytest.mark.parametrize("task", [None, "causal-lm"])
def test_a_saved_folder_loads_again(family: str, scan: bool, task: Any, bases: dict[str, Path], tmp_path: Path):
    (bases[family] / "generation_config.json").write_text('{"eos_token_id": 2}')
    model = models.load(bases[family], task=task, scan_layers=scan)
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    folder = models.save_pretrained(tmp_path / "out", model, params, source=bases[family])
    assert_equal(models.load(folder, task=task, scan_layers=scan).params, params)
    config = read_json(folder / "config.json")
    assert config["architectures"] == [
        CLASSES[family] if task else CLASSES[family].replace("LMHead", "").replace("ForCausalLM", "Model")
    ]
    assert "id2label" not in config
    held = read_safetensors(folder / "model.safetensors")
    base = read_safetensors(bases[family] / "model.safetensors")
    if task:
        assert {name: tensor.shape for name, tensor in held.items()} == {n: tensor.shape for n, tensor in base.items()}
    else:
        assert not any(name.startswith(("transformer.", "model.", "lm_head")) for name in held)
    assert read_json(folder / "generation_config.json") == {"eos_token_id": 2}


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification", "num_labels": 2}, r'`task` of a llama must be "causal-lm" or None, got \'classifi'),
        ({"task": "causal-lm", "num_labels": 2}, r'`num_labels` must be omitted for "causal-lm", got 2'),
        ({"pooling": "mean"}, r"`pooling` applies to encoders with a head, and a llama is a decoder"),
        ({"tie_word_embeddings": False}, r"`tie_word_embeddings` applies to a decoder with logits: pass `task"),
        ({"task": "causal-lm", "tie_word_embeddings": 1}, r"`tie_word_embeddings` must be true, false or None, got 1"),
    ],
)
def test_a_bad_argument_is_refused(folder: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        models.load(folder, **options)


def test_encoders_have_no_logits_of_tokens(tmp_path: Path):
    folder = write_tiny(tmp_path, "bert")
    with pytest.raises(ValueError, match=r'`task` of a bert must be "classification", "regression" or None'):
        models.load(folder, task="causal-lm")
    with pytest.raises(ValueError, match=r"`scan_layers` applies to decoders"):
        models.load(folder, scan_layers=True)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


@both_forms
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(UP["llama"]), r"doesn't fit its config.json: missing layers.1.mlp.up_proj.weight\."),
        (drop("lm_head.weight"), r"missing lm_head.weight\."),
        (put("model.layers.0.self_attn.q_proj.bias", np.ones(24)), r"unexpected layers.0.self_attn.q_proj.bias\."),
        (put("model.layers.3.x", np.ones(2)), r"`num_hidden_layers` 3, but the checkpoint has 4 layers"),
        (put(UP["llama"], np.ones((24, 15))), rf"'{UP['llama']}' must have shape \(24, 16\), got \(24, 15\)"),
        (put(UP["llama"], np.ones((24, 16), np.int8)), rf"'{UP['llama']}' must have a float dtype, got int8"),
        (put("lm_head.weight", np.ones((96, 16))), r"'lm_head.weight' must have shape \(97, 16\), got \(96, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable[..., Any], message: str, scan: bool):
    edit_tensors(folder, change)
    with pytest.raises(FileError, match=message):
        models.load(folder, task="causal-lm", scan_layers=scan)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vocab_size": 2_000_000_000}, r"has `vocab_size` 2,000,000,000 and `hidden_size` 16, but the tensor 'embed"),
        ({"num_hidden_layers": 10**9}, r"has `num_hidden_layers` 1,000,000,000, but the checkpoint has 3"),
        ({"intermediate_size": 2**31 - 1}, r"has `intermediate_size` 2,147,483,647"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"config.json: `rope_type` must be one of .*, got 'longrope'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_memory_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, Any], message: str
):
    edit_config(folder, **entries)
    monkeypatch.setattr(loading, "skeleton", lambda *_, **__: pytest.fail("built before the sizes were checked"))
    with pytest.raises(FileError, match=message):
        models.load(folder, task="causal-lm")


def test_heads_that_the_tensors_do_not_have_take_no_memory(folder: Path):
    edit_config(folder, head_dim=2**30)
    with pytest.raises(FileError, match=r"k_proj.weight' must have shape \(2147483648, 16\), got \(12, 16\)"):
        models.load(folder)
