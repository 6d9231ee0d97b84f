"""Whole runs of a language model: what is learnt, that packing changes nothing, that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import files
from lora_jax.inference.complete import load_completer
from lora_jax.training import ConfigError, RunFolderError, TrainConfig, TrainingError, load_predictor, train
from lora_jax.training.config import resolve
from lora_jax.training.data.batching import AnyBatch, plan_in_order
from lora_jax.training.data.documents import read_documents
from lora_jax.training.run.evaluate import make_forward, predict_outputs
from lora_jax.training.run.setup import prepare_run
from lora_jax.training.run.step import make_step
from lora_jax.training.task import CausalLM
from tests.tiny_language import write_language_base, write_pairs
from tests.training.test_resume import assert_same_adapter, run


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("language")
    return {
        "task": "causal-lm",
        "base": write_language_base(folder / "base"),
        "train": write_pairs(folder / "train.jsonl", 48),
        "dev": write_pairs(folder / "dev.jsonl", 12, seed=1),
        "prompt": "question",
        "completion": "answer",
        "max_length": 32,
        "batch_size": 4,
        "epochs": 20,
        "lr": 3e-2,
        "dropout": 0.0,
        "buckets": 1,
        "log_every": 5,
    }


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return train(TrainConfig(**options, output=str(tmp_path_factory.mktemp("runs") / "finished")))


def prepared(options, **changed):
    return prepare_run(TrainConfig(**{**options, **changed}, output="out"), lambda event: None)


def test_it_learns_and_the_best_is_the_lowest_perplexity(finished):
    dev = [row for row in finished.history if row["split"] == "dev"]
    best = finished.metrics["dev"]["perplexity"]
    assert best == min(row["perplexity"] for row in dev)
    assert best < 12 < 100 < dev[0]["perplexity"]
    assert finished.chosen == "best perplexity on dev"
    assert finished.metrics["dev"]["perplexity"] == pytest.approx(math.exp(finished.metrics["dev"]["loss"]))
    assert finished.metrics["dev"]["token_accuracy"] > 0.6
    saved = files.read_safetensors(finished.adapter / "adapter.safetensors")
    assert all(name.rsplit("/", 1)[1] in ("a", "b") for name in saved), "nothing but factors"


def test_the_saved_adapter_scores_the_same(finished, options):
    completer = load_completer(finished.output)
    columns = TrainConfig(**options, output="out").columns
    rows, metrics = completer.evaluate(read_documents(options["dev"], columns, special=completer.special))
    assert metrics == pytest.approx(finished.metrics["dev"], rel=1e-5)
    assert rows.texts == 12
    with pytest.raises(TrainingError, match=r"was trained for causal-lm, which has no labels: use `load_completer`"):
        load_predictor(finished.output)


@pytest.mark.parametrize("kind", ["completion", "text"])
def test_perplexity_is_that_of_each_text_alone(options, kind):
    """Against logits of one text a row, without packing, buckets or batches, summed in NumPy."""
    columns = {} if kind == "completion" else {"prompt": None, "completion": None}
    run = prepared(options, **columns)
    params = lj.combine(run.state.trainable, run.frozen)
    rows = run.splits["dev"]
    found = run.task.measure(
        predict_outputs(make_forward(run.apply, run.task), params, rows, buckets=(32,)), rows.targets
    )

    tokenizer = lj.models.load_tokenizer(options["base"])
    losses, right = [], []
    for line in Path(options["dev"]).read_text().splitlines():
        row = json.loads(line)
        if kind == "completion":
            prompt = [0, *tokenizer.encode(row["question"] + "\n", add_special_tokens=False).ids]
            ids = [*prompt, *tokenizer.encode(row["answer"], add_special_tokens=False).ids, 2]
        else:
            prompt, ids = [0], [0, *tokenizer.encode(row["text"], add_special_tokens=False).ids, 2]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(jax.jit(run.apply)(params, padded), np.float64)[0]
        for place in range(len(prompt), len(ids)):
            before = logits[place - 1]
            losses.append(np.log(np.exp(before - before.max()).sum()) + before.max() - before[ids[place]])
            right.append(before.argmax() == ids[place])
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(right))


def gradient(run: Any, batch: AnyBatch, **settings: Any) -> tuple[Any, Any]:
    """The loss, and the gradient as an update by plain descent."""
    tx = optax.sgd(1.0)
    state = run.state._replace(optimizer=tx.init(run.state.trainable))
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    start = run.state.trainable
    after, output = make_step(run.apply, run.task, tx, **settings)(state, run.frozen, batch, jax.random.key(0))
    return output, jax.tree.map(lambda a, b: np.asarray(a - b), start, after.trainable)


def all_rows(run: Any, size: int) -> AnyBatch:
    rows = run.splits["train"]
    (plan,) = plan_in_order(rows.lengths, (32,), batch_size=size)
    return rows.batch(plan, size)


def test_neither_packing_nor_accumulating_changes_loss_and_gradient(options, tmp_path):
    few = write_pairs(tmp_path / "few.jsonl", 8)
    packed, apart = (prepared(options, train=few, packing=packing) for packing in (True, False))
    assert packed.splits["train"].num_sequences < apart.splits["train"].num_sequences == 8
    output, grads = gradient(packed, all_rows(packed, 4))
    # As many rows as divide evenly, whose targets don't.
    for other, settings in ((all_rows(apart, 8), {}), (all_rows(apart, 8), {"accumulate": 4})):
        theirs, their_grads = gradient(apart, other, **settings)
        assert float(theirs.targets) == float(output.targets)
        assert float(theirs.loss) == pytest.approx(float(output.loss), rel=1e-5)
        for mine, their in zip(jax.tree.leaves(grads), jax.tree.leaves(their_grads), strict=True):
            np.testing.assert_allclose(mine, their, atol=1e-5 * max(1, np.abs(their).max()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-3


def test_label_smoothing_is_pytorchs():
    """`(1 - ε) · nll + ε · mean over the vocabulary of -log p`, and no part of the metrics."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    smooth = CausalLM(label_smoothing=0.1)
    found = smooth.losses(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(found, 0.9 * nll - 0.1 * log_p.mean(-1), rtol=1e-5)
    weights = np.array([[1, 1, 0], [0, 1, 0]], np.float32)
    sums = np.asarray(smooth.summarize(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights)))
    np.testing.assert_allclose(sums[:, 0], (nll * weights).sum(1), rtol=1e-5)
    assert sums[:, 2].tolist() == [2, 1]
    assert smooth.measure(sums, targets)["loss"] == pytest.approx((nll * weights).sum() / 3, rel=1e-5)


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(options, tmp_path):
    options = {**options, "epochs": 3, "method": {"name": "lora", "dropout": 0.1}, "dropout": 0.1, "accumulate": 2}
    whole = TrainConfig(**options, output=str(tmp_path / "whole"))
    assert run(whole, tmp_path) == 0
    steps = json.loads((tmp_path / "whole" / "results.json").read_text())["steps"]
    broken = dataclasses.replace(whole, output=str(tmp_path / "broken"))
    assert run(broken, tmp_path, "step", steps // 2 + 1) == -signal.SIGKILL
    assert run(broken, tmp_path) == 0
    assert_same_adapter(tmp_path / "broken", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("broken", "whole")]
    assert results[0]["resumed_from"] is not None
    assert results[0]["metrics"] == results[1]["metrics"]


def test_other_data_is_no_going_on(finished, options):
    other = {**options, "prompt": "answer", "completion": "question"}
    with pytest.raises(RunFolderError, match=r"`prompt` is 'question' there and 'answer' here"):
        train(TrainConfig(**other, output=str(finished.output)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": "y"}, r"`label` is for classification and regression, and `task` is causal-lm: leave it out"),
        ({"text_pair": "y"}, r"`text_pair` is for classification and regression"),
        ({"pooling": "mean"}, r"`pooling` is for classification and regression"),
        ({"completion": None}, r"`prompt` is given without `completion`: name both columns"),
        ({"prompt": None}, r"`completion` is given without `prompt`"),
        ({"messages": "m"}, r"`messages` are whole conversations: leave out `prompt` and `completion`"),
        ({"base": "minilm"}, r"`base` must be a decoder \(GPT-2, .*, got the bert encoder"),
        ({"method": "frozen"}, r"`method` frozen: it trains the head alone, and a causal-lm adds none"),
        ({"metric": "accuracy"}, r"`metric` is 'accuracy', and a causal-lm has perplexity, token_accuracy, loss"),
        ({"task": "classification"}, r"`prompt` is for causal-lm, and `task` is classification: leave it out"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be a number of at least 0 and below 1, got 1.0"),
        ({"packing": "no"}, r"`packing` must be one of True, False, got 'no'"),
    ],
)
def test_options_that_do_not_fit(options, changed, message, request):
    if changed.get("base") == "minilm":
        changed = {"base": request.getfixturevalue("base")}
    with pytest.raises(ConfigError, match=message):
        prepared(options, **changed)


def test_a_base_must_be_given(options):
    options = {name: value for name, value in options.items() if name != "base"}
    with pytest.raises(ConfigError, match=r"`base` is needed for causal-lm: a decoder's folder or hub name"):
        TrainConfig(**options, output="out")


def test_defaults_of_a_language_model(options):
    config = TrainConfig(**{**options, "lr": None, "max_length": None}, output="out")
    settled = resolve(config)
    assert (settled.lr, settled.max_length, settled.method.also_train) == (2e-4, 512, ())
    assert resolve(TrainConfig.from_dict(config.to_dict())) == settled


# ---------------------------------------------------------------------------------------------------- special tokens


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def test_special_tokens_come_from_the_folder(tmp_path):
    write_language_base(tmp_path / "base")
    folder = tmp_path / "base"
    special = lj.models.read_special_tokens(folder)
    assert (special.end, special.stops, special.chat_template) == (2, (2,), None)
    assert special.texts == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<mask>"}, "chat_template": "old"})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 1]})
    special = lj.models.read_special_tokens(folder)
    assert special.stops == (special.end, 2, 1)
    assert special.chat_template == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert lj.models.read_special_tokens(folder).chat_template == "new"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    special = lj.models.read_special_tokens(folder)
    assert (special.chat_template, special.end, special.texts) == ("b", 2, {"eos_token": "</s>"})


def test_an_end_beyond_the_embeddings_is_refused(tmp_path):
    folder = Path(write_language_base(tmp_path / "base", eos_token_id=50256))
    write_json(folder / "tokenizer_config.json", {})
    with pytest.raises(
        files.FileError, match=r"`eos_token_id` must be less than `vocab_size` in config.json, \d+, got 50,256"
    ):
        lj.models.read_special_tokens(folder)


def test_a_base_without_an_end_is_refused(tmp_path):
    folder = Path(write_language_base(tmp_path / "base", eos_token_id=None))
    write_json(folder / "tokenizer_config.json", {})
    with pytest.raises(files.FileError, match=r"has no end-of-text token: add `eos_token` to tokenizer_config.json"):
        lj.models.read_special_tokens(folder)
    write_json(folder / "tokenizer_config.json", [])
    with pytest.raises(files.FileError, match=r"must be a JSON object, got list"):
        lj.models.read_special_tokens(folder)
