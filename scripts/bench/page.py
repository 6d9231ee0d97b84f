"""Writes `docs/benchmarks.md` from the JSON that the benchmarks left: every target beside its figure, then all rows.

scripts/bench/page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from report import RESULTS, ROOT, shown

PAGE = ROOT / "docs" / "benchmarks.md"
ORDER = (
    "step",
    "family",
    "rivals",
    "end_to_end",
    "inference",
    "memory",
    "merge",
    "trace",
    "matmul",
    "shared_input",
    "gpu",
)
MINILM, LAYERS = "MiniLM with embeddings, 32 × 64 tokens", "MiniLM's encoder layers alone, 32 × 64 tokens"
BASE = "BERT-base's shape, 4 of its 12 layers, 32 × 64 tokens"
ALL, QV = "LoRA all linear, r=8", "LoRA q, v, r=8"

INTRODUCTION = """\
# Benchmarks

Every figure here comes from a script in `scripts/bench`; `scripts/bench/run` runs them all and writes this page from
what they leave in `docs/benchmarks`.
Candidates of a comparison take turns in one run, each once a round; a ratio is the median of the rounds' ratios, with
the quartiles in brackets. A section has the date and the commit of its own run, with `-dirty` where files had changed
since. What was found while making things fast, and what did not help, is in [performance.md](performance.md)."""


class Target(NamedTuple):
    """A promise and where its figure is: `figure` takes the benchmark's content."""

    what: str
    bound: str
    benchmark: str
    figure: Callable[[dict[str, Any]], Any]
    met: Callable[[float], bool]


def cell(rows: Iterable[dict[str, Any]], column: str, **where: Any) -> Any:
    """The value of a column in the one row that fits; `None` without one."""
    fitting = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
    return fitting[0].get(column) if fitting else None


