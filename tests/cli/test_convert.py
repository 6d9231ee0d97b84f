"""`lora-jax convert`, and what the other commands make of a PEFT folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.cli.main import main
from lora_jax.paths import leaves_by_path
from lora_jax.training import TrainConfig, load_predictor, train
from tests.tiny_bert import write_tiny_bert
from tests.tiny_decoders import write_tiny_decoder

TENSORS, PEFT_TENSORS = "adapter.safetensors", "adapter_model.safetensors"


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("lora-jax ")
    assert error.count("\n") == 1
    return error


def convert(*arguments: Any) -> None:
    assert run("convert", *arguments) == 0


@pytest.fixture(scope="module")
def as_peft(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    convert("--adapter", finished.output, "--to", "peft", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def bitfit(options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("bitfit") / "run"
    train(TrainConfig.from_dict({**options, "epochs": 1, "method": "bitfit", "output": str(output)}))
    return output


def test_there_and_back_the_factors_are_the_same_bytes(finished, as_peft, base, tmp_path, data, capsys):
    config = json.loads((as_peft / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert config["base_model_name_or_path"] == base
    convert("--adapter", as_peft, "--to", "lora_jax", "--labels", "neg", "pos", "--output", tmp_path / "back")
    ours, back = (files.read_safetensors(folder / TENSORS) for folder in (finished.adapter, tmp_path / "back"))
    assert ours.keys() == back.keys()
    assert all(ours[name].tobytes() == back[name].tobytes() for name in ours)
    # And it's ready for use.
    capsys.readouterr()
    for folder in (finished.output, tmp_path / "back"):
        assert run("eval", "--adapter", folder, "--test", data["test"], "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second


def test_labels_that_are_the_bases_are_told(as_peft, tmp_path, capsys):
    convert("--adapter", as_peft, "--to", "lora_jax", "--labels", "neg", "pos", "--output", tmp_path / "named")
    assert "doesn't name its labels" not in capsys.readouterr().out
    convert("--adapter", as_peft, "--to", "lora_jax", "--output", tmp_path / "unnamed")
    told = " ".join(capsys.readouterr().out.split())
    assert "The adapter doesn't name its labels. They are placeholders: 'LABEL_0', 'LABEL_1'." in told


def test_a_table_tells_what_was_converted(finished, tmp_path, capsys):
    convert("--adapter", finished.output, "--to", "peft", "--output", tmp_path / "out")
    text = capsys.readouterr().out
    assert "the adapter of a run" in text
    assert "encoder/layers/*/attention/query/kernel/a" in text
    assert "adapter_model.safetensors" in text
    assert "relative error" not in text


def test_a_lower_rank_with_its_errors(finished, tmp_path, capsys):
    convert("--adapter", finished.output, "--rank", 2, "--to", "lora_jax", "--output", tmp_path / "out", "--json")
    report = report_of(capsys)
    saved, small = load_predictor(finished.output), load_predictor(tmp_path / "out")
    before, after = leaves_by_path(saved.params), leaves_by_path(small.params)
    assert report["method"]["rank"] == 2
    for path, fit in report["fits"].items():
        delta = np.asarray(before[path].delta(), np.float64)
        u, sigma, vt = np.linalg.svd(delta)
        best = (u[:, :2] * sigma[:2]) @ vt[:2]
        np.testing.assert_allclose(after[path].delta(), best, atol=1e-5)
        assert fit["full_rank"] == 8
        assert fit["error"] == pytest.approx(np.linalg.norm(delta - best) / np.linalg.norm(delta), rel=1e-3, abs=1e-6)
    assert (tmp_path / "out" / "task.json").read_text() == (finished.adapter / "task.json").read_text()
    convert("--adapter", finished.output, "--energy", 0.9, "--to", "peft", "--output", tmp_path / "other")
    text = capsys.readouterr().out
    assert "relative error" in text
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["r"] < 8


def test_bitfit_becomes_a_delta_that_fits_any_head(bitfit, base, tmp_path, capsys):
    convert("--adapter", bitfit, "--to", "delta", "--output", tmp_path / "delta")
    predictor = load_predictor(bitfit)
    # Whoever loads the base draws another head, and maybe another pooler.
    model = lj.models.load(base, task="classification", num_labels=2, seed=9)
    params = lj.interop.apply_delta(tmp_path / "delta", model.params, names=model.names)
    for path, leaf in leaves_by_path(predictor.params).items():
        np.testing.assert_array_equal(leaves_by_path(params)[path], leaf, err_msg=path)
    # Another base is noticed still.
    other = write_tiny_bert(tmp_path / "other", seed=9, layers=1, hidden=16, heads=2, positions=32)
    model = lj.models.load(other, task="classification", num_labels=2)
    with pytest.raises(lj.AdapterError, match="was trained on another base"):
        lj.interop.apply_delta(tmp_path / "delta", model.params, names=model.names)


def test_what_has_no_place_in_the_other_format_is_one_line(bitfit, finished, tmp_path, capsys):
    assert run("convert", "--adapter", bitfit, "--to", "peft", "--output", tmp_path / "x") == 2
    assert "PEFT has no format for BitFit" in error_of(capsys)
    assert run("convert", "--adapter", bitfit, "--rank", 2, "--to", "lora_jax", "--output", tmp_path / "x") == 2
    assert "`method` is BitFit, and only LoRA has factors of a rank" in error_of(capsys)
    assert not (tmp_path / "x").exists()
    assert list(tmp_path.iterdir()) == []  # nothing half done


def test_a_head_over_the_mean_has_no_class_there(options, tmp_path, capsys):
    train(TrainConfig.from_dict({**options, "epochs": 1, "pooling": "mean", "output": str(tmp_path / "run")}))
    assert run("convert", "--adapter", tmp_path / "run", "--to", "peft", "--output", tmp_path / "x") == 2
    assert "transformers has no class that does" in error_of(capsys)
    assert run("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "x") == 2
    assert "no class of transformers does. It would load the folder, give the head the first token" in error_of(capsys)
    assert not (tmp_path / "x").exists()
    convert("--adapter", tmp_path / "run", "--to", "delta", "--output", tmp_path / "delta")


def test_a_foreign_folder_stays_as_it_is(finished, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run("convert", "--adapter", finished.output, "--to", "peft", "--output", tmp_path) == 2
    assert "isn't a new or empty folder: choose another" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "peft"), "There is nothing to convert: pass either `--adapter`, or `--base` and `--tuned`"),
        (("--to", "peft", "--adapter", "a", "--tuned", "b"), "There is nothing to convert"),
        (("--to", "peft", "--tuned", "b", "--rank", "2"), "`--tuned` needs `--base`"),
        (("--to", "peft", "--tuned", "BASE", "--base", "BASE"), "How much to keep isn't said: pass `--rank`"),
        (("--to", "peft", "--adapter", "a", "--rest", "drop"), "`--rest` can't be combined with `--adapter`"),
        (("--to", "peft", "--adapter", "gone"), "`--adapter` gone doesn't exist"),
        (("--to", "peft", "--adapter", "."), "holds no adapter: neither a run's task.json, nor lora_jax_adapter.json"),
        (("--to", "peft", "--adapter", "BASE"), "is a whole model and no adapter. `lora-jax convert --base BASE"),
        (("--to", "peft", "--tuned", "BASE", "--base", "BASE", "--rank", "2"), "None of the targets differs"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [base if argument == "BASE" else argument for argument in arguments]
    assert run("convert", *arguments, "--output", "x") == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_two_adapters_in_one_folder_are_refused(finished, as_peft, tmp_path, capsys):
    shutil.copytree(finished.adapter, tmp_path / "both")
    shutil.copy(as_peft / "adapter_config.json", tmp_path / "both")
    assert run("convert", "--adapter", tmp_path / "both", "--to", "peft", "--output", tmp_path / "x") == 2
    assert "holds two adapters, task.json and PEFT's adapter_config.json" in error_of(capsys)


# Two full models.


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    """The base fine-tuned: changes of rank 3 in two kinds of weights, a bias, and a head."""
    model = lj.models.load(base, task="classification", num_labels=3)
    method = lj.LoRA(rank=3, alpha=3, targets=("query", "mlp/up"), also_train=("query/bias", "classifier"))
    params = lj.attach(model.params, method, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(
        lambda leaf, trained: leaf + jax.random.normal(next(keys), leaf.shape) if trained else leaf,
        params,
        lj.trainable_mask(params, method),
    )
    folder = tmp_path_factory.mktemp("tuned") / "model"
    return lj.models.save_pretrained(folder, model, lj.merge_params(params), source=base, labels=["x", "y", "z"])


def test_a_lora_out_of_two_models(base, tuned, tmp_path, capsys):
    how = ("--energy", 1, "--to", "lora_jax", "--output", tmp_path / "out")
    convert("--base", base, "--tuned", tuned, *how, "--json")
    report = report_of(capsys)
    assert sorted(report["fits"]) == [
        "encoder/layers/0/attention/query/kernel",
        "encoder/layers/0/mlp/up/kernel",
    ]
    assert all(fit["rank"] == 3 and fit["error"] < 1e-5 for fit in report["fits"].values())
    assert report["carried"] == [
        "classifier/bias",
        "classifier/kernel",
        "encoder/layers/0/attention/query/bias",
    ]
    model = lj.models.load(tuned, task="classification")
    predictor = load_predictor(tmp_path / "out")
    assert predictor.task.labels == ("x", "y", "z")
    ids = jnp.array([[2, 7, 12, 3]])
    ours = lj.models.load(base, task="classification", num_labels=3)
    np.testing.assert_allclose(lj.adapt(ours.apply)(predictor.params, ids), model.apply(model.params, ids), atol=1e-4)


def test_what_changed_elsewhere_is_named(base, tuned, tmp_path, capsys):
    how = ("--base", base, "--tuned", tuned, "--rank", 2, "--targets", "query", "--to", "peft")
    convert(*how, "--rest", "drop", "--output", tmp_path / "out")
    text = capsys.readouterr().out
    assert "two full models" in text
    assert "left out" in text
    assert "classifier.weight" in " ".join(files.read_safetensors(tmp_path / "out" / PEFT_TENSORS))
    assert "encoder/layers/0/mlp/up/kernel" in text
    assert run("convert", *how, "--rest", "error", "--output", tmp_path / "x") == 2
    error = error_of(capsys)
    assert "`encoder/layers/0/mlp/up/kernel`" in error
    assert "classifier" not in error  # which the base lacks: it goes along


def test_models_of_two_kinds_are_refused(base, tmp_path, capsys):
    other = write_tiny_decoder(tmp_path / "gpt2", "gpt2")
    assert (
        run("convert", "--base", base, "--tuned", other, "--rank", 2, "--to", "peft", "--output", tmp_path / "x") == 2
    )
    assert "is a bert, and `--tuned`" in error_of(capsys)


# Decoders: adapters that were saved from Python, in either form of the layers.


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_the_adapter_of_a_decoder_goes_out_and_comes_back(scan, tmp_path, capsys):
    base = write_tiny_decoder(tmp_path / "base", "llama")
    model = lj.models.load(base, task="causal-lm", scan_layers=scan)
    ids = jnp.array([[5, 6, 7, 8]])
    method = lj.LoRA(rank=3, alpha=6, targets=("attention/query", "mlp/down"), also_train=("mlp/norm",))
    uses = lj.trace_weights(model.apply, model.params, ids)
    params = lj.attach(model.params, method, key=jax.random.key(0), uses=uses)
    params = jax.tree.map(
        lambda leaf, trained: leaf + 0.1 if trained else leaf, params, lj.trainable_mask(params, method)
    )
    lj.save_adapter(tmp_path / "ours", params, method)
    source = ("--adapter", tmp_path / "ours", "--base", base)
    convert(*source, "--to", "peft", "--output", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    back = ("--adapter", tmp_path / "peft", "--base", base, "--to", "lora_jax", "--output", tmp_path / "back")
    convert(*back)
    assert run("merge", "--adapter", tmp_path / "peft", "--output", tmp_path / "merged") == 0
    plain = lj.models.load(base, task="causal-lm")
    again = lj.load_adapter(tmp_path / "back", plain.params)
    expected = lj.adapt(model.apply)(params, ids)
    np.testing.assert_allclose(lj.adapt(plain.apply)(again.params, ids), expected, atol=1e-5)
    merged = lj.models.load(tmp_path / "merged", task="causal-lm")
    np.testing.assert_allclose(merged.apply(merged.params, ids), expected, atol=1e-5)


def test_an_adapter_without_a_base_asks_for_it(finished, base, tmp_path, capsys):
    shutil.copytree(finished.adapter, tmp_path / "a")
    (tmp_path / "a" / "task.json").unlink()
    assert run("convert", "--adapter", tmp_path / "a", "--to", "peft", "--output", tmp_path / "x") == 2
    assert "doesn't say its base, as it isn't a run's: pass `--base`" in error_of(capsys)
    convert("--adapter", tmp_path / "a", "--base", base, "--to", "peft", "--output", tmp_path / "x")


# What the other commands make of a PEFT folder.


def test_merge_takes_a_peft_folder(finished, as_peft, tmp_path):
    for source, output in ((finished.output, "ours"), (as_peft, "theirs")):
        assert run("merge", "--adapter", source, "--output", tmp_path / output) == 0
    ours, theirs = (files.read_safetensors(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_predict_and_eval_say_how_to_convert_one(command, as_peft, data, capsys):
    test = ("--test", data["test"]) if command == "eval" else (data["test"],)
    assert run(command, "--adapter", as_peft, *test) == 2
    told = f"it is a PEFT adapter; convert it with `lora-jax convert --adapter {as_peft} --to lora_jax"
    assert told in error_of(capsys)


def test_inspect_a_peft_folder(finished, as_peft, capsys):
    assert run("inspect", as_peft) == 0
    text = capsys.readouterr().out
    assert "PEFT's LORA" in text
    assert "attention.self.query × 1 (rank 8)" in text
    assert "yes, onto its base" in text
    assert "`modules_to_save` is classifier, and vLLM takes no module trained in full." in text
    assert run("inspect", "--adapter", as_peft, "--json") == 0
    report = report_of(capsys)
    saved = files.read_safetensors(as_peft / PEFT_TENSORS)
    assert {tensor["name"] for tensor in report["tensors"]} == saved.keys()
    assert report["refusal"] is None
    assert report["unchecked"] is None
    assert len(report["vllm"]) == 1


def edited(folder: Path, source: Path, **entries: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **entries}))
    return folder


@pytest.mark.parametrize(
    ("entries", "flags", "read", "vllm"),
    [
        ({"use_dora": True}, (), "no: ", "vLLM has plain LoRA only, and this is `use_dora`"),
        ({"peft_type": "OFT"}, (), "no: ", "vLLM has LoRA only"),
        ({"base_model_name_or_path": None}, (), "not checked against its base: ", "`modules_to_save`"),
        ({"base_model_name_or_path": "gone/gone"}, (), "not checked against its base: The base model", ""),
        (
            {},
            ("--max-lora-rank", "1"),
            "yes",
            "The rank is 8, and vLLM takes up to 1: start it with `--max-lora-rank 8`",
        ),
    ],
)
def test_inspect_tells_what_is_refused(entries, flags, read, vllm, as_peft, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = edited(tmp_path / "edited", as_peft, **entries)
    assert run("inspect", folder, *flags) == 0
    text = capsys.readouterr().out
    assert f"lora_jax reads it  {read}" in text
    assert vllm in text


def test_inspect_names_a_target_that_the_base_has_not(as_peft, tmp_path, capsys):
    folder = edited(tmp_path / "edited", as_peft)
    tensors = files.read_safetensors(folder / PEFT_TENSORS)
    renamed = {name.replace(".query.", ".qkv."): tensor for name, tensor in tensors.items()}
    files.write_safetensors(folder / PEFT_TENSORS, renamed)
    assert run("inspect", folder) == 0
    text = capsys.readouterr().out
    assert "lora_jax reads it  no: " in text
    assert "belongs to the weight of bert.encoder.layer.0.attention.self.qkv" in text


def test_inspect_asks_for_one_folder(as_peft, tmp_path, base, capsys):
    assert run("inspect", as_peft, "--adapter", as_peft) == 2
    assert "Two folders to inspect are given" in error_of(capsys)
    assert run("inspect", base) == 2
    assert "is a whole model and no adapter" in error_of(capsys)
