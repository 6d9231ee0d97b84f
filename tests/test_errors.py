"""What the library raises on purpose is a `LoraJaxError`: a caller tells it from a defect by its class."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import lora_jax
from lora_jax.errors import LoraJaxError

ROOT = Path(lora_jax.__file__).parent
# Exceptions that are no `LoraJaxError`, with the reason.
ALLOWED = {
    "AttributeError": "what Python expects of a module's `__getattr__`",
    "NotImplementedError": "of an abstract method",
    "Unfactorable": "control flow of the transform, which merges the weight then",
    "RepeatedNameError": "control flow of the JSON parser, which tells the file",
    "_NotFoundError": "control flow of the search for a base, which tells all places that were tried",
    "TooLongError": "in a process of its own, which answers with its text",
    "jinja2.TemplateError": "what a template expects of its `raise_exception`",
}
# Plain `ValueError`s by file, with the reason.
ALONE = {
    ("ValueError", "models/checkpoint/tokenizer_trial.py"): "in a process of its own, which answers with its text",
    ("ValueError", "cli/method_flags.py"): "what argparse expects of a `type`; it tells the flag and the value",
}


def raised() -> Iterator[tuple[str, str, int]]:
    """The name of what each `raise` raises, with its file and line; a function that makes an error is left out."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                yield ast.unparse(error), file.relative_to(ROOT).as_posix(), node.lineno


def classes() -> dict[str, list[str]]:
    """The names of the bases of each class in the library, by its name."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return found


def test_what_is_raised_on_purpose_is_one_of_ours() -> None:
    bases = classes()

    def is_ours(name: str) -> bool:
        return name == LoraJaxError.__name__ or any(map(is_ours, bases.get(name, ())))

    def is_class(name: str) -> bool:
        return name in bases or isinstance(getattr(builtins, name, None), type) or "." in name

    others = [
        f"{file}:{line} raises {name}"
        for name, file, line in raised()
        if (name, file) not in ALONE
        and name not in ALLOWED
        and not name.startswith("self.")
        and is_class(name)
        and not is_ours(name.rpartition(".")[2])
    ]
    assert others == []


def test_each_exception_to_the_rule_is_needed() -> None:
    names = {name for name, *_ in raised()}
    assert set(ALLOWED) <= names
    assert {(name, file) for name, file, _ in raised()} >= set(ALONE)


def test_a_callers_except_goes_on_working() -> None:
    assert issubclass(LoraJaxError, ValueError)
