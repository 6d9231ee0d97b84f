"""`lora-jax analyze`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .options import add_base_flag

if TYPE_CHECKING:
    from lora_jax.study.analysis.adapter_study import AdapterStudy

NAME = "analyze"
USAGE = ""
HELP = "what training changed: which leaves and layers, along which directions"
DESCRIPTION = """\
Says which leaves and layers moved most, how much each kind of bias did, and, where there are factors, the singular
values of each weight's change and how it relates to the weight (table 7 of the LoRA paper). With --other, how much of
their subspaces two LoRA adapters share (figure 3 there): another rank, or another seed.

The folder may be a run's, an adapter's or PEFT's. With --output, every table is written as CSV and every figure as PNG
and SVG."""
EPILOG = """\
examples:
  lora-jax analyze out
  lora-jax analyze out --output figures
  lora-jax analyze out_rank8 --other out_rank64 --output figures"""

_MOST = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of a run, an adapter or a PEFT adapter.")
    parser.add_argument("--other", metavar="ADAPTER", help="Another LoRA adapter of the same base.")
    parser.add_argument("--output", metavar="FOLDER", help="New or empty folder for tables and figures.")
    add_base_flag(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.files import new_folder, require_new_folder
    from lora_jax.study.analysis.adapter_study import study_adapter, write_study
    from lora_jax.tools.source import load_source

    from .output import print_facts

    if args.output is not None:
        import matplotlib  # noqa: F401, it is missed before anything is computed

        require_new_folder(args.output, "output")
    base = getattr(args, "base", None)
    source = load_source(args.adapter, base=base)
    other = load_source(args.other, base=base or source.base) if args.other else None
    others = other.params if other else None
    study = study_adapter(source.model.params, source.params, source.method, others=others)
    print_facts({"adapter": str(source.folder), "method": type(source.method).__name__, "base": source.base})
    _show(study)
    if args.output is not None:
        names = (Path(args.adapter).name, Path(args.other).name if args.other else "other")
        with new_folder(args.output, "output") as folder:
            written = write_study(folder, study, names=names)
        print_facts({"written": f"{len(written)} files into {args.output}"})


def _show(study: AdapterStudy) -> None:
    import numpy as np

    from .output import print_facts, print_table

    rows = [(row.path, f"{row.change:.4g}", f"{row.base:.4g}", _percent(row.relative)) for row in study.changes[:_MOST]]
    print_table(("moved most", "‖ΔW‖", "‖W‖", "‖ΔW‖ / ‖W‖"), rows)
    if len(study.changes) > _MOST:
        print_facts({"leaves": f"{len(study.changes) - _MOST:,} more have moved; --output writes them all"})
    if study.layers:
        rows = [(f"{row.stack}/{row.layer}", f"{row.change:.4g}", _percent(row.relative)) for row in study.layers]
        print_table(("layer", "‖ΔW‖", "‖ΔW‖ / ‖W‖"), rows)
    if study.biases is not None and study.biases.layers:
        table = study.biases
        columns = zip(table.terms, table.values.T, strict=True)
        rows = [
            (
                term,
                f"{np.nanmean(values):.3g}",
                f"{np.nanmax(values):.3g}",
                str(table.layers[int(np.nanargmax(values))]),
            )
            for term, values in sorted(columns, key=lambda column: -np.nanmean(column[1]))
        ]
        print_table(("bias", "mean |change|", "most", "in layer"), rows)
    if study.spectra:
        rows = [
            (
                path,
                " ".join(f"{value:.3g}" for value in study.spectra[path][:4]),
                f"{row.change:.3g}",
                f"{row.weight:.3g}",
                *(f"{value:.3g}" for value in (row.in_change, row.in_weight, row.in_random, row.factor)),
            )
            for path, row in study.amplifications.items()
        ]
        columns = ("weight", "first σ of ΔW", "‖ΔW‖", "‖W‖", "W in ΔW", "W in W", "W in random", "amplified")
        print_table(columns, rows, title="W in X is ‖Uᵀ W V‖ with the first r singular vectors of X")
    if study.similarities:
        rows = [
            (
                path,
                f"{grid.shape[0]}, {grid.shape[1]}",
                f"{grid[0, 0]:.3f}",
                f"{grid[-1, -1]:.3f}",
                f"{grid.mean():.3f}",
            )
            for path, grid in study.similarities.items()
        ]
        print_table(("shared subspace", "ranks", "φ(1, 1)", "φ(r, r)", "mean"), rows)


def _percent(share: float) -> str:
    return "from zero" if share == float("inf") else f"{100 * share:.3g} %"
