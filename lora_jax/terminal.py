"""The one way in which lines and cells reach a terminal: letter by letter, without markup and control characters."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from lora_jax.text import printable


def literal(text: object, **options: Any) -> Text:
    """A text as rich shows it letter by letter; `[red]`, `:smile:` and escape sequences are read, not obeyed.

    Args:
        text: Text from anywhere.
        **options: Options of rich's `Text`.
    """
    return Text(printable(text), **options)
