"""The tables of a comparison: as text for pages and terminals, and as CSV with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.text import csv_text, printable
from lora_jax.training.metrics import better
from lora_jax.training.run.progress import format_bytes

from ..grid.paper_presets import PRESETS
from ..runs.comparison import Outcome
from ..runs.costs import BATCHES
from ..runs.quality import Quality
from ..runs.summary import Summary

_NONE = "–"


class Table(NamedTuple):
    """Rows of text under headings.

    Attributes:
        name: Name of its files.
        columns: Headings.
        rows: Cells of each row.
        notes: Notes below the table.
        text_columns: Number of columns that hold text; those after them hold numbers.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    text_columns: int = 1


def make_tables(outcome: Outcome) -> list[Table]:
    """Quality, costs, learning rates, and the comparison with the preset's paper."""
    tables = [quality_table(outcome), cost_table(outcome), rate_table(outcome)]
    preset = PRESETS.get(outcome.prepared.settings.preset or "")
    if preset is not None and preset.published is not None:
        tables.append(published_table(outcome))
    if preset is not None and preset.order:
        tables.append(order_table(outcome))
    return tables


def quality_table(outcome: Outcome) -> Table:
    prepared, quality = outcome.prepared, Quality(outcome.prepared.metric)
    splits = ("test", "dev") if prepared.split == "test" else ("dev",)
    known = {split: prepared.baseline(split) for split in splits}
    rows: list[tuple[str, ...]] = [
        (
            s.candidate.label,
            *(quality.spread(s.scores[split]) if s.scores[split] else _failed(s) for split in splits),
            str(len(s.seeds)),
            f"{s.trainable:,}",
            f"{s.percent:.3g}",
            f"{s.rate:g}" if s.rate is not None else _NONE,
        )
        for s in by_quality(outcome)
    ]
    scores = [quality.text(known[split].metrics[prepared.metric]) for split in splits]
    # The baseline goes before the first candidate that doesn't beat it.
    beaten = sum(known[splits[0]].is_beaten(prepared.metric, s.mean(splits[0])) for s in outcome.summaries)
    rows.insert(beaten, (f"always {known[splits[0]].answer}", *scores, _NONE, "0", "0", _NONE))
    columns = ("method", *(f"{split} {quality.title}" for split in splits), "seeds", "trained parameters", "% of all")
    note = "Mean ± standard deviation over seeds, each at the checkpoint with the best dev score."
    if prepared.split == "dev":
        note += (
            " There is no test split: rates and checkpoints were also chosen on dev, so these figures are optimistic."
        )
    what = "the most frequent label" if prepared.splits.task.labels else "the mean"
    baseline = f"Always {known[splits[0]].answer}: every example gets the same answer, {what} of the training data."
    return Table("quality", (*columns, "learning rate"), rows, (note, baseline))


def cost_table(outcome: Outcome) -> Table:
    summaries = [s for s in outcome.summaries if s.rate is not None]
    rows = [
        (
            s.candidate.label,
            _number(s.step_ms, ".0f"),
            _number(s.train_seconds, ".0f"),
            format_bytes(s.step_memory) if s.step_memory is not None else _NONE,
            format_bytes(s.adapter_bytes) if s.adapter_bytes is not None else _NONE,
            *(_number(s.latency_ms.get(size), ".1f") for size in BATCHES),
        )
        for s in summaries
    ]
    columns = ("method", "step, ms", "training, s", "step memory", "adapter file")
    tokens = next((s.tokens for s in summaries if s.tokens is not None), None)
    notes = (
        "Step: median time in the candidate's fastest run, without compilation. Training: that times the steps.",
        f"Step memory, as the compiler reports it at batch {outcome.prepared.config.batch_size} × {tokens} tokens: "
        "frozen base, trained parameters with their optimizer state, and activations.",
        f"Latency of the trained model at {tokens} tokens, merged if possible. Candidates are timed in turns.",
    )
    return Table("costs", (*columns, *(f"latency at batch {size}, ms" for size in BATCHES)), rows, notes)


def rate_table(outcome: Outcome) -> Table:
    quality = Quality(outcome.prepared.metric)

    def cell(s: Summary, rate: float) -> str:
        score = s.tried.get(rate)
        result = quality.text(score) if score is not None else "failed" if rate in s.tried else "not run"
        return f"{rate:g}: {result}" + (" ✓" if rate == s.rate else "")

    most = max(len(s.candidate.rates) for s in outcome.summaries)
    rows = []
    for s in outcome.summaries:
        cells = [cell(s, rate) for rate in sorted(s.candidate.rates)]
        rows.append((s.candidate.label, *cells, *[""] * (most - len(cells))))
    edge = [s.candidate.label for s in outcome.summaries if s.rate_is_at_the_edge]
    seed = outcome.prepared.settings.seeds[0]
    notes = (f"Cells: learning rate and its dev {quality.title} with seed {seed}. The best (✓) is used for all seeds.",)
    if edge:
        notes += (f"Best at the edge of the rates tried, so that one beyond may be better: {'; '.join(edge)}.",)
    names = ("learning rate", *(["higher"] * (most - 1)))
    return Table("rates", ("method", *names), rows, notes)


