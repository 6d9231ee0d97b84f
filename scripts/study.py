"""Runs the study of `docs/study.md` on real data, and writes that page.

    scripts/study.py --data ../shared/data                       # all of it, hours on two cores; resumable run by run
    scripts/study.py --only trec-methods --seeds 0               # one experiment
    scripts/study.py --list                                      # the experiments and their commands
    scripts/study.py --page-only                                 # the page again, from what is kept

Each experiment is one `lora-jax compare` command, the analyses are `lora-jax analyze`; the page lists them. What they
found is kept in `docs/study`: an experiment's rows, with which it goes on in a new clone, its summary and its figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "scripts" / "study_page.md"
PAGE = ROOT / "docs" / "study.md"
KEPT = ROOT / "docs" / "study"
GRIDS = Path("scripts") / "study_grids"
ROWS, DESCRIPTION = "results.jsonl", "comparison.json"
FIGURE = re.compile(r"<!-- FIGURE (?P<experiment>[\w-]+)/(?P<name>\w+): (?P<title>.+?) -->")


class Data(NamedTuple):
    """A data set's files and columns, the settings of all runs on it, and what is measured."""

    title: str
    metric: str
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
        "accuracy",
        ("--train", "trec/train.tsv", "--test", "trec/test.tsv"),
        ("--text", "question", "--label", "coarse", "--steps", "250", "--eval-every", "125", "--max-length", "48"),
    ),
    "sst2": Data(
        "SST-2, sentences",
        "accuracy",
        (
            *("--train", "sst2_sentences/train.tsv", "--dev", "sst2_sentences/dev.tsv"),
            *("--test", "sst2_sentences/test.tsv"),
        ),
        ("--text", "sentence", "--steps", "150", "--eval-every", "75", "--max-length", "48"),
    ),
    "cola": Data(
        "CoLA",
        "matthews",
        ("--train", "glue_cola/train.tsv", "--test", "glue_cola/dev.tsv"),
        (
            *("--text", "sentence", "--metric", "matthews"),
            *("--steps", "640", "--eval-every", "160", "--max-length", "48"),
        ),
    ),
    "rte": Data(
        "RTE",
        "accuracy",
        ("--train", "glue_rte/train.tsv", "--test", "glue_rte/dev.tsv"),
        (
            *("--text", "sentence1", "--text-pair", "sentence2"),
            *("--steps", "200", "--batch-size", "16", "--eval-every", "100", "--max-length", "96"),
        ),
    ),
    "stsb": Data(
        "STS-B",
        "pearson",
        ("--train", "glue_stsb/train.tsv", "--dev", "glue_stsb/dev.tsv", "--test", "glue_stsb/test.tsv"),
        (
            *("--text", "sentence1", "--text-pair", "sentence2", "--label", "score", "--task", "regression"),
            *("--steps", "600", "--batch-size", "16", "--eval-every", "200", "--max-length", "64"),
        ),
    ),
    "banking77": Data(
        "BANKING77",
        "accuracy",
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
    "trec-dimension": Experiment("trec", ("--preset", "intrinsic-dimension", "--grid", str(GRIDS / "dimension.yaml"))),
    "trec-budgets": Experiment("trec", ("--grid", str(GRIDS / "budgets.yaml"))),
    **{
        f"{data}-methods": Experiment(data, ("--grid", str(GRIDS / f"{grid}.yaml")))
        for data, grid in (
            ("sst2", "methods"),
            ("banking77", "methods_lower"),
            ("cola", "methods_long"),
            ("stsb", "methods_lower"),
            ("rte", "methods_few"),
        )
    },
    "banking77-rows": Experiment("banking77", ("--preset", "low-data", "--grid", str(GRIDS / "rows.yaml"))),
}


