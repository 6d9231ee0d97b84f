"""`lora-jax eval`."""

from __future__ import annotations

import argparse
import json

from .options import add_base_argument, add_column_arguments

NAME = "eval"
HELP = "score an adapter on labelled texts"
DESCRIPTION = "Scores a saved adapter on labelled texts."
EPILOG = """\
examples:
  lora-jax eval --adapter out --test test.tsv
  lora-jax eval --adapter out --test owner/name@test --text sentence --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="a run's folder, or the adapter in it")
    parser.add_argument("--test", required=True, metavar="DATA", help="labelled texts: a file or a hub data set")
    add_column_arguments(parser)
    add_base_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from lora_jax.training.data import read_examples
    from lora_jax.training.predict import adapter_folder, load_predictor
    from lora_jax.training.progress import format_metrics
    from lora_jax.training.task_file import read_task

    from .tables import print_facts
    from .weights_progress import WeightsProgress

    saved = read_task(adapter_folder(args.adapter))
    examples = read_examples(
        args.test,
        text=getattr(args, "text", saved.text),
        text_pair=getattr(args, "text_pair", saved.text_pair),
        label=getattr(args, "label", saved.label),
        split="test",
    )
    saved.task.encode(examples)  # an unknown label is told before the model is loaded
    with WeightsProgress() as progress:
        predictor = load_predictor(args.adapter, base=getattr(args, "base", None), progress=progress)
    encoded = predictor.encode(examples.texts, examples.pairs)
    metrics = predictor.evaluate(examples)
    if args.json:
        print(json.dumps({"data": args.test, "rows": encoded.rows, "truncated": encoded.truncated, **metrics}))
        return
    facts = {"rows": f"{encoded.rows:,}", "metrics": format_metrics(metrics)}
    if encoded.truncated:
        facts["truncated"] = f"{encoded.truncated:,} texts cut at {predictor.max_length} tokens"
    print_facts(facts)