def step(column: str, workload: str, method: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: cell(content["rows"], column, workload=workload, method=method)


def at_most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


def at_least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


TARGETS = [
    *(
        Target(f"LoRA q, v / frozen chain, {name}", "≤ 1.05", "step", step("/ frozen chain", work, QV), at_most(1.05))
        for name, work in (("MiniLM", MINILM), ("BERT-base's shape", BASE))
    ),
    *(
        Target(
            f"LoRA all linear / frozen chain, {name}",
            "≤ 1.12",
            "step",
            step("/ frozen chain", work, ALL),
            at_most(1.12),
        )
        for name, work in (("MiniLM", MINILM), ("BERT-base's shape", BASE))
    ),
    Target("LoRA q, v / full, MiniLM with embeddings", "≤ 0.60", "step", step("/ full", MINILM, QV), at_most(0.60)),
    Target(
        "LoRA all linear / full, MiniLM with embeddings", "≤ 0.68", "step", step("/ full", MINILM, ALL), at_most(0.68)
    ),
    Target(
        "LoRA all linear / full, encoder layers alone", "≤ 0.74", "step", step("/ full", LAYERS, ALL), at_most(0.74)
    ),
    Target("BitFit / full, encoder layers alone", "≤ 0.67", "step", step("/ full", LAYERS, "BitFit"), at_most(0.67)),
    Target(
        "lora_jax / PEFT on PyTorch, eager",
        "≤ 0.70",
        "rivals",
        lambda content: cell(content["rows"], "lora_jax / this", candidate="PEFT, PyTorch eager"),
        at_most(0.70),
    ),
    Target(
        "lora_jax / qwix, same Linen model",
        "≤ 0.62",
        "rivals",
        lambda content: cell(
            content["rows"], "lora_jax on the Linen model / this", candidate="qwix on the Linen model"
        ),
        at_most(0.62),
    ),
    Target(
        "second epoch / PEFT loop, SST-2 sentences",
        "≤ 0.55",
        "end_to_end",
        lambda content: cell(content["rows"], "second / PEFT", data="SST-2 sentences", loop="lora_jax"),
        at_most(0.55),
    ),
    *(
        Target(
            f"temporary memory / full, {method}, {name}",
            f"≤ {bound:.2f}",
            "step",
            step("of full", work, method),
            at_most(bound),
        )
        for name, work in (("MiniLM with embeddings", MINILM), ("encoder layers alone", LAYERS))
        for method, bound in ((QV, 0.80), (ALL, 1.00))
    ),
    Target(
        "optimizer bytes / trainable bytes, every row",
        "= 2",
        "step",
        lambda content: max(row["optimizer bytes"] / row["gradient bytes"] for row in content["rows"]),
        lambda value: value == 2,
    ),
    Target(
        "`merge_params` / plain copy, GB/s, 8 layers of d = 2048, float32",
        "≥ 0.5",
        "merge",
        lambda content: cell(content["rows"], "merge / copy, GB/s", tree="8 layers, d = 2048, float32"),
        at_least(0.5),
    ),
    Target(
        "`merge_params`, beyond inputs and outputs / largest weight",
        "≤ 1",
        "merge",
        lambda content: max(
            (
                row["beyond inputs and outputs, MB"] / row["largest weight, MB"]
                for row in content["rows"]
                if row["MB"] > 500
            ),
            default=None,
        ),
        at_most(1),
    ),
    *(
        Target(
            f"gradient trace + compile / {of}, 80 layers {kind}",
            f"≤ {bound}",
            "trace",
            lambda content, kind=kind, column=column: cell(content["rows"], column, layers=f"80 {kind}"),
            at_most(bound),
        )
        for kind, bound in (("unrolled", 1.6), ("scanned", 1.2))
        for of, column in (("base's", "adapted / base"), ("base's by its biases alone", "adapted / biases"))
    ),
    *(
        Target(
            f"`{statement}` / `import jax, optax`",
            "≤ 1.15",
            "trace",
            lambda content, column=column: content["imports"][column],
            at_most(1.15),
        )
        for statement, column in (("import lora_jax", "ratio"), ("import jax, optax, lora_jax", "ratio, all three"))
    ),
]


def targets(contents: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["## Targets", "", "| what | target | measured | met |", "|---|---|---|---|"]
    for target in TARGETS:
        content = contents.get(target.benchmark)
        value = None if content is None else target.figure(content)
        if value is None:
            lines.append(f"| {target.what} | {target.bound} | not run | |")
            continue
        number = value[0] if isinstance(value, list) else value
        text = shown(value) if isinstance(value, list) else f"{value:.2f}"
        lines.append(f"| {target.what} | {target.bound} | {text} | {'yes' if target.met(number) else '**no**'} |")
    return [*lines, "", "No row is for TPUs: nothing here has run on one."]


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def section(content: dict[str, Any]) -> list[str]:
    first, _, rest = content["about"].partition("\n\n")
    lines = [f"## {content['name']}: {' '.join(first.split()).rstrip('.')}", ""]
    lines += [rest.strip(), ""] if rest else []
    lines += [f"`scripts/bench/{content['name']}.py`, {about(content)}.", ""]
    rows = content["rows"]
    groups = list(dict.fromkeys(row["workload"] for row in rows)) if rows and "workload" in rows[0] else [None]
    for group in groups:
        if group is not None:
            lines += [f"**{group}**", ""]
        lines += table(
            [{k: v for k, v in row.items() if k != "workload"} for row in rows if row.get("workload") == group]
        )
        lines += [""]
    lines += [f"{name} did not run: {reason}." for name, reason in content.get("failures", {}).items()]
    return lines


def about(content: dict[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if name != "lora_jax")
    place = machine["device"] if machine["device"] != "cpu" else f"{machine['cores']} cores of {machine['processor']}"
    recovered = f"; {content['recovered']}" if "recovered" in content else ""
    return f"{content['date']}, commit {content['commit']}, {place}, Python {content['python']}, {versions}{recovered}"


def page(contents: dict[str, dict[str, Any]]) -> str:
    lines = [INTRODUCTION, "", *targets(contents), ""]
    for name in ORDER:
        if name in contents:
            lines += section(contents[name])
    return "\n".join(lines).rstrip() + "\n"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What each benchmark left there, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON (default: docs/benchmarks)")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: docs/benchmarks.md)")
    options = parser.parse_args()
    options.page.write_text(page(read(options.results)))
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
