"""The English of docstrings and names, as far as a program can tell: see CONTRIBUTING.md for the template."""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parent
TESTS = Path(__file__).parent

# Files of one name that have the same role in parallel rooms.
PARALLEL_FILES = {"__init__.py"}


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """The public functions and classes of a file, with their docstrings."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""


def argument_texts(docstring: str) -> Iterator[str]:
    """The texts below `Args:`, `Attributes:` and `Raises:`, each on one line."""
    for section in re.findall(r"^(?:Args|Attributes|Raises):\n((?:    .*\n?|\n)+)", docstring, re.M):
        for entry in re.findall(r"^    [\w*, ]+: (.*(?:\n(?:        .*|)(?=\n|$))*)", section, re.M):
            yield " ".join(entry.split())


def ill_written(text: str) -> bool:
    """Whether a text doesn't begin with a capital, code, a number or a dtype, or doesn't end like a sentence."""
    begins = re.match(r"(\(When used\.\) )?([A-Z`0-9]|(bool|u?int\d+|float\d+)\b)", text)
    return begins is None or not text.endswith((".", ":", "`", ")", "…"))


def test_argument_texts_begin_with_a_capital_and_end_with_a_full_stop() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {name}: {text}"
        for file in sorted(ROOT.rglob("*.py"))
        for name, docstring in docstrings(file)
        for text in argument_texts(docstring)
        if ill_written(text)
    ]
    assert wrong == []


def test_the_check_sees_a_torn_off_phrase() -> None:
    texts = list(
        argument_texts("Does it.\n\nArgs:\n    rate: of the head,\n        which is new.\n    key: Random key.\n")
    )
    assert texts == ["of the head, which is new.", "Random key."]
    assert [ill_written(text) for text in texts] == [True, False]


def test_no_genitive_in_the_names_of_tests() -> None:
    names = [
        f"{file.relative_to(TESTS)}: {name}"
        for file in sorted(TESTS.rglob("test_*.py"))
        for name in re.findall(r"^def (test_\w*_s_\w*)", file.read_text("utf-8"), re.M)
    ]
    assert names == []


@pytest.mark.parametrize("room", ["models/checkpoint", "models/nn", "models/families"])
def test_no_two_files_of_one_name(room: str) -> None:
    """A file's name finds one file: compared with the whole library."""
    count = collections.Counter(file.name for file in ROOT.rglob("*.py"))
    twice = [file.name for file in sorted((ROOT / room).glob("*.py")) if count[file.name] > 1]
    assert [name for name in twice if name not in PARALLEL_FILES] == []
