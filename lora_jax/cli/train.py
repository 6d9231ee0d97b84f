"""`lora-jax train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_data_arguments, add_method_arguments, add_training_arguments, make_config

if TYPE_CHECKING:
    from lora_jax.training import RunResult

NAME = "train"
HELP = "fine-tune a base on texts"
DESCRIPTION = """\
Fine-tunes a base on labelled texts, or a language model (--task causal-lm) on plain texts, prompts with completions, or
conversations; and saves the adapter.

Interrupted at any moment, the same command goes on from the last checkpoint."""
EPILOG = """\
examples:
  lora-jax train --train data.tsv --output out
  lora-jax train --train train.csv --dev dev.csv --test test.csv --text sentence --label class --output out
  lora-jax train --train pairs.tsv --text a --text-pair b --label score --task regression --output out
  lora-jax train --train data.tsv --method lora --rank 4 --targets query value --lr 2e-3 --output out
  lora-jax train --task causal-lm --base gpt2 --train data.jsonl --prompt question --completion answer --output out
  lora-jax train --task causal-lm --base Qwen/Qwen3-0.6B --train talks.jsonl --messages messages --output out
  lora-jax train --task causal-lm --base gpt2 --train book.txt --output out
  lora-jax train --config out/config.yaml --seed 1 --output out-1

in the output folder:
  config.yaml      the resolved options, for --config
  run.json         hashes of data and base: it goes on with these alone
  metrics.jsonl    losses and metrics by step
  checkpoints/     best and last, to go on from
  adapter/         what was learnt: for predict, eval and merge
  results.json     final metrics, counts, times"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suppress = argparse.SUPPRESS
    parser.add_argument("--output", metavar="FOLDER", default=suppress, help="new folder, or that of the same run")
    parser.add_argument("--config", metavar="FILE", default=suppress, help="YAML with any of these options")
    add_data_arguments(parser)
    add_method_arguments(parser)
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = make_config(args)
    from lora_jax.training import train
    from lora_jax.training.run.progress import LiveProgress

    with LiveProgress() as progress:
        result = train(config, on_progress=progress)
    _show(result)


def _show(result: RunResult) -> None:
    from lora_jax.training.run.progress import format_bytes, format_seconds

    from .output import print_facts, score_facts

    facts: dict[str, str] = {}
    for split, metrics in result.metrics.items():
        facts |= score_facts(split, metrics, result.baselines.get(split), metric=result.metric)
    facts |= {
        "checkpoint": f"{result.chosen}: step {result.chosen_step:,} of {result.steps:,}",
        "trained": f"{result.trainable:,} of {result.total:,} parameters ({result.percent:.3g} %)",
        "time": format_seconds(result.train_seconds) + (f", {result.step_ms:.0f} ms a step" if result.step_ms else ""),
        "padding": f"{100 * result.padding_share:.1f} % of the places in batches",
        "adapter": f"{result.adapter} ({format_bytes(result.adapter_bytes)})",
    }
    if dropped := {split: count for split, count in result.dropped.items() if count}:
        facts["left out"] = ", ".join(f"{count:,} texts of {split}" for split, count in dropped.items())
    if result.waiting_share is not None:
        facts["waiting"] = f"{100 * result.waiting_share:.1f} % of the time, for batches"
    print_facts(facts)
