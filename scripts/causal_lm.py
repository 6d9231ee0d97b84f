"""Trains a small GPT-2 from random weights, then LoRA on it, and writes `docs/causal_lm.md` with its curve.

    scripts/causal_lm.py --data ../shared/data                # all of it, about ten minutes on two cores; resumable
    scripts/causal_lm.py --data ../shared/data --sets e2e     # one of the data sets
    scripts/causal_lm.py --page-only                          # the page again, from the finished runs

For each data set: a byte-pair tokenizer learnt from its texts, random weights, a short training of all parameters on
plain text, then LoRA on prompts with completions, an evaluation, and a merged folder. Every step but the first is a
`lora-jax` command; the page lists them. It shows that the path works, and nothing about quality.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import lora_jax as lj
from lora_jax import files
from lora_jax.models.model import Model, skeleton
from lora_jax.paths import leaves_by_path, path_key

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "causal_lm.md"
CURVE = ROOT / "docs" / "causal_lm.png"
END = "<|endoftext|>"
LAYERS = 3
CONFIG = lj.models.Gpt2Config(vocab_size=2048, n_positions=384, n_embd=128, n_layer=LAYERS, n_head=4)
_SAMPLE = ("prompt", "completion")
DEV_ROWS = 400  # that the curve is measured on


class Set(NamedTuple):
    """A data set: its files, the column of plain text, prompt and completion, and how much is trained."""

    title: str
    train: str
    dev: str
    test: str
    text: str
    prompt: str
    completion: str
    max_length: int
    batch_size: int
    pretrain_steps: int
    steps: int
    generate: tuple[str, ...]


SETS = {
    "e2e": Set(
        *("E2E NLG", "e2e_nlg/train.jsonl", "e2e_nlg/dev.jsonl", "e2e_nlg/test.jsonl", "ref", "mr", "ref"),
        max_length=128,
        batch_size=16,
        pretrain_steps=300,
        steps=400,
        generate=("--max-new-tokens", "64", "--num-beams", "10", "--length-penalty", "0.9", "--no-repeat-ngram", "4"),
    ),
    "gsm8k": Set(
        *("GSM8K", "gsm8k/train.jsonl", "gsm8k/test.jsonl", "gsm8k/test.jsonl", "question", "question", "answer"),
        max_length=256,
        batch_size=8,
        pretrain_steps=400,
        steps=320,
        generate=(
            "--max-new-tokens",
            "96",
        ),
    ),
}


def lines_of(path: Path) -> list[str]:
    """`splitlines` would also split at the rarer line ends that a text may hold."""
    return path.read_text(encoding="utf-8").strip().split("\n")


def make_base(about: Set, data: Path, folder: Path) -> None:
    """A Hugging Face folder of a GPT-2 with random weights, and a tokenizer learnt from the training texts."""
    rows = [json.loads(line) for line in lines_of(data / about.train)]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row[column] for row in rows for column in dict.fromkeys((about.prompt, about.completion)))
    tokenizer.train_from_iterator(texts, trainer)

    source = folder / "tokenizer"
    source.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(source / "tokenizer.json"))
    files.write_json(source / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": END})
    sizes = {name: getattr(CONFIG, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    files.write_json(source / "config.json", {"model_type": "gpt2", "eos_token_id": 0, "bos_token_id": 0, **sizes})
    apply, shapes = skeleton(CONFIG, task="causal-lm")
    params = jax.tree.unflatten(
        jax.tree.structure(shapes), [draw(path, leaf) for path, leaf in leaves_by_path(shapes).items()]
    )
    model = Model(apply=apply, params=params, config=CONFIG, names={}, task="causal-lm", pooling="first")
    lj.models.save_pretrained(folder / "random", model, params, source=source)


def draw(path: str, leaf: Any) -> jax.Array:
    """GPT-2's start: normal with deviation 0.02, less before a residual sum; norms are one, biases zero."""
    if path.endswith("scale"):
        return jnp.ones(leaf.shape)
    if path.endswith("bias"):
        return jnp.zeros(leaf.shape)
    residual = path.endswith(("attention/output/kernel", "mlp/down/kernel"))
    deviation = 0.02 / (2 * LAYERS) ** 0.5 if residual else 0.02
    return deviation * jax.random.normal(path_key(jax.random.key(0), path), leaf.shape)


