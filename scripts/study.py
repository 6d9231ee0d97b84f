"""Runs the study of `docs/study.md` on real data, and writes that page.

    scripts/study.py --data ../shared/data                       # all of it, hours on two cores; resumable run by run
    scripts/study.py --only trec-methods --seeds 0               # one experiment
    scripts/study.py --list                                      # the experiments and their commands
    scripts/study.py --page-only                                 # the page again, from the finished runs

Each experiment is one `lora-jax compare` command, the analyses are `lora-jax analyze`; the page lists them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Rates that dev chose for each method on TREC.
GRIDS = Path("scripts") / "study_grids"


class Data(NamedTuple):
    """A data set's files and columns, and the settings of all runs on it."""

    title: str
    files: tuple[str, ...]
    options: tuple[str, ...]


class Experiment(NamedTuple):
    """A comparison: what is compared on which data, with how many seeds."""

    data: str
    options: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


# Without a dev split a fifth of the training rows is held out. CoLA's and RTE's tests have no public labels: their dev
# sets stand in, and nothing is chosen on them.
DATA = {
    "trec": Data(
        "TREC, question types",
        ("--train", "trec/train.tsv", "--test", "trec/test.tsv"),
        ("--text", "question", "--label", "coarse", "--steps", "250", "--eval-every", "125", "--max-length", "48"),
    ),
    "sst2": Data(
        "SST-2, sentences",
        (
            *("--train", "sst2_sentences/train.tsv", "--dev", "sst2_sentences/dev.tsv"),
            *("--test", "sst2_sentences/test.tsv"),
        ),
        ("--text", "sentence", "--steps", "150", "--eval-every", "75", "--max-length", "48"),
    ),
    "cola": Data(
        "CoLA",
        ("--train", "glue_cola/train.tsv", "--test", "glue_cola/dev.tsv"),
        (
            *("--text", "sentence", "--metric", "matthews"),
            *("--steps", "150", "--eval-every", "75", "--max-length", "48"),
        ),
    ),
    "rte": Data(
        "RTE",
        ("--train", "glue_rte/train.tsv", "--test", "glue_rte/dev.tsv"),
        (
            *("--text", "sentence1", "--text-pair", "sentence2"),
            *("--steps", "150", "--eval-every", "75", "--max-length", "96"),
        ),
    ),
    "stsb": Data(
        "STS-B",
        ("--train", "glue_stsb/train.tsv", "--dev", "glue_stsb/dev.tsv", "--test", "glue_stsb/test.tsv"),
        (
            *("--text", "sentence1", "--text-pair", "sentence2", "--label", "score", "--task", "regression"),
            *("--steps", "150", "--eval-every", "75", "--max-length", "64"),
        ),
    ),
    "banking77": Data(
        "BANKING77",
        ("--train", "banking77/train.tsv", "--test", "banking77/test.tsv"),
        ("--text", "text", "--label", "intent", "--steps", "250", "--eval-every", "125", "--max-length", "48"),
    ),
}
# Three times a default rate is what dev chose for most methods in `trec-methods`: the runs are short.
_HIGHER = ("--rate-factors", "3")
_BOTH = ("--rate-factors", "1", "3")
EXPERIMENTS = {
    # Its rates are those of all other data.
    "trec-methods": Experiment("trec", ("--preset", "paper-methods")),
    "trec-targets": Experiment("trec", ("--preset", "paper-lora-targets", *_HIGHER)),
    "trec-terms": Experiment("trec", ("--preset", "paper-bitfit-terms", *_BOTH)),
    "trec-rank": Experiment("trec", ("--preset", "paper-lora-rank", *_HIGHER)),
    "trec-dimension": Experiment("trec", ("--preset", "intrinsic-dimension", *_BOTH)),
    "trec-budgets": Experiment("trec", ("--grid", str(GRIDS / "budgets.yaml"))),
    **{
        f"{data}-methods": Experiment(data, ("--grid", str(GRIDS / "methods.yaml")))
        for data in ("sst2", "cola", "rte", "stsb", "banking77")
    },
    "banking77-rows": Experiment("banking77", ("--preset", "low-data", *_HIGHER)),
}


def command(name: str, data: str, output: Path, seeds: tuple[int, ...] | None = None) -> list[str]:
    experiment = EXPERIMENTS[name]
    about = DATA[experiment.data]
    files = [f"{data}/{word}" if place % 2 else word for place, word in enumerate(about.files)]
    chosen = map(str, seeds or experiment.seeds)
    return [
        *("lora-jax", "compare", *files, *about.options, *experiment.options),
        *("--seeds", *chosen, "--output", str(output / name)),
    ]


def run(arguments: list[str]) -> None:
    """Runs a command of this environment."""
    print(shlex.join(arguments), flush=True)
    subprocess.run([str(Path(sys.executable).parent / arguments[0]), *arguments[1:]], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of each experiment's own")
    parser.add_argument("--list", action="store_true", help="show the experiments and stop")
    parser.add_argument("--page-only", action="store_true", help="write the page from the finished runs")
    options = parser.parse_args()
    seeds = tuple(options.seeds) if options.seeds else None
    for name in options.only:
        arguments = command(name, options.data, options.output, seeds)
        if options.list:
            print(f"{name}: {shlex.join(arguments)}")
        elif not options.page_only:
            run(arguments)


if __name__ == "__main__":
    main()
