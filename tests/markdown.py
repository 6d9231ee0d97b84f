"""Runs the Python in a Markdown file, as a reader would: block after block, in one session a section."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).parent.parent

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        section: the last heading of the second level before it.
        language: what follows the opening fence.
        code: its lines.
        line: number of its first line in the file.
        output: of a Python block, the text block that follows at once: what it must print.
    """

    section: str
    language: str
    code: str
    line: int
    output: str | None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    result = []
    for match, following in zip(found, [*found[1:], None], strict=True):
        # A heading within code is a comment.
        before = _FENCE.sub("", text[: match.start()])
        headings = re.findall(r"^## (.+)$", before, re.MULTILINE)
        output = None
        if following is not None and following[1] == "text" and not text[match.end() : following.start()].strip():
            output = following[2]
        line = text.count("\n", 0, match.start(2)) + 1
        result.append(Block(headings[-1] if headings else "", match[1], match[2], line, output))
    return result


def sections(path: Path) -> dict[str, list[Block]]:
    """The Python blocks by section; sections without any are left out."""
    by_section: dict[str, list[Block]] = {}
    for block in blocks(path):
        if block.language == "python":
            by_section.setdefault(block.section, []).append(block)
    return by_section


def run(path: Path, python_blocks: list[Block]) -> None:
    """Runs the blocks in one namespace; what they print must be what the file says they print."""
    jax.clear_caches()  # a document may count what is compiled, as a reader's new process does
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks:
        printed = io.StringIO()
        # Blank lines in front, so that a traceback shows the lines of the file.
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec", dont_inherit=True)
        # As a reader runs it, who has not asked for strict promotion.
        lenient = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with contextlib.redirect_stdout(printed), lenient[0], lenient[1]:
            exec(code, namespace)
        if block.output is not None:
            found = printed.getvalue()
            assert found == block.output, (
                f"the code at {path}:{block.line} prints\n{found}and should print\n{block.output}"
            )
