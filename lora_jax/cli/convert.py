"""`lora-jax convert`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_jax.text import listed

from .method_flags import preset_or_names
from .parser import in_flags

if TYPE_CHECKING:
    from lora_jax.tools.convert import Conversion

NAME = "convert"
USAGE = ""
HELP = "convert an adapter to or from PEFT, to a lower rank, or extract one"
DESCRIPTION = """\
With --adapter: writes an adapter in another format, or with a lower rank. The folder may be that of a run, an adapter
or a PEFT adapter. The base is the one that it names, unless --base says where it is now.

With --base and --tuned: extracts a LoRA from a fully fine-tuned model, by the SVD of its difference from the base.

Formats (--to):
  peft      for peft, transformers and vLLM
  lora_jax  for lora-jax eval, predict, merge and inspect
  delta     new values of all changed leaves, under Hugging Face names

Where a rank is lowered, the table shows the relative error of each weight's change, in the Frobenius norm."""
EPILOG = """\
examples:
  lora-jax convert --adapter out --to peft --output out_peft
  lora-jax convert --adapter a --base bert-base-uncased --to lora_jax \\
      --output b
  lora-jax convert --adapter out --rank 4 --to lora_jax --output smaller
  lora-jax convert --adapter out_bitfit --to delta --output biases
  lora-jax convert --base base --tuned tuned --energy 0.9 --to peft --output c"""

_KINDS = {
    "run": "the adapter of a run",
    "adapter": "an adapter of lora_jax",
    "peft": "an adapter of PEFT",
    "model": "two full models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="FOLDER", help="Folder of a run, an adapter or a PEFT adapter.")
    parser.add_argument(
        "--tuned", metavar="MODEL", help="Fully fine-tuned model, a folder or a hub name; needs --base."
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="Base model, a folder or a hub name. Default: what the adapter names."
    )
    parser.add_argument("--to", required=True, choices=("peft", "lora_jax", "delta"), help="Format to write.")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="New or empty folder.")
    parser.add_argument("--rank", type=int, metavar="R", help="Largest rank. Default: no limit.")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="Share of the squared singular values to keep, up to 1; each weight gets the smallest rank that does.",
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="Names of the labels, where the adapter has none.")
    full = parser.add_argument_group("with --tuned")
    full.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="Weights to extract: all-linear, attention, mlp or modules (query value). Default: all-linear.",
    )
    full.add_argument(
        "--rest",
        choices=("train", "drop", "error"),
        help="Treatment of other changed leaves: keep them in full, leave them out, or stop. Default: train.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run(args: argparse.Namespace) -> None:
    from lora_jax.tools.convert import convert_adapter, extract_adapter
    from lora_jax.training.errors import ConfigError

    from .output import print_json

    options = {name: getattr(args, name) for name in ("to", "rank", "energy", "labels")}
    if (args.adapter is None) == (args.tuned is None):
        raise ConfigError("There is nothing to convert: pass either `adapter`, or `base` and `tuned`.")
    if args.adapter is not None:
        given = [f"`{name}`" for name in ("targets", "rest") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"{' and '.join(given)} can't be combined with `adapter`, which has its own targets.")
        result = convert_adapter(args.adapter, args.output, base=args.base, **options)
    else:
        if args.base is None:
            raise ConfigError("`tuned` needs `base`, the model that it was fine-tuned from.")
        targets = preset_or_names(args.targets or ["all-linear"])
        result = extract_adapter(
            args.base, args.tuned, args.output, targets=targets, rest=args.rest or "train", **options
        )
    print_json(result) if args.json else _show(result, args.flags)


def _show(result: Conversion, flags: Mapping[str, str]) -> None:
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts, print_groups, print_line, print_table

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
        facts["in full"] = f"{listed(result.carried)}: changed, and no targets (`--rest drop` leaves them out)"
    if result.dropped:
        facts["left out"] = f"{listed(result.dropped)}: changed in the tuned model, and as the base has them here"
    print_facts(facts)
    for notice in result.notices:
        print_line(f"note: {in_flags(notice, flags)}")
