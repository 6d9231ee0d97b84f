"""Every recipe of `docs/recipes.md` runs as it stands, and prints what it says it prints."""

from __future__ import annotations

import pytest

from . import markdown

RECIPES = markdown.ROOT / "docs" / "recipes.md"


@pytest.mark.parametrize("section", markdown.sections(RECIPES))
def test_recipe_runs(section: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    markdown.run(RECIPES, markdown.sections(RECIPES)[section])
