"""`lora-jax compare`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .options import BASE, COLUMNS, DATA, LOOP, add_run_flags, options_of

if TYPE_CHECKING:
    from lora_jax.study import Comparison, Outcome

NAME = "compare"
USAGE = "--output FOLDER [--train DATA] [flags]"
HELP = "find out which method suits a task"
DESCRIPTION = """\
Fine-tunes a base with several methods, at several budgets, learning rates and seeds, and reports quality, parameters,
time, memory and latency, with the method to take.

Learning rates are chosen on dev with the first seed. Without --dev a share of the training rows is held out; without
--train the shipped messages are used, as a demonstration. Every run is saved before the next begins: if a
comparison is interrupted, run the same command to resume it."""
EPILOG = """\
examples:
  lora-jax compare --output study
  lora-jax compare --train train.tsv --test test.tsv --output study --minutes 30
  lora-jax compare --train train.tsv --methods bitfit lora --ranks 1 8 64 \\
      --seeds 0 1 --output study
  lora-jax compare --train train.tsv --grid grid.yaml --output study
  lora-jax compare --train train.tsv --preset paper-lora-rank --output study
  lora-jax compare --train train.tsv --preset low-data --grid g.yaml --output s

a grid file (x is an entry's place on the preset's axis, train_rows its data):
  - {name: bitfit}
  - {name: lora, rank: 4, targets: [query, value], lr: [5e-4, 2e-3]}
  - {name: full, label: "full, 100 rows", series: full, train_rows: 100}

in the output folder:
  report.html      the report in one file; report.md the same
  figures/         SVG and PNG
  tables/          CSV and Markdown
  results.jsonl    one row per run, with everything needed to repeat it
  runs/            adapters of the chosen learning rates
  data/            sampled rows: held-out dev, training subsets"""

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
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="Folder of the comparison: a new one, or the same to resume."
    )
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with options of all runs."
    )
    grid = parser.add_argument_group("what is compared")
    grid.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="Methods to compare. Default: frozen, bitfit, lora and full, each at its usual budgets.",
    )
    grid.add_argument("--ranks", nargs="+", type=int, metavar="R", help="Ranks of lora, in place of the grid's.")
    grid.add_argument(
        "--rate-factors",
        nargs="+",
        type=float,
        metavar="F",
        help="Multiples of each method's default learning rate. Default: 1 0.33 3.",
    )
    grid.add_argument(
        "--grid",
        metavar="FILE",
        help="YAML file with a list of methods and their options; with --preset, in place of its candidates.",
    )
    grid.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"Ablation of a paper, shown beside its figures. Choices: {', '.join(PRESETS)}.",
    )
    grid.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="Seeds. Default: 0 1 2.")
    grid.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="Minutes of training; a run starts only if it is predicted to end in time. Default: no limit.",
    )
    grid.add_argument("--retry-failed", action="store_true", help="Repeat failed runs.")
    grid.add_argument("--plan", action="store_true", help="Show the grid and stop.")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--train-rows",
        type=int,
        metavar="N",
        help="Number of training rows to sample, labels in proportion. Default: all.",
    )
    rows.add_argument(
        "--dev-share",
        type=float,
        default=0.2,
        metavar="P",
        help="Share of the training rows that is held out without --dev. Default: 0.2.",
    )
    rows.add_argument("--data-seed", type=int, default=0, metavar="N", help="Seed of both samples. Default: 0.")
    add_run_flags(parser, (*DATA, *COLUMNS, *BASE, *LOOP))


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
    from lora_jax.study.grid.settings import prepare_comparison

    from .output import print_facts, print_table

    checked = prepare_comparison(settings)
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
