"""Imports run downward only, as the table of rooms in `docs/design.md` says."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import lora_jax

ROOT = Path(lora_jax.__file__).parent
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
# Faces of the library: what they name lies above them, and is imported when it is asked for.
FACES = {"lora_jax", "lora_jax.training"}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name; a package is its `__init__.py`."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("lora_jax", *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom, bool]]:
    """Modules of the library that a module imports, with the statement and whether a function hides it."""
    file = modules()[module]
    tree = ast.parse(file.read_text("utf-8"))
    hidden = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else []
            source = ".".join([*above, *([statement.module] if statement.module else [])])
            names = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules() else source
                for alias in statement.names
            ]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "lora_jax":
                yield name, statement, id(statement) in hidden


@functools.cache
def rows() -> list[list[str]]:
    """The table's first column, top to bottom: `cli/` for a folder, `paths.py` for a file."""
    section = DESIGN.read_text("utf-8").split("## The rooms")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [re.findall(r"`([^`]+)`", cell) for cell in cells]


def row_of(module: str) -> int:
    """The number of a module's row: that of the longest entry that it lies in."""
    path = modules()[module].relative_to(ROOT).as_posix()
    fitting = [
        (len(entry), number)
        for number, entries in enumerate(rows())
        for entry in entries
        if path == entry or (entry.endswith("/") and path.startswith(entry))
    ]
    assert fitting, f"{path} has no row in the table of {DESIGN.name}"
    return max(fitting)[1]


def nested(module: str, name: str) -> bool:
    """Whether two files lie in one room, the one beside a room and the other in it: `test_no_circle` looks at those."""
    first, second = (modules()[each].parent for each in (module, name))
    return first != ROOT != second and (first.is_relative_to(second) or second.is_relative_to(first))


def test_the_table_is_that_of_the_files() -> None:
    entries = [entry for row in rows() for entry in row]
    assert len(set(entries)) == len(entries)
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    for module in modules():
        row_of(module)


def test_every_file_that_the_page_names_exists() -> None:
    files = [
        file.as_posix()
        for folder in (ROOT, *map(DESIGN.parents[1].joinpath, ("tests", "scripts")))
        for file in folder.rglob("*.py")
    ]
    named = set(re.findall(r"`([\w/]+\.py)`", DESIGN.read_text("utf-8")))
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)] == []


def test_imports_run_downward() -> None:
    climbing = [
        f"{module} imports {name}, which lies above it ({modules()[module].name}:{statement.lineno})"
        for module in modules()
        for name, statement, _ in imports(module)
        if module not in FACES and row_of(name) < row_of(module) and not nested(module, name)
    ]
    assert climbing == []


def test_no_circle() -> None:
    graph = {module: {name for name, *_ in imports(module)} - {module} for module in modules() if module not in FACES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_import_hides_in_a_function() -> None:
    """The commands alone import what they need when they run: `lora-jax --help` needs no extra."""
    hidden = [
        f"{module}:{statement.lineno} imports {name}"
        for module in modules()
        if not module.startswith("lora_jax.cli.")
        for name, statement, inside in imports(module)
        if inside
    ]
    assert hidden == []
