"""`lora-jax compare`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .options import add_base_arguments, add_data_arguments, add_loop_arguments, options_of

if TYPE_CHECKING:
    from lora_jax.study import Comparison, Outcome

NAME = "compare"
HELP = "find out which method suits a task"
DESCRIPTION = """\
Fine-tunes a base with several methods, at several budgets, learning rates and seeds, and reports quality, parameters,
time, memory and latency, with the method to take.

Learning rates are chosen on dev with the first seed. Without --dev a share of the training rows is held out; without
--train the shipped messages are used, as a demonstration. Every run is kept before the next begins: interrupted at
any moment, the same command goes on."""
EPILOG = """\
examples:
  lora-jax compare --output study                                  the demonstration
  lora-jax compare --train train.tsv --dev dev.tsv --test test.tsv --output study --minutes 30
  lora-jax compare --train train.tsv --methods bitfit lora --ranks 1 8 64 --seeds 0 1 --output study
  lora-jax compare --train train.tsv --grid grid.yaml --output study
  lora-jax compare --train train.tsv --test test.tsv --preset paper-lora-rank --output study
  lora-jax compare --train train.tsv --test test.tsv --preset low-data --grid rows.yaml --output study

a grid file (x and train_rows: where an entry is on the preset's axis, and how many rows it learns from):
  - {name: bitfit}
  - {name: lora, rank: 4, targets: [query, value], lr: [5e-4, 2e-3], label: "LoRA, small", series: LoRA}
  - {name: full, label: "full, 100 rows", series: full fine-tuning, train_rows: 100}

in the output folder:
  report.html      the whole of it, one file; report.md the same
  figures/         SVG and PNG
  tables/          CSV and Markdown
  results.jsonl    one row a run, with all that repeats it
  runs/            adapters of the chosen learning rates
  data/            rows that were drawn: held-out dev, training slices"""

PRESETS = (
    "paper-lora-targets",
    "paper-lora-rank",
    "paper-bitfit-terms",
    "paper-methods",
    "intrinsic-dimension",
    "low-data",
)
_OWN = ("output", "methods", "ranks", "rate_factors", "grid", "preset", "seeds", "train_rows", "dev_share", "data_seed")
_OWN += ("minutes", "retry_failed", "plan")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder, or that of the same comparison")
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML with options of all runs")
    grid = parser.add_argument_group("what is compared")
    grid.add_argument(
        "--methods", nargs="+", metavar="NAME", help="of the default grid, or beyond it (default: its all)"
    )
    grid.add_argument("--ranks", nargs="+", type=int, metavar="R", help="in place of the grid's")
    grid.add_argument(
        "--rate-factors", nargs="+", type=float, metavar="F", help="of each method's default rate (default: 1 0.33 3)"
    )
    grid.add_argument(
        "--grid",
        metavar="FILE",
        help="YAML with a list of methods and their options; with --preset, in place of its candidates",
    )
    grid.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="an ablation of a paper, beside its figures: " + ", ".join(PRESETS),
    )
    grid.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    grid.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="of training: a run starts only if it is predicted to end within them",
    )
    grid.add_argument("--retry-failed", action="store_true", help="do runs again that have failed")
    grid.add_argument("--plan", action="store_true", help="show the grid and stop")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--train-rows", type=int, metavar="N", help="draw so many training rows, labels in proportion")
    rows.add_argument(
        "--dev-share", type=float, default=0.2, metavar="P", help="held out where there is no --dev (default: 0.2)"
    )
    rows.add_argument("--data-seed", type=int, default=0, metavar="N", help="of both draws (default: 0)")
    add_data_arguments(parser)
    add_base_arguments(parser.add_argument_group("base"))
    add_loop_arguments(parser.add_argument_group("training"))


def run(args: argparse.Namespace) -> None:
    own = {name: vars(args).pop(name) for name in _OWN}
    settings = _settings(own, options_of(args))
    from lora_jax.study import compare
    from lora_jax.study.report.live_table import LiveTable

    if own["plan"]:
        _show_plan(settings)
        return
    with LiveTable(settings.seeds) as table:
        outcome = compare(settings, on_progress=table, retry_failed=own["retry_failed"])
    _show(outcome)


def _settings(own: dict[str, Any], options: dict[str, Any]) -> Comparison:
    from lora_jax.study import Comparison, default_candidates, read_grid
    from lora_jax.study.grid.candidates import RATE_FACTORS
    from lora_jax.training.errors import ConfigError

    chosen = next((name for name in ("grid", "preset") if own[name] is not None), None)
    adjusted = [name for name in ("methods", "ranks") if own[name] is not None]
    if own["grid"] is not None and own["rate_factors"] is not None:
        raise ConfigError("`grid` and `rate_factors` each say which rates are tried: put `lr` into the grid's entries.")
    if chosen and adjusted:
        raise ConfigError(f"`{chosen}` and `{adjusted[0]}` each say what is compared: give one of them.")
    candidates = None
    if own["grid"] is not None:
        candidates = read_grid(own["grid"])
    elif own["preset"] is None and (adjusted or own["rate_factors"] is not None):
        factors = own["rate_factors"] or RATE_FACTORS
        candidates = default_candidates(own["methods"], ranks=own["ranks"], factors=factors)
    names = ("output", "preset", "train_rows", "dev_share", "data_seed", "minutes")
    return Comparison(
        **{name: own[name] for name in names},
        options=options,
        candidates=candidates,
        rate_factors=None if own["rate_factors"] is None else tuple(own["rate_factors"]),
        seeds=tuple(own["seeds"]),
    )


def _show_plan(settings: Comparison) -> None:
    from lora_jax.study.grid.plan import count_runs
    from lora_jax.study.grid.settings import prepare

    from .output import print_facts, print_table

    checked = prepare(settings)
    rows = [
        (
            candidate.label,
            ", ".join(f"{rate:g}" for rate in candidate.rates),
            f"{checked.reports[candidate.id].trainable:,}",
            f"{checked.reports[candidate.id].percent:.3g} %",
        )
        for candidate in checked.candidates
    ]
    print_table(("method", "learning rates", "trained parameters", "of all"), rows, text_columns=2)
    print_facts(
        {
            "rows": ", ".join(f"{split} {len(rows):,}" for split, rows in checked.splits.examples.items()),
            "runs": f"{count_runs(checked.candidates, settings.seeds)} of {checked.config.steps:,} steps",
        }
    )


def _show(outcome: Outcome) -> None:
    from lora_jax.study.report.page import answer, remarks, write_report
    from lora_jax.study.report.tables import cost_table, quality_table

    from .output import print_facts, print_line, print_table

    command = ["lora-jax", *sys.argv[1:]] if sys.argv[1:2] == [NAME] else None
    path = write_report(outcome, command=command)
    for table in (quality_table(outcome), cost_table(outcome)):
        print_table(table.columns, table.rows)
    choice, reason = answer(outcome)
    print_facts({"recommended": f"{choice}: {reason}", "report": str(path)})
    for remark in remarks(outcome):
        print_line(remark)
