"""The commands on a language model: from a file of prompts and completions to written texts, and to transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.cli.main import main
from lora_jax.inference.complete import GenerationOptions, load_completer
from lora_jax.training.errors import DataError
from lora_jax.training.task_file import read_task
from tests.tiny_language import write_language_base, write_pairs


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def paths(folder) -> dict[str, str]:
    return {
        "base": write_language_base(folder / "base"),
        "train": write_pairs(folder / "train.jsonl", 48),
        "test": write_pairs(folder / "test.jsonl", 12, seed=1),
    }


@pytest.fixture(scope="module")
def adapter(folder, paths) -> Path:
    (folder / "run.yaml").write_text(
        f"task: causal-lm\nbase: {paths['base']}\ntrain: {paths['train']}\nprompt: question\ncompletion: answer\n"
        "max_length: 32\nbuckets: 1\nmethod: {name: full}\ndropout: 0.0\n"
    )
    flags = ("--test", paths["test"], "--epochs", 12, "--batch-size", 4, "--lr", "1e-2")
    assert run("train", "--config", folder / "run.yaml", *flags, "--output", folder / "out") == 0
    return folder / "out"


def test_train_then_eval_gives_the_same_perplexity(adapter, paths, capsys):
    results = json.loads((adapter / "results.json").read_text())
    assert results["metrics"]["test"]["perplexity"] < 4
    assert read_task(adapter / "adapter").columns.prompt == "question"
    capsys.readouterr()
    assert run("eval", "--adapter", adapter, "--test", paths["test"], "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["perplexity"] == pytest.approx(results["metrics"]["test"]["perplexity"], rel=1e-5)
    assert (scored["rows"], scored["truncated"], scored["dropped"]) == (12, 0, 0)


def test_eval_writes_and_compares(adapter, paths, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    capsys.readouterr()
    flags = ("--generate", "--max-new-tokens", 8, "--predictions", tmp_path / "written.jsonl")
    assert run("eval", "--adapter", adapter, "--test", paths["train"], *flags, "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    written = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    questions = [json.loads(line)["question"] for line in Path(paths["train"]).read_text().splitlines()]
    # Rows that share a prompt are one, with all their references.
    assert [row["prompt"] for row in written] == [f"{question}\n" for question in dict.fromkeys(questions)]
    assert [len(row["references"]) for row in written] == [questions.count(row["prompt"].strip()) for row in written]
    right = np.mean([row["completion"] in row["references"] for row in written])
    assert right > 0.6
    assert 100 * right <= scored["rouge_l"] + 1e-6 <= 100
    assert scored["prompts"] == len(written)
    assert run("eval", "--adapter", adapter, "--test", paths["test"], "--generate", "--limit", 2, *flags[1:3]) == 0
    out = capsys.readouterr().out
    assert "to 2 prompts" in out
    assert "bleu" in out


def test_predict_continues_lines_and_jsonl(adapter, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the film was love\n\nbroken\n")))
    assert run("predict", "--adapter", adapter, "--max-new-tokens", 8) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["the film was love", "broken"]
    written = load_completer(adapter).complete(["the film was love\n", "broken\n"], GenerationOptions(max_new_tokens=8))
    assert [row["completion"] for row in rows] == [completion.text for completion in written]
    assert rows[1]["completion"].strip() == "sorry"

    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 3, "question": "broken", "completion": "old"}) + "\n")
    flags = ("--max-new-tokens", 4, "--num-beams", 2, "--no-repeat-ngram", 2)
    assert run("predict", "--adapter", adapter, tmp_path / "a.jsonl", *flags) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (row["id"], row["given_completion"]) == (3, "old")
    drawn = ("--temperature", 5.0, "--top-k", 50, "--top-p", 0.99, "--max-new-tokens", 8)
    texts = []
    for seed in (1, 1, 2):
        assert run("predict", "--adapter", adapter, tmp_path / "a.jsonl", *drawn, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_completions_do_not_depend_on_who_is_beside(adapter):
    completer = load_completer(adapter)
    prompts = [f"{words} broken\n" for words in ("", "the", "the film was the film was the film", "the film")]
    together = completer.complete(prompts, GenerationOptions(max_new_tokens=6, batch_size=3))
    alone = [completer.complete([prompt], GenerationOptions(max_new_tokens=6, batch_size=1))[0] for prompt in prompts]
    assert together == alone
    assert all(completion.ended == (completion.tokens < 6) or completion.tokens == 6 for completion in together)
    assert completer.complete([]) == []
    with pytest.raises(DataError, match=r"prompt 2 has \d+ tokens, which with `max_new_tokens` 40 is more than the"):
        completer.complete(["a", "the film was " * 8], GenerationOptions(max_new_tokens=40))


def test_merge_writes_what_the_adapted_model_computes(adapter, tmp_path):
    assert run("merge", "--adapter", adapter, "--output", tmp_path / "merged") == 0
    merged = lj.models.load(tmp_path / "merged", task="causal-lm")
    assert files.read_json(tmp_path / "merged" / "config.json")["architectures"] == ["GPT2LMHeadModel"]
    completer = load_completer(adapter)
    ids = np.arange(5, 15)[None]
    ours = lj.adapt(merged.apply)(completer.params, ids)
    np.testing.assert_allclose(merged.apply(merged.params, ids), ours, atol=1e-4)


def test_inspect_foretells_what_is_trained(paths, folder, capsys):
    flags = ("--task", "causal-lm", "--base", paths["base"], "--targets", "query_key_value", "--rank", 2)
    assert run("inspect", *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable"] == 2 * (16 + 3 * 16)
    assert [group["pattern"] for group in report["groups"]] == [
        "layers/*/attention/query_key_value/kernel/a",
        "layers/*/attention/query_key_value/kernel/b",
    ]


def test_a_conversation_is_trained_on_and_answered(paths, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in Path(paths["train"]).read_text().splitlines()]
    talks = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows[:8]
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    flags = ("--task", "causal-lm", "--base", paths["base"], "--messages", "messages", "--max-length", 48)
    flags += ("--steps", 1, "--buckets", 1, "--batch-size", 2)
    assert run("train", *flags, "--train", path, "--output", tmp_path / "out") == 0
    assert "loss on the assistant's answers" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": talks[0]["messages"][:1]}) + "\n")
    assert run("predict", "--adapter", tmp_path / "out", tmp_path / "in.jsonl", "--max-new-tokens", 2) == 0
    as_messages = json.loads(capsys.readouterr().out)["completion"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(rows[0]["question"].encode())))
    assert run("predict", "--adapter", tmp_path / "out", "--max-new-tokens", 2) == 0
    assert json.loads(capsys.readouterr().out)["completion"] == as_messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--label", "y"), "`--label` is for classification and regression, and `--task` is causal-lm"),
        (("train", "--prompt", "question"), "`--prompt` is given without `--completion`"),
        (("train", "--prompt", "question", "--completion", "x"), "has no column 'x'; its columns are"),
        (
            ("eval", "--limit", "2"),
            "`--limit` are for generated completions: pass `--generate` too",
        ),
        (("eval", "--label", "y"), "`--label` is for classification and regression, and `task` is causal-lm"),
        (("eval", "--generate", "--prompt", "gone"), "has no column 'gone'"),
        (("predict", "--all"), "`--all` is for adapters with labels"),
        (("predict", "--top-k", "3"), "`--top-k` applies to sampling: pass a `--temperature` above 0"),
        (("predict", "--max-new-tokens", "0"), "`--max-new-tokens` must be an integer of at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[Any, ...], message, adapter, paths, tmp_path, capsys):
    command, *flags = arguments
    if command == "train":
        flags += ["--task", "causal-lm", "--base", paths["base"], "--train", paths["train"], "--output", tmp_path / "o"]
    elif command == "eval":
        flags += ["--adapter", adapter, "--test", paths["test"]]
    else:
        (tmp_path / "in.txt").write_text("good\n")
        flags = ["--max-new-tokens", 8, *flags, "--adapter", adapter, tmp_path / "in.txt"]
    capsys.readouterr()
    assert run(command, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_special_tokens_in_a_prompt_are_told_and_escaped(adapter, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("good </s>\nthe film\n")
    arguments = ("predict", "--adapter", adapter, tmp_path / "prompts.txt", "--max-new-tokens", 3)
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert "note: 1 of 2 texts spell out special tokens: '</s>'" in captured.err
    assert "`--escape-special-tokens` takes them as plain text" in captured.err
    assert run(*arguments, "--escape-special-tokens") == 0
    escaped = capsys.readouterr()
    assert "note" not in escaped.err
    assert len(escaped.out.splitlines()) == 2
    assert "\ufdd0" not in escaped.out

    rows = [{"question": "good </s>", "answer": "great</s>"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--test", tmp_path / "rows.jsonl", "--generate", "--max-new-tokens", 3, "--escape-special-tokens")
    assert run("eval", "--adapter", adapter, *flags, "--predictions", tmp_path / "written.jsonl", "--json") == 0
    (written,) = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert (written["prompt"], written["references"]) == ("good </s>\n", ["great</s>"])
    completer = load_completer(adapter)
    assert not completer.escape_special_tokens
