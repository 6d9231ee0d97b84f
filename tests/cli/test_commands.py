"""Every command, from its flags to what it prints."""

from __future__ import annotations

import ast
import errno
import gc
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.cli import demo
from lora_jax.cli.main import main, make_parser
from lora_jax.errors import ArgumentError, ArgumentTypeError
from lora_jax.training import load_predictor
from lora_jax.training.config import OPTIONS, RunConfig, resolve
from lora_jax.training.config_file import read_yaml
from lora_jax.training.errors import ConfigError, DataError

COMMANDS = ("train", "eval", "predict", "merge", "convert", "inspect", "compare", "analyze", "demo")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_well(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"lora-jax {command}" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_common_flags_come_first(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    text = capsys.readouterr().out
    places = [
        text.index(f"\n  {flag}") for flag in ("--train", "--lr", "--output", "--separator", "--buckets", "--hidden")
    ]
    assert places == sorted(places)


def test_every_option_of_a_run_is_a_flag():
    flags = make_parser().parse_args(["train"]).flags
    assert {name: flags.get(name) for name in OPTIONS} == {name: f"--{name.replace('_', '-')}" for name in OPTIONS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--trian", "a.tsv"), "there is no flag --trian; the nearest is --train."),
        (("train", "--bach-size=3"), "there is no flag --bach-size; the nearest is --batch-size."),
        (("train", "-lr", "3"), "there is no flag -lr; the nearest is --lr."),
        (("merge", "--adaptor", "x"), "there is no flag --adaptor; the nearest is --adapter."),
        (("eval", "--qqqq"), "there is no flag --qqqq; `lora-jax eval --help` lists them all."),
        (("demo", "extra"), "unexpected arguments: extra"),
        (("trian",), "there is no command trian; the nearest is train."),
    ],
)
def test_a_mistyped_flag_is_told_with_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    command = arguments[0] if arguments[0] in COMMANDS else ""
    assert error.startswith(f"usage: lora-jax {command}")


def test_the_beginning_of_a_flag_is_enough():
    assert parsed("--train", "a", "--outp", "b", "--epoch=3", "--weight", "0.1").epochs == 3


def test_messages_of_the_library_name_arguments():
    """A whole command in backticks may be named; a flag of ours alone is the command line's word."""
    root = Path(lj.__file__).parent
    named = []
    for file in sorted(root.rglob("*.py")):
        if file.is_relative_to(root / "cli") or file.name == "vllm.py":  # vLLM's flags
            continue
        tree = ast.parse(file.read_text("utf-8"))
        raised = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant))
        for text in raised:
            rest = re.sub(r"`(lora-jax|pip) [^`]*`?", "", text)
            if text[0] in "'\"f" and re.search(r"`--[a-z]|^f['\"]--\{", rest):
                named.append(f"{file.name}: {text:.100}")
    assert named == []


