"""Builds HTML. Every text is escaped unless it is `Html` already, and its control characters are spelled out."""

from __future__ import annotations

import html

from lora_jax.text import printable


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Content = str | None

_VOID = ("meta", "img", "br")


def tag(name: str, /, *children: Content, **attributes: str) -> Html:
    """An element. A trailing `_` of an attribute's name is dropped, as in `class_`.

    Example:
        >>> tag("p", "1 < 2 ", tag("b", "yes"), class_='a"b')
        '<p class="a&quot;b">1 &lt; 2 <b>yes</b></p>'
    """
    written = "".join(f' {key.rstrip("_")}="{_shown(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def _shown(text: str) -> str:
    return html.escape(printable(text, lines=True))


def join(*children: Content) -> Html:
    """Concatenates texts and elements; `None` is skipped."""
    return Html("".join(child if isinstance(child, Html) else _shown(child) for child in children if child is not None))
