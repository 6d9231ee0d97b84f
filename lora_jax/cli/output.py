"""Tables in a terminal; in a pipe the same, uncoloured and as wide as they need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from lora_jax.terminal import literal

if TYPE_CHECKING:
    from lora_jax.tools.inspect import Group
    from lora_jax.training.baseline import Baseline


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one a line."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print_line(f"{name:<{width}}  {value}")


def print_line(text: str) -> None:
    """A sentence, on one line however long it is."""
    _console().print(literal(text), soft_wrap=True)


def score_facts(
    name: str, metrics: Mapping[str, float | None], baseline: Baseline | None, *, metric: str | None = None
) -> dict[str, str]:
    """Metrics, what one answer to all scores below them, and that they are no better where that is so.

    Args:
        name: Of the metrics.
        metrics: Of a model.
        baseline: On the same rows.
        metric: That counts; the task's first if `None`.
    """
    from lora_jax.training.run.progress import format_metrics, verdict

    facts = {name: format_metrics(dict(metrics))}
    if baseline is not None:
        metric = metric or next(iter(metrics))
        if metrics[metric] is None:  # on rows of one target, as `choose_metric` has it
            metric = "loss"
        facts[f"{name} baseline"] = f"{format_metrics(baseline.metrics)}  (always {baseline.answer})"
        if (said := verdict(baseline, metric, metrics[metric])) is not None:
            facts[f"{name} warning"] = said
    return facts


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, text_columns: int = 1
) -> None:
    """Rows under headings; all but the first `text_columns` columns are numbers, to the right."""
    heading = None if title is None else literal(title)
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(literal(column), justify="left" if place < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(literal, row))
    _console().print(table)


def print_groups(groups: Iterable[Group]) -> None:
    """Trained leaves, alike ones in a row."""
    from lora_jax.training.run.progress import format_bytes

    rows = [
        (g.pattern, g.label, str(g.leaves), format_shape(g.shape), f"{g.params:,}", format_bytes(g.bytes))
        for g in groups
    ]
    print_table(("trained leaves", "label", "leaves", "shape", "parameters", "size"), rows, text_columns=2)


def format_shape(shape: tuple[int, ...] | None) -> str:
    return "various" if shape is None else "×".join(map(str, shape))


def print_json(report: Any) -> None:
    """A report as one JSON object on one line."""
    print(json.dumps(_plain(report)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if as_dict := getattr(value, "_asdict", None):  # a named tuple
        value = as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
