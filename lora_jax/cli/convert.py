"""`lora-jax convert`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import preset_or_names

if TYPE_CHECKING:
    from lora_jax.tools.convert import Conversion

NAME = "convert"
HELP = "an adapter in PEFT's format or from it, of lower rank, or out of two full models"
DESCRIPTION = """\
With --adapter: writes an adapter in another format, or with a lower rank. The folder may be a run's, an adapter's or
PEFT's; which it is, its files tell. The base is the one that it names, unless --base says where it is now.

With --base and --tuned: writes the LoRA that a fully fine-tuned model is on its base, by the SVD of the difference.

Formats (--to):
  peft      adapter_config.json and adapter_model.safetensors, for peft, transformers and vLLM
  lora_jax  what lora-jax eval, predict, merge and inspect take
  delta     the new values of every leaf that has changed, under Hugging Face names; for BitFit, or any method

Where a rank is lowered, the table has the relative error of each weight's change, in the Frobenius norm."""
EPILOG = """\
examples:
  lora-jax convert --adapter out --to peft --output out_peft
  lora-jax convert --adapter from_the_hub --base bert-base-uncased --to lora_jax --output mine
  lora-jax convert --adapter out --rank 4 --to lora_jax --output smaller
  lora-jax convert --adapter out_bitfit --to delta --output biases
  lora-jax convert --base base --tuned tuned --energy 0.9 --rank 64 --to peft --output extracted"""

_KINDS = {
    "run": "the adapter of a run",
    "adapter": "an adapter of lora_jax",
    "peft": "an adapter of PEFT",
    "model": "two full models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="FOLDER", help="a run's folder, an adapter's, or PEFT's")
    parser.add_argument("--tuned", metavar="MODEL", help="a fully fine-tuned model, folder or hub name; needs --base")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name (default: what the adapter says)")
    parser.add_argument("--to", required=True, choices=("peft", "lora_jax", "delta"), help="the format to write")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--rank", type=int, metavar="R", help="the highest rank")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="of the squared singular values to keep, up to 1: each weight gets the least rank that does",
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="of the classes, where the adapter has none")
    full = parser.add_argument_group("with --tuned")
    full.add_argument(
        "--targets", nargs="+", metavar="NAME", help="all-linear (default), attention, mlp, or modules (query value)"
    )
    full.add_argument(
        "--rest",
        choices=("train", "drop", "error"),
        help="of other leaves that have changed: take them over in full (default), leave them out, or stop",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from lora_jax.tools.convert import convert_adapter, extract_adapter
    from lora_jax.training.errors import ConfigError

    from .output import print_json

    options = {name: getattr(args, name) for name in ("to", "rank", "energy", "labels")}
    if (args.adapter is None) == (args.tuned is None):
        raise ConfigError("What to convert isn't said: pass either --adapter, or --base and --tuned.")
    if args.adapter is not None:
        given = [f"--{name}" for name in ("targets", "rest") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"{' and '.join(given)} go with --tuned: an adapter's targets are its own.")
        result = convert_adapter(args.adapter, args.output, base=args.base, **options)
    else:
        if args.base is None:
            raise ConfigError("--tuned needs --base, the model that it was fine-tuned from.")
        targets = preset_or_names(args.targets or ["all-linear"])
        result = extract_adapter(
            args.base, args.tuned, args.output, targets=targets, rest=args.rest or "train", **options
        )
    print_json(result) if args.json else _show(result)


def _show(result: Conversion) -> None:
    from lora_jax.training.run.progress import format_bytes

    from .output import format_some, print_facts, print_groups, print_line, print_table

    print_facts(
        {
            "converted": _KINDS[result.kind],
            "base": result.base,
            "method": type(result.method).__name__,
            "output": str(result.output),
        }
    )
    print_groups(result.groups)
    if result.fits:
        rows = [
            (path, f"{fit.full_rank}", f"{fit.rank}", f"{fit.error:.3g}", f"{100 * fit.energy:.4g} %")
            for path, fit in result.fits.items()
        ]
        print_table(("weight", "rank before", "rank", "relative error", "energy kept"), rows)
    facts = {path.name: format_bytes(path.stat().st_size) for path in sorted(result.output.iterdir())}
    if result.carried:
        facts["in full"] = f"{format_some(result.carried)}: changed, and no targets (`--rest drop` leaves them out)"
    if result.dropped:
        facts["left out"] = f"{format_some(result.dropped)}: changed in the tuned model, and as the base has them here"
    print_facts(facts)
    for notice in result.notices:
        print_line(f"note: {notice}")
