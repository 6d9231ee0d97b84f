"""Tables in a terminal; in a pipe the same, uncoloured and as wide as they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one a line."""
    width = max(map(len, facts), default=0)
    console = _console()
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, text_columns: int = 1
) -> None:
    """Rows under headings; all but the first `text_columns` columns are numbers, to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