def published_table(outcome: Outcome) -> Table:
    prepared, quality = outcome.prepared, Quality(outcome.prepared.metric)
    preset = PRESETS[prepared.settings.preset or ""]
    assert preset.published is not None
    rows = []
    for s in outcome.summaries:
        scores, theirs = s.scores[prepared.split], preset.published.values.get(s.candidate.label)
        shown = [_NONE] * len(preset.published.columns) if theirs is None else [f"{value:.1f}" for value in theirs]
        rows.append((s.candidate.label, quality.spread(scores) if scores else _failed(s), f"{s.trainable:,}", *shown))
    columns = ("method", f"here: {prepared.split} {quality.title}", "trained here")
    notes = (
        f"Paper: {preset.published.source}; {preset.published.setting}. The models and data differ from those here, so "
        "only the order can be compared.",
    )
    return Table("paper", (*columns, *(f"paper: {name}" for name in preset.published.columns)), rows, notes)


def order_table(outcome: Outcome) -> Table:
    prepared, quality = outcome.prepared, Quality(outcome.prepared.metric)
    preset = PRESETS[prepared.settings.preset or ""]
    by_label = {s.candidate.label: s for s in outcome.summaries}
    rows = []
    for upper, lower in preset.order:
        pair = [by_label[label].mean(prepared.split) if label in by_label else None for label in (upper, lower)]
        if pair[0] is None or pair[1] is None:
            rows.append((f"{upper} > {lower}", _NONE, "not run"))
            continue
        difference = better(prepared.metric, pair[0]) - better(prepared.metric, pair[1])
        rows.append((f"{upper} > {lower}", quality.difference(difference), "yes" if difference > 0 else "no"))
    notes = (f"The order is taken from {preset.order_source}, on other data.",)
    return Table("order", ("order in the paper", f"difference here ({prepared.split})", "holds here"), rows, notes)


def by_quality(outcome: Outcome) -> list[Summary]:
    """Summaries with the best first; those without a score come last."""
    metric, split = outcome.prepared.metric, outcome.prepared.split

    def key(summary: Summary) -> tuple[bool, float]:
        mean = summary.mean(split)
        return (mean is None, 0.0 if mean is None else -better(metric, mean))

    return sorted(outcome.summaries, key=key)


def summary_csv(outcome: Outcome) -> str:
    """One line per candidate with unrounded numbers, for a spreadsheet."""
    splits = sorted({"dev", outcome.prepared.split})
    columns = ["method", "learning_rate", "seeds", "trainable", "percent"]
    columns += [f"{split}_{what}" for split in splits for what in ("mean", "deviation")]
    columns += ["steps", "step_ms", "train_seconds", "step_memory_bytes", "adapter_bytes"]
    columns += [f"latency_ms_batch_{size}" for size in BATCHES]
    columns += [f"{split}_baseline" for split in splits]
    known = [outcome.prepared.baseline(split).metrics[outcome.prepared.metric] for split in splits]
    lines = [
        [s.candidate.label, s.rate, len(s.seeds), s.trainable, s.percent]
        + [value for split in splits for value in (s.mean(split), s.deviation(split))]
        + [s.steps, s.step_ms, s.train_seconds, s.step_memory, s.adapter_bytes]
        + [s.latency_ms.get(size) for size in BATCHES]
        + known
        for s in outcome.summaries
    ]
    return csv_text(columns, lines)


def runs_csv(outcome: Outcome) -> str:
    """One line per run, including failed ones."""
    metric = outcome.prepared.metric
    splits = sorted({"dev", outcome.prepared.split})
    columns = ["id", "method", "learning_rate", "seed", *(f"{split}_{metric}" for split in splits)]
    columns += ["chosen_step", "steps", "step_ms", "seconds", "error"]
    by_id = {candidate.id: candidate for candidate in outcome.prepared.candidates}
    lines = []
    for row in outcome.rows.values():
        if (candidate := by_id.get(row["candidate_id"])) is not None:
            scores = [(row["metrics"] or {}).get(split, {}).get(metric) for split in splits]
            about = [row[name] for name in ("chosen_step", "steps", "step_ms", "seconds", "error")]
            lines.append([row["id"], candidate.label, row["rate"], row["seed"], *scores, *about])
    return csv_text(columns, lines)


def markdown(table: Table) -> str:
    """The table in Markdown, with its notes."""
    align = ["---" if place < table.text_columns else "---:" for place in range(len(table.columns))]
    lines = [_markdown_row(table.columns), _markdown_row(align, escape=False), *map(_markdown_row, table.rows)]
    return "\n".join([*lines, *(f"\n{plain(note)}" for note in table.notes)]) + "\n"


def _markdown_row(cells: Sequence[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(plain(cell) if escape else cell for cell in cells) + " |"


def plain(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    text = printable(" ".join(text.split()))
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text


def _number(value: float | None, spec: str) -> str:
    return _NONE if value is None else format(value, spec)


def _failed(summary: Summary) -> str:
    return "failed" if summary.errors else "not run"
