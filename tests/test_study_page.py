"""`docs/study.md` says what is kept in `docs/study`."""

from __future__ import annotations

import importlib.util
import json

import pytest

from . import markdown

_SPEC = importlib.util.spec_from_file_location("study_script", markdown.ROOT / "scripts" / "study.py")
assert _SPEC is not None
assert _SPEC.loader is not None
study = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(study)


def test_page_is_what_the_kept_results_make_of_its_template():
    assert study.PAGE.read_text(encoding="utf-8") == study.page("../shared/data")


def test_page_shows_figures_that_are_there():
    text = study.PAGE.read_text(encoding="utf-8")
    shown = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert shown
    assert not [name for name in shown if not (study.PAGE.parent / name).is_file()]


@pytest.mark.parametrize("path", sorted(study.KEPT.glob("*/results.jsonl")), ids=lambda path: path.parent.name)
def test_kept_rows_name_no_folder_of_a_machine(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        config = json.loads(line)["config"]
        assert not [config[name] for name in ("train", "dev", "test", "output") if (config[name] or "").startswith("/")]


def test_an_experiment_goes_on_from_kept_rows(tmp_path, monkeypatch):
    kept, runs = tmp_path / "kept", tmp_path / "runs"
    monkeypatch.setattr(study, "KEPT", kept)
    done = runs / "trec-methods"
    (done / "tables").mkdir(parents=True)
    for name in ("results.jsonl", "comparison.json", "tables/summary.csv"):
        (done / name).write_text(name)
    study.keep("trec-methods", runs)
    study.restore("trec-methods", tmp_path / "clone")
    assert (tmp_path / "clone" / "trec-methods" / "results.jsonl").read_text() == "results.jsonl"
    (done / "results.jsonl").write_text("more")
    study.restore("trec-methods", runs)
    assert (done / "results.jsonl").read_text() == "more"
