"""Writes the report of a comparison: `report.html`, `report.md`, tables as CSV, figures as SVG and PNG."""

from __future__ import annotations

import base64
import importlib.metadata
import shlex
from pathlib import Path

from lora_jax import files
from lora_jax.text import printable

from ..grid.paper_presets import PRESETS
from ..grid.splits import data_warnings
from ..runs.comparison import Outcome
from ..runs.quality import Quality
from ..runs.recommend import RULE
from .charts import Chart, make_charts, save
from .markup import Html, join, tag
from .tables import Table, make_tables, markdown, plain, runs_csv, summary_csv

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.answer { border-left: .3rem solid #0072b2; background: #f0f6fa; padding: .6rem .9rem; margin: 1rem 0; }
.warning { border-left: .3rem solid #d55e00; background: #fdf3ec; padding: .6rem .9rem; margin: 1rem 0; }
.note { color: #555; font-size: .875rem; margin: .35rem 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; min-width: 4rem; }
tbody th { border-bottom: 1px solid #ddd; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: .6rem; white-space: nowrap; }
th.number { white-space: normal; }
tr.chosen td { background: #f0f6fa; font-weight: 600; }
figure { margin: .5rem 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { color: #555; font-size: .875rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem; font-size: .8125rem; }
"""
# The charts above and below each table.
_FIGURES = {"quality": (("axis", "quality"), ("parameters", "time")), "rates": ((), ("rates",))}
_HEADINGS = {
    "quality": "Quality",
    "costs": "Costs",
    "rates": "Learning rates",
    "paper": "Comparison with the paper",
    "order": "Order of the methods in the paper",
}


def write_report(outcome: Outcome, *, command: list[str] | None = None) -> Path:
    """Writes the report into the comparison's folder, replacing an earlier one.

    Args:
        outcome: Result of `compare`.
        command: Command line that made it, shown so that it can be repeated.

    Returns:
        The path of `report.html`, a single file without scripts or external resources.
    """
    folder = outcome.prepared.folder
    tables, charts = make_tables(outcome), make_charts(outcome)
    for name in ("tables", "figures"):
        (folder / name).mkdir(exist_ok=True)
    for table in tables:
        files.write_text(folder / "tables" / f"{table.name}.md", markdown(table))
    files.write_text(folder / "tables" / "summary.csv", summary_csv(outcome))
    files.write_text(folder / "tables" / "runs.csv", runs_csv(outcome))
    for chart in charts:
        save(chart, folder / "figures")
    files.write_text(folder / "report.md", _markdown_page(outcome, tables, charts, command))
    path = folder / "report.html"
    files.write_text(path, _page(outcome, tables, charts, command))
    return path


def title_of(outcome: Outcome) -> str:
    preset = PRESETS.get(outcome.prepared.settings.preset or "")
    return preset.title if preset is not None else "Which method for this task?"


def answer(outcome: Outcome) -> tuple[str, str]:
    """The recommended method and the reason."""
    found = outcome.recommendation
    if found is None:
        return "No recommendation", "no run has succeeded; the errors are below."
    if found.is_withheld:
        return "No recommendation", found.reason
    return found.summary.candidate.label, found.reason


def _headline(outcome: Outcome) -> str:
    choice, found = answer(outcome)[0], outcome.recommendation
    return choice if found is None or found.is_withheld else f"Recommended: {choice}"


def remarks(outcome: Outcome) -> list[str]:
    """Warnings that a reader needs before the figures."""
    settings, found = outcome.prepared.settings, []
    if settings.is_demonstration:
        found.append(
            "This is a demonstration on the messages bundled with lora_jax; so few examples say little about quality."
        )
    if outcome.left:
        found.append(f"{outcome.left} runs of the grid remain. Run the same command to resume.")
    found += [f"{note[0].upper()}{note[1:]}" for note in data_warnings(outcome.prepared.splits)]
    if failed := [s.candidate.label for s in outcome.summaries if s.rate is None and s.errors]:
        found.append(f"Every run failed for: {'; '.join(failed)}.")
    return found


def facts(outcome: Outcome) -> dict[str, str]:
    """Data, base model, settings and machine."""
    prepared = outcome.prepared
    config, splits = prepared.config, prepared.splits
    rows = ", ".join(f"{split} {len(examples):,} examples" for split, examples in splits.examples.items())
    drawn = []
    if splits.held_out is not None:
        drawn.append(
            f"dev is {splits.held_out:.0%} of the training examples, held out with seed {prepared.settings.data_seed}"
        )
    if prepared.settings.train_rows is not None:
        drawn.append(f"training examples drawn with seed {prepared.settings.data_seed}")
    labels = splits.task.labels
    shown = ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")
    row = next(iter(outcome.rows.values()), None)
    found = {
        "data": "; ".join(
            [config.train if not prepared.settings.is_demonstration else "bundled messages", rows, *drawn]
        ),
        "task": f"{len(labels)} labels: {shown}" if labels else "a number",
        "base": config.base,
        "training": f"{config.steps:,} steps with batch size {config.batch_size}, {config.schedule} schedule, "
        f"checkpoint with the best dev {Quality(prepared.metric).name}",
        "seeds": ", ".join(map(str, prepared.settings.seeds)),
    }
    if row is not None:
        device = row["device"]
        cores = f", {device['cores']} cores" if device["platform"] == "cpu" else ""
        versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("lora_jax", "jax", "python"))
        found["machine"] = f"{device['kind']}{cores}; {versions}"
    return found


def _page(outcome: Outcome, tables: list[Table], charts: list[Chart], command: list[str] | None) -> str:
    title, (choice, reason) = title_of(outcome), answer(outcome)
    preset = PRESETS.get(outcome.prepared.settings.preset or "")
    by_name = {chart.name: chart for chart in charts}
    sections: list[Html] = []
    for table in tables:
        above, below = [
            [_figure(by_name[name], outcome.prepared.folder) for name in names if name in by_name]
            for names in _FIGURES.get(table.name, ((), ()))
        ]
        sections.append(tag("section", tag("h2", _HEADINGS[table.name]), *above, _table(table, choice), *below))
    body = join(
        tag("h1", title),
        None if preset is None else tag("p", preset.question),
        *(tag("p", remark, class_="warning") for remark in remarks(outcome)),
        tag("div", tag("strong", f"{_headline(outcome)}. "), f"{reason[0].upper()}{reason[1:]}", class_="answer"),
        tag("p", RULE, class_="note"),
        *sections,
        _errors(outcome),
        tag("h2", "What was compared"),
        _facts_table(facts(outcome)),
        None if command is None else join(tag("h2", "Command"), tag("pre", shlex.join(command))),
        tag(
            "p",
            "results.jsonl has one row per run with everything needed to repeat it; tables/ and figures/ hold the "
            "tables and figures.",
            class_="note",
        ),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"lora_jax {importlib.metadata.version('lora_jax')}"),
        tag("title", title),
        tag("style", Html(_STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n"


def _figure(chart: Chart, folder: Path) -> Html:
    # As an image, not inline: the ids of two figures can't clash, and no script inside one would run.
    data = base64.b64encode((folder / "figures" / f"{chart.name}.svg").read_bytes()).decode()
    picture = tag("img", src=f"data:image/svg+xml;base64,{data}", alt=f"{chart.title}. {chart.description}")
    return tag("figure", tag("figcaption", tag("strong", f"{chart.title}. "), chart.description), picture)


def _table(table: Table, chosen: str) -> Html:
    def cells(kind: str, row: tuple[str, ...]) -> list[Html]:
        return [
            tag(kind, cell) if place < table.text_columns else tag(kind, cell, class_="number")
            for place, cell in enumerate(row)
        ]

    rows = [
        tag("tr", *cells("td", row), class_="chosen") if row[0] == chosen else tag("tr", *cells("td", row))
        for row in table.rows
    ]
    content = tag("table", tag("thead", tag("tr", *cells("th", table.columns))), tag("tbody", *rows))
    return join(tag("div", content, class_="table"), *(tag("p", note, class_="note") for note in table.notes))


def _facts_table(found: dict[str, str]) -> Html:
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in found.items()]
    return tag("div", tag("table", tag("tbody", *rows)), class_="table")


def _errors(outcome: Outcome) -> Html | None:
    rows = _failures(outcome)
    if not rows:
        return None
    table = Table("errors", ("method", "learning rate", "seed", "error"), rows, text_columns=4)
    return join(tag("h2", "Runs that failed"), _table(table, ""))


def _failures(outcome: Outcome) -> list[tuple[str, ...]]:
    return [
        (s.candidate.label, f"{rate:g}", str(seed), error) for s in outcome.summaries for rate, seed, error in s.errors
    ]


def _markdown_page(outcome: Outcome, tables: list[Table], charts: list[Chart], command: list[str] | None) -> str:
    reason = answer(outcome)[1]
    parts: list[str] = [
        f"# {title_of(outcome)}",
        *map(plain, remarks(outcome)),
        f"**{plain(_headline(outcome))}.** {plain(reason[0].upper() + reason[1:])}",
    ]
    for table in tables:
        parts += [f"## {_HEADINGS[table.name]}", markdown(table).rstrip()]
        names = sum(_FIGURES.get(table.name, ()), ())
        parts += [f"![{chart.title}](figures/{chart.name}.svg)" for chart in charts if chart.name in names]
    if rows := _failures(outcome):
        errors = Table("errors", ("method", "learning rate", "seed", "error"), rows, text_columns=4)
        parts += ["## Runs that failed", markdown(errors).rstrip()]
    compared = Table("facts", ("property", "value"), list(facts(outcome).items()), text_columns=2)
    parts += ["## What was compared", markdown(compared).rstrip()]
    if command is not None:
        parts.append(f"```bash\n{printable(shlex.join(command))}\n```")
    return "\n\n".join(parts) + "\n"
