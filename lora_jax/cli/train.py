"""`lora-jax train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_run_flags, make_config
from .parser import in_flags

if TYPE_CHECKING:
    from lora_jax.training import RunResult

NAME = "train"
USAGE = "--train DATA --output FOLDER [flags]"
HELP = "fine-tune a base model on texts"
DESCRIPTION = """\
Fine-tunes a base model on labelled texts, or a language model (--task causal-lm) on plain texts, prompts with
completions, or conversations, and saves the adapter.

If a run is interrupted, run the same command to resume it from the last checkpoint."""
EPILOG = """\
examples:
  lora-jax train --train data.tsv --output out
  lora-jax train --train train.csv --dev dev.csv --text sentence --output out
  lora-jax train --train pairs.tsv --text a --text-pair b --label score \\
      --task regression --output out
  lora-jax train --train data.tsv --rank 4 --targets query value --output out
  lora-jax train --task causal-lm --base gpt2 --train data.jsonl \\
      --prompt question --completion answer --output out
  lora-jax train --task causal-lm --base Qwen/Qwen3-0.6B --train talks.jsonl \\
      --messages messages --output out
  lora-jax train --task causal-lm --base gpt2 --train book.txt --output out
  lora-jax train --config out/config.yaml --seed 1 --output out-1

in the output folder:
  config.yaml      settled options, for --config
  run.json         hashes of data and base; the run resumes only with these
  metrics.jsonl    losses and metrics by step
  checkpoints/     best and last checkpoints
  adapter/         trained adapter, for predict, eval and merge
  results.json     final metrics, counts, times"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lora_jax.training.config import OPTIONS

    suppress = argparse.SUPPRESS
    parser.add_argument("--config", metavar="FILE", default=suppress, help="YAML file with any of these options.")
    add_run_flags(parser, OPTIONS)


def run(args: argparse.Namespace) -> None:
    config = make_config(args)
    from lora_jax.training import train
    from lora_jax.training.run.progress import LiveProgress

    with LiveProgress(reword=lambda text: in_flags(text, args.flags)) as progress:
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
        "padding": f"{100 * result.padding_share:.1f} % of the tokens in batches",
        "adapter": f"{result.adapter} ({format_bytes(result.adapter_bytes)})",
    }
    if dropped := {split: count for split, count in result.dropped.items() if count}:
        facts["left out"] = ", ".join(f"{count:,} texts of {split}" for split, count in dropped.items())
    if result.waiting_share is not None:
        facts["input pipeline"] = f"{100 * result.waiting_share:.1f} % of the time"
    print_facts(facts)
