"""Every kind of file that is read: how a good one is made, how it is read, and what must be true of what was read.

A kind that isn't here isn't attacked: a new reader joins with an entry of `KINDS`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import unittest.mock
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import files
from lora_jax.files import CHECKSUM, FileError, read_safetensors
from lora_jax.interop import apply_delta, export_delta, export_peft, import_peft, read_peft_config
from lora_jax.models.families.bundled import read_model_config
from lora_jax.paths import leaves_by_path
from lora_jax.study.grid.candidates import read_grid
from lora_jax.study.runs.results import ResultsFile
from lora_jax.tools.inspect import inspect_adapter
from lora_jax.training.baseline import Baseline
from lora_jax.training.config import RunConfig, TrainConfig, resolve
from lora_jax.training.config_file import read_yaml, write_yaml
from lora_jax.training.data import token_cache
from lora_jax.training.data.chat import render_conversations
from lora_jax.training.data.documents import read_documents
from lora_jax.training.data.encoding import Encoded, encode
from lora_jax.training.data.sources import read_examples
from lora_jax.training.errors import RunFolderError, TrainingError
from lora_jax.training.examples import Columns, Examples
from lora_jax.training.run.checkpoint import Checkpoint, Checkpoints, RunProgress
from lora_jax.training.run.folder import LogRow, RunFolder
from lora_jax.training.run.result import RunResult, read_result, write_result
from lora_jax.training.run.step import TrainState
from lora_jax.training.task import Classification
from lora_jax.training.task_file import TASK_FILE, TaskFile, read_task, task_content
from tests.interop import kit
from tests.result_rows import result_row
from tests.tiny_bert import WORDS, write_tiny_bert
from tests.tiny_encoders import byte_level
from tests.tiny_language import write_language_base

from .mutations import Rng, choice

REFUSALS = (FileError, lj.AdapterError, TrainingError)
LAYERS = 2


class Kind(NamedTuple):
    """A sort of file, or of a folder of files.

    Attributes:
        write: makes a good folder.
        read: gives what the folder holds, or refuses.
        files: those that are damaged, as patterns below the folder.
        summed: those of them that a checksum covers: changed, they are refused, or give what the good ones gave.
        pieces: of what was read, those that a checksum covers each by itself: rows that are lost are done again.
        check: raises `AssertionError` if what was read isn't what the folder says.
        is_finite: whether what is read is held to be finite.
        is_named: whether every refusal names the folder; options of a config may come from flags as well.
        share: how often it is drawn, beside the others; less of what takes long.
    """

    write: Callable[[Path, Rng], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    summed: tuple[str, ...] = ()
    pieces: Callable[[Any], Iterable[Any]] = lambda value: (value,)
    check: Callable[[Path, Any], Any] = lambda folder, value: None
    is_finite: bool = True
    is_named: bool = True
    share: float = 1.0


# --------------------------------------------------------------------------------------------------------- PEFT folders


class Setting(NamedTuple):
    """A base with two names for everything, and what of it may be adapted and trained."""

    base: dict[str, Any]
    names: Mapping[str, Any]
    uses: dict[str, lj.Use] | None
    targets: tuple[str, ...]
    whole: tuple[str, ...]


def _draw(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng([7, *shape]).normal(size=shape).astype(np.float32))


PLAIN = Setting(
    kit.base(), kit.NAMES, None, ("embed", "query", "value"), ("classifier", "norm", "query/bias", "value/bias")
)
TIED = Setting(
    {"words": {"embedding": _draw(7, 4)}, "up": {"kernel": _draw(4, 5)}, "down": {"kernel": _draw(5, 4)}},
    {"words/embedding": ("model.words", "lm_head"), "up/kernel": "model.up", "down/kernel": "model.down"},
    None,
    ("up", "words"),
    ("down",),
)
STACKED = Setting(
    {
        "layers": {
            "query": {"kernel": _draw(LAYERS, 4, 6), "bias": _draw(LAYERS, 6)},
            "up": {"kernel": _draw(LAYERS, 4, 5)},
        }
    },
    {
        f"layers/{number}/{path}": f"model.layers.{number}.{module}"
        for number in range(LAYERS)
        for path, module in (("query/kernel", "query"), ("query/bias", "query"), ("up/kernel", "up"))
    },
    {f"layers/{name}/kernel": lj.Use("dot_general", "sio") for name in ("query", "up")},
    ("query", "up"),
    ("query/bias",),
)


def trained(setting: Setting, rng: Rng) -> tuple[Any, lj.LoRA]:
    """A random adapter: some targets, ranks and scales of their own, some leaves in full."""
    targets = tuple(name for name in setting.targets if rng.integers(3)) or setting.targets[:1]
    kind = lj.LoRA if setting is TIED or rng.integers(4) else lj.DoRA  # a tied leaf has no one magnitude
    method = kind(
        rank=int(rng.integers(1, 4)),
        alpha=choice(rng, (1, 4, 2.5, 16)),
        targets=targets,
        also_train=tuple(name for name in setting.whole if rng.integers(2)),
        rank_overrides={name: int(rng.integers(1, 4)) for name in targets if rng.integers(4) == 0},
        alpha_overrides={name: choice(rng, (1, 3, 0.5)) for name in targets if rng.integers(4) == 0},
        scaling=choice(rng, ("standard", "rank_stabilized")),
        dropout=choice(rng, (0.0, 0.1)),
    )
    start = lj.attach(setting.base, method, key=jax.random.key(0), uses=setting.uses)
    mask = lj.trainable_mask(start, method)
    return jax.tree.map(
        lambda x, own: x + rng.normal(size=x.shape).astype(np.float32) if own else x, start, mask
    ), method


def peft(setting: Setting) -> Kind:
    def write(folder: Path, rng: Rng) -> None:
        params, method = trained(setting, rng)
        export_peft(folder, params, method, names=setting.names, dtype=choice(rng, (None, None, "float16", "bfloat16")))

    def read(folder: Path) -> Any:
        return import_peft(folder, setting.base, names=setting.names).params

    def check(folder: Path, params: Any) -> None:
        merged = lj.merge_params(params)
        assert_shapes(merged, setting.base)
        if setting is PLAIN and not read_peft_config(folder).get("use_dora"):
            _assert_peft_agrees(folder, merged)
        # Out and in again it is the same.
        params, method = import_peft(folder, setting.base, names=setting.names)
        again = folder.with_name("again")
        export_peft(again, params, method, names=setting.names, config=read_peft_config(folder))
        assert_equal(lj.merge_params(import_peft(again, setting.base, names=setting.names).params), merged)

    return Kind(write, read, (kit.CONFIG, kit.WEIGHTS), check=check)


def _assert_peft_agrees(folder: Path, merged: Any) -> None:
    try:
        theirs = kit.peft_result(folder, kit.state_dict(kit.base()))
    except Exception:  # what PEFT's own rules don't make a model of
        return
    ours = kit.state_dict(merged)
    for name in ours:
        if np.abs(theirs[name]).max() < 1e30:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4 * np.abs(theirs[name]).max())


def assert_shapes(params: Any, base: Any) -> None:
    found, expected = ({p: (x.shape, x.dtype) for p, x in leaves_by_path(tree).items()} for tree in (params, base))
    assert found == expected


def assert_equal(one: Any, other: Any) -> None:
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


# ------------------------------------------------------------------------------------------------------ our own formats


def write_delta(folder: Path, rng: Rng) -> None:
    base = kit.base()
    chosen = [path for path in leaves_by_path(base) if rng.integers(2)] or ["norm/bias"]
    tuned = jax.tree.map(lambda leaf: leaf, base)
    for path in chosen:
        module, name = path.split("/")
        tuned[module][name] = base[module][name] + 1
    export_delta(folder, tuned, base, names=kit.NAMES)


def check_delta(folder: Path, params: Any) -> None:
    assert_shapes(params, kit.base())
    tensors, there = read_safetensors(folder / "delta.safetensors"), kit.state_dict(params)
    assert tensors.keys() <= there.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(there[name], array)
    other = apply_delta(folder, kit.state_dict(kit.base()))
    for name, array in there.items():
        np.testing.assert_array_equal(other[name], array)


def write_adapter(folder: Path, rng: Rng) -> None:
    params, method = trained(PLAIN, rng)
    lj.save_adapter(folder, params, method)
    if rng.integers(2):
        write_a_task(folder, rng)


def read_adapter(folder: Path) -> Any:
    report = inspect_adapter(folder)
    loaded = lj.load_adapter(folder, kit.base())
    assert len(report.tensors) > 0
    return loaded.params, repr(loaded.method)


def check_adapter(folder: Path, value: Any) -> None:
    assert_shapes(lj.merge_params(value[0]), kit.base())


def write_a_task(folder: Path, rng: Rng) -> None:
    columns = Columns(text=choice(rng, ("text", "sentence")), label=choice(rng, ("label", "class")))
    task = Classification(labels=tuple(f"label {i}" for i in range(int(rng.integers(2, 6)))))
    base = choice(rng, ("minilm", "base"))
    told = TaskFile(base=base, task=task, pooling="first", max_length=32, dtype="float32", columns=columns)
    files.write_json(folder / TASK_FILE, files.with_checksum(task_content(told)))


def write_run(folder: Path, rng: Rng) -> None:
    """What a complete run leaves."""
    write_yaml(folder / "config.yaml", _run_config(folder))
    params, method = trained(PLAIN, rng)
    lj.save_adapter(folder / "adapter", params, method)
    write_a_task(folder / "adapter", rng)
    split: dict[str, float | None] = {"accuracy": float(rng.random()), "macro_f1": 0.5, "matthews": None, "loss": 1.5}
    rows: list[LogRow] = [{"step": step, "split": "train", "loss": 1 / step, "accuracy": 0.5} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = RunResult(
        output=folder,
        adapter=folder / "adapter",
        metrics={"dev": split, "test": split},
        baselines={"dev": Baseline("'neg'", {"accuracy": 0.5, "macro_f1": 0.3, "matthews": 0.0, "loss": 0.7})},
        metric="accuracy",
        chosen="best accuracy on dev",
        chosen_step=4,
        steps=5,
        labels=("neg", "pos"),
        trainable=10,
        total=100,
        percent=10.0,
        adapter_bytes=200,
        train_seconds=1.5,
        step_ms=20.0,
        waiting_share=0.0,
        padding_share=0.1,
        truncated={"train": 0},
        dropped={"train": 0},
        resumed_from=None,
        history=rows,
    )
    write_result(RunFolder(_run_config(folder)), result)


def _run_config(folder: Path) -> RunConfig:
    method = {"name": "lora", "rank": 4}
    return resolve(TrainConfig(train="train.tsv", dev="dev.tsv", output=str(folder), method=method))


def read_run(folder: Path) -> Any:
    """As a command that is started again meets them: it must be able to show what it gives back."""
    from lora_jax.cli.train import _show

    notes: list[Any] = []
    if (result := read_result(RunFolder(_run_config(folder)), notes.append)) is None:
        raise RunFolderError(f"{folder} holds no complete run: {notes}")
    _show(result)
    return {**vars(result), "history": None, "output": None, "adapter": None}


def _train_state() -> TrainState:
    method = lj.LoRA(rank=2, alpha=2, targets=("w",))
    params = lj.attach({"w": jnp.ones((4, 4)), "v": jnp.ones(3)}, method, key=jax.random.key(0))
    trainable, _ = lj.partition(params, lj.trainable_mask(params, method))
    return TrainState(trainable, optax.adam(1e-3).init(trainable), jnp.asarray(3, jnp.int32))


def write_checkpoint(folder: Path, rng: Rng) -> None:
    progress: RunProgress = {
        "iterator": {"next_index": 3},
        "meter": {"seconds": 1.5, "waiting": 0.0, "tokens": int(rng.integers(1000)), "slots": 1000, "window": []},
        "data": "0" * 64,
        "dev": {"accuracy": 0.5},
    }
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(Checkpoint(_train_state(), jax.random.key(7), progress), score=0.5)


def read_checkpoint(folder: Path) -> Any:
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best_step or checkpoints.last_step
        if step is None:
            raise RunFolderError(f"{folder} holds no checkpoint: a run begins anew")
        found = checkpoints.restore(step, _train_state())
    return found.state, jax.random.key_data(found.key), found.progress


TEXTS = [f"the {word} film was {word} and the order is {number}" for number, word in enumerate(WORDS)]


def write_token_cache(folder: Path, rng: Rng) -> None:
    del rng
    _through_the_cache(folder)


@functools.cache
def _word_tokenizer() -> Any:
    return byte_level(WORDS)


def _through_the_cache(folder: Path) -> Encoded:
    with (
        unittest.mock.patch.dict(os.environ, {"LORA_JAX_CACHE": str(folder)}),
        unittest.mock.patch.object(token_cache, "_LEAST", 0),
    ):
        return token_cache.encode_cached(Examples("texts", TEXTS), _word_tokenizer(), 16)


def check_token_cache(folder: Path, value: Any) -> None:
    del folder
    assert isinstance(value, Encoded)
    assert value.num_sequences == len(TEXTS)


# ------------------------------------------------------------------------------------------------------ bases, settings


def write_encoder(folder: Path, rng: Rng) -> None:
    write_tiny_bert(folder, layers=1, hidden=8, heads=2, positions=16, seed=int(rng.integers(9)))


def write_sharded(folder: Path, rng: Rng) -> None:
    whole = folder / "whole"
    write_encoder(whole, rng)
    model = lj.models.load(whole)
    lj.models.save_pretrained(folder / "parts", model, model.params, source=whole, max_shard_size="2kB")
    for path in list((folder / "parts").iterdir()):
        path.replace(folder / path.name)
    shutil.rmtree(whole)
    shutil.rmtree(folder / "parts")


def write_decoder(folder: Path, rng: Rng) -> None:
    del rng
    write_language_base(folder)


def read_base(folder: Path) -> Any:
    model = lj.models.load(folder)
    return model.params, repr(model.config)


def check_base(folder: Path, value: Any) -> None:
    sizes = read_model_config(folder)
    assert repr(sizes) == value[1]


def write_tokenizer(folder: Path, rng: Rng) -> None:
    (write_encoder if rng.integers(2) else write_decoder)(folder, rng)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')


def read_tokenizer(folder: Path) -> Any:
    tokenizer = lj.models.load_tokenizer(folder)
    lj.models.read_special_tokens(folder)
    encoded = encode(Examples("texts", [*TEXTS[:4], "a" * 3_000, " " * 3_000, "é\u200b"]), tokenizer, 16)
    return encoded, [tokenizer.decode(row.tolist()) for row in np.split(encoded.ids, encoded.offsets[1:-1])]


def write_template(folder: Path, rng: Rng) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    if rng.integers(2):
        template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)


def read_template(folder: Path) -> Any:
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text() if path.is_file() else None
    except UnicodeDecodeError:
        raise FileError(f"{path} is no text") from None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokens = {"eos_token": "</s>", "bos_token": "<s>"}
    return render_conversations([talk], template=template, tokens=tokens, name=str(folder), seconds=1)


def write_settings(folder: Path, rng: Rng) -> None:
    method = choice(rng, ("lora", {"name": "lora", "rank": 4, "targets": ["query"]}, "bitfit"))
    lr = choice(rng, (None, 1e-3))
    write_yaml(folder / "config.yaml", TrainConfig(train="t.tsv", output="out", method=method, lr=lr))


def read_settings(folder: Path) -> Any:
    config = TrainConfig.from_dict(read_yaml(folder / "config.yaml"))
    write_yaml(folder / "again.yaml", config)
    assert not TrainConfig.from_dict(read_yaml(folder / "again.yaml")).differences(config)
    return config.to_dict()


def write_grid(folder: Path, rng: Rng) -> None:
    ranks = "".join(f"- {{name: lora, rank: {rank}, lr: [1e-3, 3e-3], label: r{rank}}}\n" for rank in (1, 2, 4))
    (folder / "grid.yaml").write_text(ranks + choice(rng, ("- name: bitfit\n", "- name: full\n  lr: 1e-5\n  x: 3\n")))


def write_comparison(folder: Path, rng: Rng) -> None:
    results = ResultsFile(folder / "results.jsonl")
    for seed in range(3):
        results.append(result_row(f"a-{seed}", rate=0.1, seed=seed, score=0.5, seconds=float(rng.random())))


def read_comparison(folder: Path) -> Any:
    """The rows, but for those that have lost their checksum, which are ones of an earlier version."""
    if not (rows := ResultsFile(folder / "results.jsonl").rows):
        return rows
    raw = map(json.loads, (folder / "results.jsonl").read_bytes().split(b"\n")[:-1])
    sealed = {row["id"] for row in raw if CHECKSUM in row}
    return {name: row for name, row in rows.items() if name in sealed}


# ----------------------------------------------------------------------------------------------------------------- data


def _rows(rng: Rng) -> list[dict[str, Any]]:
    return [
        {"text": " ".join(choice(rng, WORDS) for _ in range(4)), "label": choice(rng, ("pos", "neg")), "n": number}
        for number in range(8)
    ]


def write_separated(name: str, separator: str) -> Callable[[Path, Rng], None]:
    def write(folder: Path, rng: Rng) -> None:
        rows = _rows(rng)
        lines = [separator.join(map(str, row)) for row in (list(rows[0]), *(row.values() for row in rows))]
        (folder / name).write_text("\n".join(lines) + "\n")

    return write


def write_json_lines(folder: Path, rng: Rng) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(rng)))


def write_parquet(folder: Path, rng: Rng) -> None:
    import datasets

    datasets.Dataset.from_list(_rows(rng)).to_parquet(str(folder / "data.parquet"))


def write_conversations(folder: Path, rng: Rng) -> None:
    talks = [[{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "ok"}] for row in _rows(rng)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def read_data(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_examples(str(folder / name), text="text", label="label")


def check_data(folder: Path, examples: Any) -> None:
    del folder
    assert len(examples.texts) == len(examples.labels) > 0
    assert all(isinstance(text, str) and text.strip() for text in examples.texts)


def read_talks(folder: Path) -> Any:
    special = lj.models.SpecialTokens({"eos_token": "</s>"}, 2, (2,), None)
    return read_documents(str(folder / "data.jsonl"), Columns(messages="messages"), special=special).texts


def write_plain_text(folder: Path, rng: Rng) -> None:
    (folder / "book.txt").write_text("\n".join(row["text"] for row in _rows(rng)))


def read_plain_text(folder: Path) -> Any:
    special = lj.models.SpecialTokens({"eos_token": "</s>"}, 2, (2,), None)
    return read_documents(str(folder / "book.txt"), Columns(), special=special).texts


_ADAPTER = ("lora_jax_adapter.json", "adapter.safetensors")

KINDS: dict[str, Kind] = {
    "adapter": Kind(
        write_adapter,
        read_adapter,
        (*_ADAPTER, "task.json"),
        summed=(*_ADAPTER, "task.json"),
        check=check_adapter,
    ),
    "task": Kind(write_a_task, read_task, ("task.json",), summed=("task.json",)),
    "run": Kind(
        write_run, read_run, ("results.json", "config.yaml", "metrics.jsonl", "adapter/*"), summed=("results.json",)
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, ("**/*",), summed=("**/*",), share=0.3),
    "token cache": Kind(
        write_token_cache, _through_the_cache, ("tokens/*",), summed=("tokens/*",), check=check_token_cache
    ),
    "comparison": Kind(
        write_comparison,
        read_comparison,
        ("results.jsonl",),
        summed=("results.jsonl",),
        pieces=lambda rows: rows.items(),
    ),
    "config": Kind(write_settings, read_settings, ("config.yaml",), is_named=False),
    "grid": Kind(write_grid, lambda folder: read_grid(folder / "grid.yaml"), ("grid.yaml",)),
    "peft": peft(PLAIN),
    "peft, tied": peft(TIED),
    "peft, stacked": peft(STACKED),
    "delta": Kind(
        write_delta,
        lambda folder: apply_delta(folder, kit.base(), names=kit.NAMES),
        ("lora_jax_delta.json", "delta.safetensors"),
        summed=("lora_jax_delta.json", "delta.safetensors"),
        check=check_delta,
    ),
    "encoder": Kind(write_encoder, read_base, ("config.json", "model.safetensors"), check=check_base, share=0.3),
    "decoder": Kind(write_decoder, read_base, ("config.json", "model.safetensors"), check=check_base, share=0.3),
    "base of several files": Kind(
        write_sharded,
        read_base,
        ("config.json", "*.safetensors", "*.index.json"),
        check=check_base,
        share=0.3,
    ),
    "tokenizer": Kind(
        write_tokenizer,
        read_tokenizer,
        ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "*.jinja"),
        is_named=False,  # what only a text shows is told without the file
    ),
    "chat template": Kind(write_template, read_template, ("*.jinja",), share=0.1),
    "TSV": Kind(write_separated("data.tsv", "\t"), read_data("data.tsv"), ("data.tsv",), check=check_data, share=0.5),
    "CSV": Kind(write_separated("data.csv", ","), read_data("data.csv"), ("data.csv",), check=check_data, share=0.5),
    "JSONL": Kind(write_json_lines, read_data("data.jsonl"), ("data.jsonl",), check=check_data, share=0.5),
    "Parquet": Kind(write_parquet, read_data("data.parquet"), ("data.parquet",), check=check_data, share=0.5),
    "conversations": Kind(write_conversations, read_talks, ("data.jsonl",), share=0.1),
    "plain text": Kind(write_plain_text, read_plain_text, ("book.txt",)),
}