def test_messages_become_flags_on_the_command_line(tmp_path, capsys):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\ngood\n")
    assert run("train", "--train", tmp_path / "a.tsv", "--output", tmp_path / "out") == 2
    assert "leave it out with `--skip-bad-rows`" in capsys.readouterr().err
    assert run("train", "--train", "a", "--output", "b", "--lora-dropout", 2) == 2
    assert "`--method` lora: `--lora-dropout` must" in capsys.readouterr().err
    assert run("train", "--train", "a", "--output", "b", "--dropout", 2) == 2
    assert "`--dropout` must be a number" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_python_dash_m():
    process = subprocess.run([sys.executable, "-m", "lora_jax", "--help"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0
    assert process.stdout.startswith("usage: lora-jax")


def test_help_imports_nothing_heavy():
    # Beyond what `import lora_jax` itself needs.
    code = (
        "import sys; from lora_jax.cli.main import make_parser; make_parser().format_help(); "
        "print([m for m in ('flax', 'orbax', 'grain', 'datasets', 'sklearn', 'rich', 'yaml') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "[]", process.stderr


def parsed(*arguments) -> RunConfig:
    from lora_jax.cli.options import make_config

    return resolve(make_config(make_parser().parse_args(["train", *arguments])))


def test_flags_become_a_config():
    config = parsed(
        *("--train", "a.tsv", "--output", "out", "--text", "sentence", "--text-pair", "b", "--label", "y"),
        *("--method", "lora", "--rank", "4", "--alpha", "2", "--targets", "query", "value", "--lora-dropout", "0.1"),
        *("--lr", "lora_a=1e-3,lora_b=2e-3,head=1e-2", "--clip-norm", "none", "--dropout", "0", "--seed", "3"),
        *("--schedule", "cosine", "--warmup", "0.1", "--accumulate", "4", "--steps", "9", "--tensorboard"),
    )
    assert (config.text, config.text_pair, config.label) == ("sentence", "b", "y")
    assert config.method == lj.LoRA(
        rank=4, alpha=2, targets=("query", "value"), dropout=0.1, also_train=("classifier",)
    )
    assert config.lr == {"lora_a": 1e-3, "lora_b": 2e-3, "head": 1e-2}
    assert (config.clip_norm, config.dropout, config.seed, config.steps, config.tensorboard) == (None, 0.0, 3, 9, True)


def test_flags_of_lora_plus_and_vera(tmp_path):
    data = ("--train", "a.tsv", "--output", "out")
    assert parsed(*data, "--lora-plus-ratio", "16").lora_plus_ratio == 16.0
    method = parsed(*data, "--method", "vera", "--d-initial", "0.5", "--projection-seed", "3").method
    assert isinstance(method, lj.VeRA)
    assert (method.d_initial, method.projection_seed) == (0.5, 3)
    (tmp_path / "config.yaml").write_text("lora_plus_ratio: 8\nmethod: dora\n")
    assert parsed(*data, "--config", str(tmp_path / "config.yaml")).lora_plus_ratio == 8.0


def test_one_preset_is_a_preset_and_names_are_names():
    for given, wanted in (("mlp", "mlp"), ("query", ("query",))):
        method = parsed("--train", "a", "--output", "b", "--targets", given).method
        assert isinstance(method, lj.LoRA)
        assert method.targets == wanted


def test_flags_go_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: a.tsv\noutput: out\nseed: 1\nmethod: {name: lora, rank: 2, alpha: 4}\n")
    config = parsed("--config", str(path), "--seed", "2", "--alpha", "8")
    assert isinstance(config.method, lj.LoRA)
    assert (config.seed, config.method.rank, config.method.alpha) == (2, 2, 8)
    bitfit = parsed("--config", str(path), "--method", "bitfit").method
    assert isinstance(bitfit, lj.BitFit)
    assert bitfit.targets == "all"


def test_train_eval_predict_merge(options, data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    flags = [f for key in ("train", "dev", "test", "base") for f in (f"--{key}", options[key])]
    flags += ["--output", output, "--epochs", 5, "--batch-size", 8, "--lr", 3e-2, "--dropout", 0.02, "--buckets", 1]
    assert run("train", *flags) == 0
    captured = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    assert f"{results['trainable']:,} of {results['total']:,} parameters" in captured.out
    assert f"accuracy {100 * results['metrics']['test']['accuracy']:.1f} %" in captured.out
    assert "step 40/40" in captured.err
    assert read_yaml(output / "config.yaml")["lr"] == 0.03

    assert run("eval", "--adapter", output, "--test", data["test"], "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["accuracy"] == pytest.approx(results["metrics"]["test"]["accuracy"])
    assert scored["rows"] == 12
    assert run("eval", "--adapter", output, "--test", data["test"]) == 0
    assert f"accuracy {100 * scored['accuracy']:.1f} %" in capsys.readouterr().out

    assert run("merge", "--adapter", output, "--output", tmp_path / "merged") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert run("merge", "--adapter", output, "--output", tmp_path / "parts", "--max-shard-size", "20kB") == 0
    assert "model.safetensors.index.json" in capsys.readouterr().out
    assert (tmp_path / "merged" / "tokenizer.json").exists()

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good great\n\nbad poor hate\n")))
    assert run("predict", "--adapter", output) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == [("good great", "pos"), ("bad poor hate", "neg")]


def rows_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_reads_jsonl_and_passes_fields_through(finished, tmp_path, capsys):
    lines = [{"id": 7, "text": "good great", "label": "old"}, {"id": 8, "text": "naïve", "probability": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run("predict", "--adapter", finished.output, "--all", tmp_path / "a.jsonl") == 0
    first, second = rows_of(capsys)
    expected = load_predictor(finished.output).predict(["good great"])[0]
    assert first["label"] == expected.label
    assert first["probability"] == pytest.approx(expected.probability)
    assert list(first["probabilities"]) == ["neg", "pos"]
    assert (first["id"], first["given_label"]) == (7, "old")
    assert (second["id"], second["text"], second["given_probability"]) == (8, "naïve", 2)


def test_predict_keeps_every_field_of_the_input(finished, tmp_path, capsys):
    """What an earlier prediction wrote is input too."""
    row = {"text": "good", "label": "a", "given_label": "b", "given_given_label": "c", "probabilities": "d"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert run("predict", "--adapter", finished.output, "--all", tmp_path / "a.jsonl") == 0
    (found,) = rows_of(capsys)
    kept = {"given_given_given_label": "a", "given_label": "b", "given_given_label": "c", "given_probabilities": "d"}
    assert found == {"text": "good", **kept, **{k: found[k] for k in ("label", "probability", "probabilities")}}
    assert set(found["probabilities"]) == {"neg", "pos"}


def test_bad_rows_are_left_out_on_request(options, finished, tmp_path, capsys, monkeypatch):
    rows = b"text\tlabel\n" + b"good\tpos\nbad\tneg\n" * 8 + b"good\n\xff\tpos\n \tneg\ngreat\tpos\n"
    (tmp_path / "a.tsv").write_bytes(rows)
    told = "3 of 20 rows skipped: row 17 (line 18) has 1 fields, and the header has 2: text, label; row 18 (line 19)"
    flags = ("--base", options["base"], "--steps", 1, "--batch-size", 8, "--buckets", 1, "--train", tmp_path / "a.tsv")
    assert run("train", *flags, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"a.tsv has 3 bad rows: {told.partition(': ')[2]}" in error
    assert error.count("\n") == 1
    assert run("train", *flags, "--output", tmp_path / "out", "--skip-bad-rows") == 0
    assert f"train: {told}" in capsys.readouterr().err
    assert read_yaml(tmp_path / "out" / "config.yaml")["skip_bad_rows"] is True

    flags = ("--adapter", finished.output, "--test", tmp_path / "a.tsv")
    assert run("eval", *flags) == 2
    assert "a.tsv has 3 bad rows" in capsys.readouterr().err
    assert run("eval", *flags, "--skip-bad-rows") == 0
    assert re.search(r"^bad rows +3 left out$", capsys.readouterr().out, re.MULTILINE)
    assert run("eval", *flags, "--skip-bad-rows", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["rows"], scored["skipped"]) == (17, 3)

    assert run("predict", "--adapter", finished.output, "--skip-bad-rows", tmp_path / "a.tsv") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 17
    assert f"lora-jax predict: {told}" in captured.err

    lines = b'{"text": "good"}\n\n{"text": 3}\nno\n{"text": "bad", "x": NaN}\n{"text": "bad"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert run("predict", "--adapter", finished.output, "--skip-bad-rows", "--jsonl") == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["text"] for line in captured.out.splitlines()] == ["good", "bad"]
    assert "lora-jax predict: 3 of 5 rows skipped: line 3: field 'text' must be a text, got 3" in captured.err


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "-"])
def test_predict_takes_the_line_ends_of_data_files(name, end, finished, tmp_path, monkeypatch, capsys):
    lines = ["good", "bad"] if name == "a.txt" else ['{"text": "good"}', '{"text": "bad"}']
    content = b"\xef\xbb\xbf" + "".join(line + end for line in lines).encode()
    (tmp_path / "a.txt").with_name(name).write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    source = ("--jsonl", "-") if name == "-" else (tmp_path / name,)
    assert run("predict", "--adapter", finished.output, *source) == 0
    assert [row["text"] for row in rows_of(capsys)] == ["good", "bad"]


def test_predict_says_what_it_cut(finished, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("good " * 100_000 + "\nbad\n" + "bad " * 50)
    assert run("predict", "--adapter", finished.output, tmp_path / "a.txt") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert "lora-jax predict: 2 texts truncated to 32 tokens" in captured.err


def test_predict_reads_columns(finished, data, capsys):
    assert run("predict", "--adapter", finished.output, data["test"]) == 0
    assert len(rows_of(capsys)) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone.txt doesn't exist"),
        ("a.txt", b"good\n\xff\n", "a.txt, line 2 is not UTF-8: byte 1 of the line is 0xff"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' must be a text, got 3. The fields are text"),
        ("a.jsonl", b"good\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "x": NaN}\n', "line 2 has a NaN or an infinity, which JSON lacks"),
        ("a.jsonl", b'{"text": "a", "x": [-1e999]}\n', "line 1 has a NaN or an infinity, which JSON lacks"),
        ("a.jsonl", b'{"text": "a", "label": 1, "label": 2}\n', "line 1 has the name 'label' more than once"),
        ("a.jsonl", b'\n{"text": "a\\ud800"}\n', "line 2 has half a character (the lone surrogate \\ud800)"),
        (
            "a.jsonl",
            b'{"text": "a", "x": {"\\udfff": 1}}\n',
            "line 1 has half a character (the lone",
        ),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"1" * 5000 + b"}", "line 1 has a number with thousands of digits"),
        ("a.tsv", b"sentence\ngood\n", "has no column 'text'"),
    ],
)
def test_predict_tells_what_is_wrong_with_the_input(name, content, message, finished, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("predict", "--adapter", finished.output, tmp_path / name) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-jax predict: error: ")
    assert message in error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't wait for a pipe with a limit")
def test_predict_answers_what_has_arrived(finished):
    """Standard input stays open: the next line depends on the answer to the one before."""
    command = [sys.executable, "-m", "lora_jax", "predict", "--adapter", str(finished.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        watchdog = threading.Timer(240, process.kill)  # in place of waiting for ever
        watchdog.start()
        assert process.stdin is not None
        assert process.stdout is not None
        for lines, answers in ((b"good great\n", 1), (b"bad poor\r\n\nlove", 1), (b" thanks\nhate\n", 2)):
            process.stdin.write(lines)
            for _ in range(answers):
                assert json.loads(process.stdout.readline())["label"] in ("pos", "neg")
        process.stdin.write(b"no line end")
        process.stdin.close()
        assert json.loads(process.stdout.read())["text"] == "no line end"
        assert process.wait(timeout=60) == 0
        watchdog.cancel()


def test_predict_never_prints_nan(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lora_jax.inference.classify.predict_outputs", lambda *args, **kw: np.array([[0.0, 1.0], [np.nan, 0.0]])
    )
    (tmp_path / "a.txt").write_text("good\nbad\n")
    assert run("predict", "--adapter", finished.output, tmp_path / "a.txt") == 2
    captured = capsys.readouterr()
    assert "The model gives NaN or an infinity for text 2 of 2" in captured.err
    assert captured.out == ""


def test_predict_of_pairs_needs_fields(finished, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("good\n")
    assert run("predict", "--adapter", finished.output, "--text-pair", "b", tmp_path / "a.txt") == 2
    assert "takes pairs: give JSONL with the fields 'text' and 'b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "text"), "`--prompt` is for causal-lm, and `task` is classification"),
        (("--top-k", 3), "`--top-k` is for adapters of a causal-lm, and this one is of a classification"),
        (("--generate",), "`--generate` is for adapters of a causal-lm"),
        (("--limit", 3), "`--limit` is for adapters of a causal-lm"),
    ],
)
def test_an_adapter_with_labels_writes_nothing(flags, message, finished, data, capsys):
    assert run("eval", "--adapter", finished.output, "--test", data["test"], *flags) == 2
    assert message in capsys.readouterr().err


def test_eval_names_an_unknown_label(finished, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("text\tlabel\ngood\tpos\nbad\tawful\n")
    assert run("eval", "--adapter", finished.output, "--test", tmp_path / "a.tsv") == 2
    assert "a.tsv, row 2 has the label 'awful'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["frozen", "bitfit", "lora", "dora", "ia3", "vera", "adapter", "prefix", "full", "random-subspace"]
)
def test_inspect_foretells_what_is_saved(method, base, data, options, tmp_path, capsys):
    flags = ("--base", base, "--method", method, "--train", data["train"])
    assert run("inspect", *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert run("train", *flags, "--steps", 1, "--output", tmp_path / "out", "--dropout", 0.02, "--buckets", 1) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (report["trainable"], report["total"]) == (results["trainable"], results["total"])
    saved = files.read_safetensors(tmp_path / "out" / "adapter" / "adapter.safetensors")
    assert report["adapter_bytes"] == sum(tensor.nbytes for tensor in saved.values())
    # The rest of the file is its header: names, dtypes, shapes and places.
    header = results["adapter_bytes"] - report["adapter_bytes"]
    assert 0 < header < 150 * (len(saved) + 1)
    assert sum(group["params"] for group in report["groups"]) == report["trainable"]
    assert sum(params for params, _ in report["per_label"].values()) == report["total"]
    # Two moments of every trained number, and a counter or two a label.
    assert 0 <= report["optimizer_bytes"] - 2 * report["trainable_bytes"] <= 64
    capsys.readouterr()
    assert run("inspect", *flags) == 0
    assert f"{report['trainable']:,} of {report['total']:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("method", [("adapter", "--placement", "pfeiffer", "--size", 2), ("prefix", "--hidden", 4)])
def test_what_is_inserted_predicts_and_is_not_merged(method, base, data, tmp_path, capsys):
    """A prefix's network is folded before it is saved; the test score was that of the network."""
    flags = ("--base", base, "--method", *method, "--train", data["train"], "--test", data["test"])
    assert run("train", *flags, "--steps", 2, "--output", tmp_path / "out", "--buckets", 1) == 0
    trained = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["test"]
    capsys.readouterr()
    assert run("eval", "--adapter", tmp_path / "out", "--test", data["test"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained["loss"], rel=1e-4)
    assert run("inspect", "--adapter", tmp_path / "out") == 0
    assert "table" not in capsys.readouterr().out
    assert run("merge", "--adapter", tmp_path / "out", "--output", tmp_path / "merged") == 2
    assert "there is nothing to fold them into. Keep the adapter beside its base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run("analyze", tmp_path / "out") == 0


def test_inspect_an_adapter(finished, capsys):
    assert run("inspect", "--adapter", finished.output, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    saved = files.read_safetensors(finished.adapter / "adapter.safetensors")
    assert report["method"]["name"] == "LoRA"
    assert {t["name"]: t["norm"] for t in report["tensors"]} == pytest.approx(
        {name: float(np.linalg.norm(tensor)) for name, tensor in saved.items()}, rel=1e-5
    )
    assert run("inspect", "--adapter", finished.output) == 0
    text = capsys.readouterr().out
    assert "labels       neg, pos" in text
    assert "classifier/kernel" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--output", "x"), "`--train` is missing"),
        (("train", "--train", "gone.tsv", "--output", "x"), "gone.tsv doesn't exist"),
        (("train", "--train", "a.tsv", "--output", "x", "--rank", "0"), "`--rank` must be a positive integer"),
        (("train", "--train", "a", "--output", "x", "--method", "bitfit", "--rank", "4"), "no option of bitfit"),
        (("train", "--config", "gone.yaml"), "gone.yaml doesn't exist"),
        (("merge", "--adapter", "gone", "--output", "x"), "`--adapter` gone doesn't exist"),
        (("inspect", "--targets", "qurey"), "`--targets`"),
        (("inspect", "--rank", "5000"), "`--rank` 5000 is larger than"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "inspect":
        arguments = (*arguments, "--base", base)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lora-jax {arguments[0]}: error: ")
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match=r"doesn't exist"):
        run("train", "--train", tmp_path / "gone.tsv", "--output", "x", "--traceback")


@pytest.mark.parametrize(
    "defect",
    [
        lambda: int("x"),
        lambda: list(zip([1], [], strict=True)),
        lambda: {}["key"],
        lambda: max(1, None),  # pyright: ignore[reportCallIssue, reportArgumentType]
        lambda: os.close(-1),
        lambda: (_ for _ in ()).throw(ZeroDivisionError),
    ],
)
def test_a_defect_in_the_library_has_its_traceback(defect, monkeypatch):
    """Whatever its class, and though the innermost frame is the library's."""
    from lora_jax.tools import inspect

    # As if it stood in the library's own code.
    planted = types.FunctionType(defect.__code__, {**vars(inspect), "os": os})
    monkeypatch.setattr(inspect, "inspect_adapter", lambda *_: planted())
    monkeypatch.setattr("lora_jax.tools.source.folder_kind", lambda *_: "adapter")
    with pytest.raises((ValueError, KeyError, TypeError, OSError, ZeroDivisionError)):
        run("inspect", "--adapter", "x")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_a_thread_is_seen(monkeypatch):
    from lora_jax.cli import inspect

    seen = []

    class Left:
        def __del__(self):
            int("left")

    def broken(args):
        thread = threading.Thread(target=lambda: int("x"))
        thread.start()
        thread.join()
        Left()
        gc.collect()

    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(str(args.exc_value)))
    monkeypatch.setattr(inspect, "run", broken)
    assert run("inspect") == 0
    assert seen == [f"invalid literal for int() with base 10: '{text}'" for text in ("x", "left")]


def test_messages_of_orbax_threads_about_a_failed_save_are_left_out(monkeypatch):
    from lora_jax.cli import inspect

    def broken(args):
        theirs: dict[str, Any] = {"__name__": "orbax.checkpoint.handler"}
        exec("def save():\n    raise OSError('disk full')", theirs)
        thread = threading.Thread(target=theirs["save"])
        thread.start()
        thread.join()

    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setattr(inspect, "run", broken)
    assert run("inspect") == 0
    assert seen == []


@pytest.mark.parametrize(
    "error",
    [
        lj.LoraJaxError("a message"),
        ArgumentError("a message"),
        ArgumentTypeError("a message"),
        lj.AdapterError("a message"),
        lj.SelectionError("a message"),
        files.FileError("a message"),
        files.BusyError("a message"),
        ConfigError("a message"),
        DataError("a message"),
        FileNotFoundError(errno.ENOENT, "a message"),
        PermissionError(errno.EACCES, "a message"),
        OSError(errno.ENOSPC, "a message"),
    ],
)
def test_what_is_raised_on_purpose_is_one_line(error, monkeypatch, capsys):
    from lora_jax.cli import inspect

    def refuse(args):
        raise error

    monkeypatch.setattr(inspect, "run", refuse)
    assert run("inspect") == 2
    said = capsys.readouterr().err
    assert said.startswith("lora-jax inspect: error: ")
    assert "a message" in said
    assert said.count("\n") == 1


def test_a_missing_extra_says_how_to_get_it(monkeypatch, capsys):
    from lora_jax.cli import train

    def without(args):
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr(train, "run", without)
    assert run("train") == 2
    assert "grain is not installed: pip install 'lora_jax[train]'" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    from lora_jax.cli import train

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert run("train") == 130
    assert "Run the same command to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(base, tmp_path, capsys):
    started = time.monotonic()
    assert run("demo", "--base", base, "--epochs", 1, "--output", tmp_path / "demo") == 0
    text = capsys.readouterr().out
    for method in demo.METHODS:
        assert f"\n {method} " in text
    assert "96 of 96 test predictions" in text
    assert all(sentence in text for sentence in demo.SENTENCES)
    assert time.monotonic() - started < 300


EVIL = "\x1b[2J\x1b]0;title\x07[red]x[/y]"
SHOWN = r"\x1b[2J\x1b]0;title\x07[red]x[/y]"


def test_names_of_an_adapter_from_elsewhere_are_shown_and_not_obeyed(tmp_path, capsys):
    tensors = {f"base_model.model.m{EVIL}.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    config = {"peft_type": f"LORA{EVIL}", "r": 2, "lora_alpha": 2, "target_modules": [EVIL], EVIL: EVIL}
    files.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    run("inspect", tmp_path)
    text = capsys.readouterr().out
    assert SHOWN in text.replace("\n", "")
    assert all(line.isprintable() for line in text.splitlines())


def test_an_error_is_one_line_that_no_terminal_obeys(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f'"{EVIL}": 1\n'.replace("\x1b", "\\e").replace("\x07", "\\a"))
    assert run("train", "--config", tmp_path / "c.yaml") == 2
    text = capsys.readouterr().err
    assert SHOWN in text
    assert len(text.splitlines()) == 1
    assert text.rstrip("\n").isprintable()


def test_what_predict_passes_on_is_json_that_no_terminal_obeys(finished, tmp_path, capsys):
    given = {"text": "good film \x9b2J\u202e", f"k{EVIL}": [EVIL, "größer"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(given) + "\n")
    assert run("predict", "--adapter", finished.output, tmp_path / "in.jsonl") == 0
    line = capsys.readouterr().out.rstrip("\n")
    assert line.isprintable()
    assert "größer" in line
    answered = json.loads(line)
    assert {name: answered[name] for name in given} == given
