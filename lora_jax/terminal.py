"""The one way by which lines and cells reach a terminal: as they are, neither markup nor control characters."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from lora_jax.text import printable


def literal(text: object, **options: Any) -> Text:
    """A text as rich shows it letter by letter; `[red]`, `:smile:` and escape sequences are read, not obeyed.

    Args:
        text: from wherever it is.
        **options: of rich's `Text`.
    """
    return Text(printable(text), **options)
