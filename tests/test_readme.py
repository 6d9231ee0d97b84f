"""What the README tells the reader to type works, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex

import pytest

from . import markdown

README = markdown.ROOT / "README.md"
DOCUMENTS = sorted([*markdown.ROOT.glob("*.md"), *markdown.ROOT.glob("docs/*.md")])


def _commands() -> list[str]:
    lines = [line for block in markdown.blocks(README) if block.language == "bash" for line in block.code.splitlines()]
    return [line.partition("#")[0].strip() for line in lines]


@pytest.mark.parametrize("section", markdown.sections(README))
def test_python_runs(section: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    markdown.run(README, markdown.sections(README)[section])


@pytest.mark.parametrize("command", [command for command in _commands() if "lora-jax" in command])
def test_command_is_understood(command: str):
    from lora_jax.cli.main import make_parser

    words = shlex.split(command)
    make_parser().parse_args(words[words.index("lora-jax") + 1 :])


@pytest.mark.parametrize("command", [command for command in _commands() if command.startswith("scripts/")])
def test_script_is_executable(command: str):
    assert os.access(markdown.ROOT / command, os.X_OK)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (document.parent / file).resolve() if file else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in _anchors(linked.read_text(encoding="utf-8")), f"{document.name} links to {target}"


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