# Runs that `lora-jax analyze` looks at, one or one beside another: experiment, candidate, seed.
ANALYSES = {
    "biases": [("trec-terms", "all biases", 0)],
    "ranks": [("trec-rank", "LoRA, q,v, r=8", 0), ("trec-rank", "LoRA, q,v, r=64", 0)],
    "seeds": [("trec-targets", "LoRA, q,v, r=4", 0), ("trec-targets", "LoRA, q,v, r=4", 1)],
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


def analyze(name: str, folder: Path) -> list[str]:
    first, *others = [str(adapter(folder, *run)) for run in ANALYSES[name]]
    beside = ("--other", *others) if others else ()
    return ["lora-jax", "analyze", first, *beside, "--output", str(folder / "analyses" / name)]


def adapter(folder: Path, experiment: str, label: str, seed: int) -> Path:
    """The folder of a candidate's adapter at the rate that was chosen for it."""
    rates = {row["method"]: float(row["learning_rate"]) for row in summary(experiment)}
    for line in (folder / experiment / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (row["candidate"], row["rate"], row["seed"]) == (label, rates[label], seed):
            found = folder / experiment / "runs" / row["id"] / "adapter"
            if found.is_dir():
                return found
    raise SystemExit(f"{folder / experiment} has no adapter of {label!r} with seed {seed}: run it there")


def restore(experiment: str, folder: Path) -> None:
    """Puts the kept rows where the comparison goes on with them, unless it has rows there."""
    target = folder / experiment
    if not (target / ROWS).exists() and (KEPT / experiment / ROWS).exists():
        target.mkdir(parents=True, exist_ok=True)
        for name in (ROWS, DESCRIPTION):
            shutil.copyfile(KEPT / experiment / name, target / name)


def keep(experiment: str, folder: Path) -> None:
    """Copies what an experiment found, and the figures that the page shows of it, into `docs/study`."""
    target = KEPT / experiment
    target.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, DESCRIPTION, "tables/summary.csv"):
        shutil.copyfile(folder / experiment / name, target / Path(name).name)
    for match in FIGURE.finditer(TEMPLATE.read_text(encoding="utf-8")):
        if match["experiment"] == experiment:
            name = f"{match['name']}.svg"
            shutil.copyfile(folder / experiment / "figures" / name, target / name)


def keep_analysis(name: str, folder: Path) -> None:
    """Copies the files that the page has something of; of the thousands of `φ(i, j)`, those that it shows."""
    source, target = folder / "analyses" / name, KEPT / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("biases.csv", "biases.svg"):
        if (source / file).exists():
            shutil.copyfile(source / file, target / file)
    if (source / "similarity.csv").exists():
        heading, *lines = (source / "similarity.csv").read_text(encoding="utf-8").splitlines()
        places = {line: tuple(map(int, line.rsplit(",", 3)[1:3])) for line in lines}
        last = max(places.values())
        shown = [line for line, place in places.items() if place in ((1, 1), (1, last[1]), last)]
        (target / "similarity.csv").write_text("\n".join([heading, *shown, ""]), encoding="utf-8")


def summary(experiment: str) -> list[dict[str, str]]:
    """One row a candidate; empty before the experiment has run."""
    path = KEPT / experiment / "summary.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["test_mean"]]


# ------------------------------------------------------------------------------------------------------------- the page


def spread(row: dict[str, str]) -> str:
    """In percent, as the tables of `lora-jax compare` have it."""
    mean = f"{100 * float(row['test_mean']):.1f}"
    return f"{mean} ± {100 * float(row['test_deviation']):.1f}" if row["test_deviation"] else mean


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def quality(experiment: str) -> str:
    about = DATA[EXPERIMENTS[experiment].data]
    rows = sorted(summary(experiment), key=lambda row: -float(row["test_mean"]))
    return table(
        ("method", f"{about.title}: {about.metric} × 100", "seeds", "trained", "% of all", "learning rate"),
        [
            (
                row["method"],
                spread(row),
                row["seeds"],
                f"{int(row['trainable']):,}",
                f"{float(row['percent']):.3g}",
                f"{float(row['learning_rate']):g}",
            )
            for row in rows
        ],
    )


def tasks() -> str:
    """Every method on every data set, and the mean over those that all have run on."""
    found = {data: {row["method"]: row for row in summary(f"{data}-methods")} for data in DATA}
    found = {data: rows for data, rows in found.items() if rows}
    methods = list(dict.fromkeys(method for rows in found.values() for method in rows))
    lines = []
    for method in methods:
        have = [rows[method] for rows in found.values() if method in rows]
        mean = statistics.mean(100 * float(row["test_mean"]) for row in have)
        cells = [spread(rows[method]) if method in rows else "–" for rows in found.values()]
        whole = len(have) == len(found)
        lines.append((mean if whole else 0.0, (method, *cells, f"{mean:.1f}" if whole else "–")))
    lines.sort(key=lambda line: -line[0])
    counts = {data: max(int(row["seeds"]) for row in rows.values()) for data, rows in found.items()}
    titles = [f"{DATA[data].title} ({count} seed{'s' * (count > 1)})" for data, count in counts.items()]
    return table(("method", *titles, "mean"), [line for _, line in lines])


def biases() -> str:
    """The mean change of each term over the layers."""
    values: dict[str, list[float]] = {}
    with (KEPT / "biases" / "biases.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["layer"]:
                values.setdefault(row["term"], []).append(float(row["change"]))
    means = sorted(((statistics.mean(changes), term) for term, changes in values.items()), reverse=True)
    return table(("bias", "mean change over the layers"), [(term, f"{mean:.5f}") for mean, term in means])


def similarity() -> str:
    """Of two pairs of adapters, the subspaces' overlap at some `i, j`, as the mean over the weights."""
    lines = []
    for name, label in (("ranks", "r = 8 and r = 64"), ("seeds", "r = 4, seeds 0 and 1")):
        path = KEPT / name / "similarity.csv"
        if not path.exists():
            continue
        cells: dict[tuple[int, int], list[float]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells.setdefault((int(row["i"]), int(row["j"])), []).append(float(row["phi"]))
        lines += [(label, f"{i}, {j}", f"{statistics.mean(values):.3f}") for (i, j), values in sorted(cells.items())]
    return table(("adapters", "i, j", "φ(i, j)"), lines)


def latency() -> str:
    """The table of the benchmark's last run, as `docs/benchmarks.md` has it."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = text.partition("\n## inference: ")[2].partition("\n## ")[0]
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))


def step_cost(column: str, method: str) -> str:
    """Of full fine-tuning's, on MiniLM, as `scripts/bench/step.py` found it."""
    rows = json.loads((ROOT / "docs" / "benchmarks" / "step.json").read_text(encoding="utf-8"))["rows"]
    value = next(row[column] for row in rows if row["workload"].startswith("MiniLM") and row["method"] == method)
    return f"{value[0] if isinstance(value, list) else value:.2f}"


def page(data: str) -> str:
    """The template, with the tables, scores and figures that are kept."""
    text = TEMPLATE.read_text(encoding="utf-8")

    def score(match: re.Match[str]) -> str:
        rows = {row["method"]: row for row in summary(match["experiment"])}
        return spread(rows[match["label"]])

    text = FIGURE.sub(r"![\g<title>](study/\g<experiment>/\g<name>.svg)", text)
    text = re.sub(r"<!-- QUALITY (\S+) -->", lambda match: quality(match[1]), text)
    for name, column in (("step of full", "/ full"), ("memory of full", "of full")):
        text = re.sub(rf"\{{\{{{name}: ([^}}]+)\}}\}}", lambda match, column=column: step_cost(column, match[1]), text)
    text = re.sub(r"\{\{(?P<experiment>[\w-]+): (?P<label>[^}]+)\}\}", score, text)
    commands = [shlex.join(command(name, data, Path("runs/study"))) for name in EXPERIMENTS if summary(name)]
    tables = {"TASKS": tasks, "BIASES": biases, "SIMILARITY": similarity, "LATENCY": latency}
    for mark, make in tables.items():
        if f"<!-- {mark} -->" in text:
            text = text.replace(f"<!-- {mark} -->", make())
    return text.replace("<!-- COMMANDS -->", "```bash\n" + "\n".join(commands) + "\n```")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of each experiment's own")
    parser.add_argument("--minutes", type=float, metavar="M", help="of each experiment: its runs that don't fit wait")
    parser.add_argument("--list", action="store_true", help="show the experiments and stop")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is kept")
    options = parser.parse_args()
    seeds = tuple(options.seeds) if options.seeds else None
    for name in options.only:
        arguments = command(name, options.data, options.output, seeds)
        if options.list:
            print(f"{name}: {shlex.join(arguments)}")
        elif not options.page_only:
            restore(name, options.output)
            run([*arguments, "--minutes", f"{options.minutes:g}"] if options.minutes is not None else arguments)
            keep(name, options.output)
    if options.list:
        return
    if not options.page_only:
        for name, runs in ANALYSES.items():
            if {experiment for experiment, _, _ in runs} & set(options.only):
                run(analyze(name, options.output))
                keep_analysis(name, options.output)
    PAGE.write_text(page(options.data), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
