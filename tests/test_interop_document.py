"""The code of `docs/interop.md` runs as it stands, and prints what it says it prints."""

from __future__ import annotations

import pytest

from . import markdown

DOCUMENT = markdown.ROOT / "docs" / "interop.md"


@pytest.mark.parametrize("section", markdown.sections(DOCUMENT))
def test_it_runs(section: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    markdown.run(DOCUMENT, markdown.sections(DOCUMENT)[section])
