"""Fine-tunes the default base on real data with every method, and writes `docs/results.md`.

    scripts/results.py --data ../shared/data                 # all runs, resumable; then the page
    scripts/results.py --data ../shared/data --tasks trec --methods lora_qv --seeds 0
    scripts/results.py --page-only                           # the page again, from the finished runs

Each run is one `lora-jax train` command in a process of its own, so that its peak memory is its own; the page lists
the commands. Set-up and reference scores: the same base, data and hyperparameters with PyTorch and PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
AGAIN = ROOT / "runs" / "peft_reference.jsonl"


INTRODUCTION = """\
# Results on real data

Accuracy in percent after the last of 4 epochs, mean ± standard deviation over seeds. The base is
`sentence-transformers/all-MiniLM-L6-v2`, the classifier sits on the first token's pooler. Batch 32, texts cut at 64
tokens, AdamW (weight decay 0.01), linear schedule with 6 % warm-up, gradient norm clipped at 1, dropout 0.1; LoRA with
r = 8, α = 16, factors started as PEFT starts them. *PEFT* is PyTorch with PEFT on the same base, data and
hyperparameters: the scores of one seed that this project set out to reach, and *difference* is to them. *PEFT again*
repeats that recipe over seeds where the difference asked for it (`scripts/peft_reference.py`), to tell a difference
from a seed's luck.

Step time is the median over a run's steps, compilation aside, and the least of the seeds', on two CPU cores that other
work shared: it shows the order of magnitude. Ratios between methods are measured in one interleaved run, in
[benchmarks.md](benchmarks.md). Peak memory is the largest resident size of the whole process, compiler and evaluation
included; the process keeps what it frees ([performance.md](performance.md)).

This page is written by `scripts/results.py`."""


class Task(NamedTuple):
    title: str
    train: str
    test: str
    columns: tuple[str, ...]


class Method(NamedTuple):
    title: str
    options: tuple[str, ...]


TASKS = {
    "trec": Task("TREC, coarse", "trec/train.tsv", "trec/test.tsv", ("--text", "question", "--label", "coarse")),
    "sst2": Task("SST-2 sentences", "sst2_sentences/train.tsv", "sst2_sentences/dev.tsv", ("--text", "sentence")),
}
# PEFT's own start of the factors, as in the runs to compare with.
LORA = ("--method", "lora", "--init", "kaiming")
METHODS = {
    "frozen": Method("frozen (head only)", ("--method", "frozen", "--lr", "5e-3")),
    "bitfit": Method("BitFit", ("--method", "bitfit", "--lr", "3e-3")),
    "lora_qv": Method("LoRA, query and value", (*LORA, "--targets", "query", "value", "--lr", "2e-3")),
    "lora_all": Method("LoRA, all linear", (*LORA, "--targets", "all-linear", "--lr", "1e-3")),
    "full": Method("full fine-tuning", ("--method", "full", "--lr", "1e-4")),
}
SHARED = ("--epochs", "4", "--batch-size", "32", "--max-length", "64", "--weight-decay", "0.01", "--warmup", "0.06")
SHARED += ("--schedule", "linear", "--clip-norm", "1", "--dropout", "0.1", "--pooling", "first")


def command(task: str, method: str, seed: int, data: str, output: Path) -> list[str]:
    files = ["--train", f"{data}/{TASKS[task].train}", "--test", f"{data}/{TASKS[task].test}", *TASKS[task].columns]
    return [
        "lora-jax",
        "train",
        *files,
        *METHODS[method].options,
        *SHARED,
        "--seed",
        str(seed),
        "--output",
        str(output),
    ]


def run(arguments: list[str]) -> float:
    """Runs a command of this environment; returns its peak resident memory in MB."""
    program = str(Path(sys.executable).parent / arguments[0])
    pid = os.posix_spawn(program, [program, *arguments[1:]], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"failed: {shlex.join(arguments)}")
    return usage.ru_maxrss / 1024


def reference_scores(path: Path) -> dict[tuple[str, str], list[float]]:
    """Accuracies of the last epoch, one a seed, by task and method; empty without the file."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        scores.setdefault((row["task"], row["method"]), []).append(row["acc"][-1])
    return scores


def finished_runs(folder: Path) -> dict[tuple[str, str], list[dict]]:
    runs: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(folder.glob("*/results.json")):
        task, method, _ = path.parent.name.split("-")
        peak = path.parent / "peak_mb.json"
        extra = {"peak_mb": json.loads(peak.read_text())} if peak.exists() else {}
        runs.setdefault((task, method), []).append(json.loads(path.read_text()) | extra)
    return runs


def spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def page(folder: Path, reference: dict[tuple[str, str], list[float]], data: str) -> str:
    runs, again = finished_runs(folder), reference_scores(AGAIN)
    lines = [INTRODUCTION]
    for task, about in TASKS.items():
        if not any(key[0] == task for key in runs):
            continue
        lines += ["", f"## {about.title}", ""]
        columns = ("method", "accuracy", "seeds", "PEFT", "difference", "PEFT again", "trained", "%", "step, ms")
        columns += ("peak memory, MB", "adapter, kB")
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for method, (title, _) in METHODS.items():
            rows = runs.get((task, method), [])
            if not rows:
                continue
            scores = [100 * row["metrics"]["test"]["accuracy"] for row in rows]
            theirs, repeated = reference.get((task, method)), again.get((task, method))
            gap = "" if theirs is None else f"{statistics.mean(scores) - statistics.mean(theirs):+.1f}"
            cells = [
                title,
                spread(scores),
                str(len(scores)),
                "" if theirs is None else spread(theirs),
                gap,
                "" if repeated is None else f"{spread(repeated)} (seeds: {len(repeated)})",
                f"{rows[0]['trainable']:,}",
                f"{rows[0]['percent']:.3g}",
                f"{min(row['step_ms'] for row in rows):.0f}",
                f"{max(row.get('peak_mb', 0) for row in rows):,.0f}",
                f"{rows[0]['adapter_bytes'] / 1000:,.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Commands", "", "With seeds 0, 1, 2 in place of `SEED`:", "", "```bash"]
    for task in TASKS:
        for method in METHODS:
            if (task, method) in runs:
                text = shlex.join(command(task, method, 0, data, Path(f"runs/results/{task}-{method}-SEED")))
                lines.append(text.replace("--seed 0", "--seed SEED"))
    lines += ["```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--reference", default="../shared/reference/peft_minilm.jsonl", help="scores to compare with")
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--page-only", action="store_true", help="write the page from the finished runs")
    options = parser.parse_args()
    todo = (
        [] if options.page_only else [(s, t, m) for s in options.seeds for t in options.tasks for m in options.methods]
    )
    for seed, task, method in todo:
        output = options.output / f"{task}-{method}-{seed}"
        if (output / "results.json").exists():
            continue
        peak = run(command(task, method, seed, options.data, output))
        (output / "peak_mb.json").write_text(json.dumps(round(peak)))
    PAGE.write_text(page(options.output, reference_scores(Path(options.reference)), options.data))
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
