"""`lora-jax merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_base_flag

NAME = "merge"
USAGE = ""
HELP = "merge an adapter into its base"
DESCRIPTION = """\
Merges an adapter into its base, W + (alpha/r) B A, and writes a Hugging Face folder: config.json, model.safetensors and
the tokenizer. transformers loads it like any other model, with the same logits. A PEFT adapter is merged into the
base that it names, or that of --base."""
EPILOG = """\
example:
  lora-jax merge --adapter out --output merged"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, metavar="FOLDER", help="Folder of a run, an adapter or a PEFT adapter."
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="New or empty folder.")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="Largest size of a weight file; larger models are split. Default: 5GB.",
    )
    add_base_flag(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.tools.merge import merge_adapter
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts
    from .weights_progress import WeightsProgress

    with WeightsProgress() as progress:
        folder = merge_adapter(
            args.adapter,
            args.output,
            base=getattr(args, "base", None),
            max_shard_size=args.max_shard_size,
            progress=progress,
        )
    print_facts({path.name: format_bytes(path.stat().st_size) for path in sorted(Path(folder).iterdir())})