def commands(name: str, data: Path, folder: Path) -> dict[str, list[str]]:
    """The `lora-jax` commands of a data set, by what they make."""
    about = SETS[name]
    shared = ["lora-jax", "train", "--task", "causal-lm", "--max-length", str(about.max_length)]
    shared += ["--batch-size", str(about.batch_size)]
    columns = ["--prompt", about.prompt, "--completion", about.completion]
    training = [*shared, "--train", str(data / about.train), "--dropout", "0"]
    return {
        "pretrained/results.json": [
            *training,
            *("--base", str(folder / "random"), "--text", about.text, "--method", "full", "--lr", "3e-3"),
            *("--steps", str(about.pretrain_steps), "--output", str(folder / "pretrained")),
        ],
        "base/config.json": [
            *("lora-jax", "merge", "--adapter", str(folder / "pretrained"), "--output", str(folder / "base")),
        ],
        "lora/results.json": [
            *training,
            *("--dev", str(folder / "dev.jsonl"), "--eval-every", str(about.steps // 8), *columns),
            *("--base", str(folder / "base"), "--method", "lora", "--rank", "16", "--alpha", "32"),
            *("--lr", "5e-3", "--steps", str(about.steps), "--output", str(folder / "lora")),
        ],
        "scores.json": [
            *("lora-jax", "eval", "--adapter", str(folder / "lora"), "--test", str(data / about.test), "--json"),
            *("--generate", "--limit", "100", *about.generate, "--predictions", str(folder / "written.jsonl")),
        ],
        "merged/config.json": [
            *("lora-jax", "merge", "--adapter", str(folder / "lora"), "--output", str(folder / "merged")),
        ],
    }


def run(name: str, data: Path, folder: Path) -> None:
    """What is missing of a data set's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "random" / "config.json").exists():
        make_base(SETS[name], data, folder)
    lines = lines_of(data / SETS[name].dev)
    files.write_text(folder / "dev.jsonl", "".join(line + "\n" for line in lines[:DEV_ROWS]))
    for made, command in commands(name, data, folder).items():
        if (folder / made).exists():
            continue
        program = [sys.executable, "-m", "lora_jax", *command[1:]]
        result = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
        if made == "scores.json":
            files.write_text(folder / made, result.stdout)


# ------------------------------------------------------------------------------------------------------------- the page


def finished(folder: Path) -> dict[str, Set]:
    return {name: about for name, about in SETS.items() if (folder / name / "scores.json").exists()}


def draw_curve(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = finished(folder)
    figure, axes = plt.subplots(1, len(sets), figsize=(4.5 * len(sets), 3.2), layout="constrained", squeeze=False)
    for axis, (name, about) in zip(axes[0], sets.items(), strict=True):
        rows = [json.loads(line) for line in (folder / name / "lora" / "metrics.jsonl").read_text().splitlines()]
        for split, style in (("train", "-"), ("dev", "o-")):
            points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
            axis.plot(*zip(*points, strict=True), style, markersize=4, label=split)
        axis.set_title(f"{about.title}: LoRA on the small model")
        axis.set_xlabel("step")
        axis.set_ylabel("loss of a completion's token")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(CURVE, dpi=130, metadata={"Software": None})


def page(folder: Path) -> str:
    lines = [(ROOT / "scripts" / "causal_lm_page.md").read_text(encoding="utf-8").rstrip(), ""]
    columns = ("data", "trained", "tokens/s", "seconds", "dev perplexity, first and best", "test perplexity")
    columns += ("BLEU", "ROUGE-L", "ended")
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    samples: list[str] = []
    for name, about in finished(folder).items():
        result = json.loads((folder / name / "lora" / "results.json").read_text())
        scores = json.loads((folder / name / "scores.json").read_text())
        rows = [json.loads(line) for line in (folder / name / "lora" / "metrics.jsonl").read_text().splitlines()]
        dev = [row["perplexity"] for row in rows if row["split"] == "dev"]
        speed = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        cells = [
            about.title,
            f"{result['trainable']:,} of {result['total']:,}",
            f"{sorted(speed)[len(speed) // 2]:,.0f}",
            f"{result['train_seconds']:.0f}",
            f"{dev[0]:.2f}, {min(dev):.2f}",
            f"{scores['perplexity']:.2f}",
            f"{scores['bleu']:.1f}",
            f"{scores['rouge_l']:.1f}",
            f"{scores['ended']} of {scores['prompts']}",
        ]
        table.append("| " + " | ".join(cells) + " |")
        for written in itertools.islice(map(json.loads, lines_of(folder / name / "written.jsonl")), 2):
            prompt, completion = (textwrap.shorten(written[part], 160, placeholder=" …") for part in _SAMPLE)
            samples += [f"- {prompt}", f"  → *{completion}*"]
    listed: list[str] = []
    for name in finished(folder):
        listed += ["", f"# {SETS[name].title}"]
        shown = commands(name, Path("../shared/data"), Path("runs/causal_lm") / name)
        listed += [shlex.join(command) for command in shown.values()]
    body = "\n".join(lines)
    for mark, content in (("TABLE", table), ("SAMPLES", samples), ("COMMANDS", listed[1:])):
        body = body.replace(f"<!-- {mark} -->", "\n".join(content))
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/causal_lm"), help="folder of the runs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--page-only", action="store_true", help="write the page from the finished runs")
    options = parser.parse_args()
    if not options.page_only:
        for name in options.sets:
            run(name, options.data, options.output / name)
    draw_curve(options.output)
    files.write_text(PAGE, page(options.output))
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
