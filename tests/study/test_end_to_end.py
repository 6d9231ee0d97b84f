"""One real comparison, and its pages: complete, self-contained, proof against what labels and errors may hold."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from lora_jax.study.grid.paper_presets import PRESETS
from lora_jax.study.report.charts import make_charts
from lora_jax.study.report.page import write_report
from lora_jax.study.report.tables import Table, make_tables, markdown
from lora_jax.study.runs.comparison import Outcome
from lora_jax.study.runs.summary import Summary
from lora_jax.training.config import TrainConfig
from lora_jax.training.run.loop import train

from .conftest import HOSTILE


def test_a_real_comparison(outcome, settings):
    assert outcome.left == 0
    frozen, lora, full = outcome.summaries
    assert [len(s.seeds) for s in outcome.summaries] == [2, 2, 2]
    assert lora.rate == 1e-2
    assert [(rate, seed) for rate, seed, _ in lora.errors] == [(1e30, 0)]
    assert "NotFiniteError" in lora.errors[0][2]
    assert frozen.trainable < lora.trainable < full.trainable
    assert outcome.recommendation is not None
    held = [row["baselines"] for row in outcome.rows.values() if row["error"] is None]
    assert {baselines["test"]["metrics"]["accuracy"] for baselines in held} == {0.5}
    assert {baselines["dev"]["answer"] for baselines in held} == {"'neg'"}
    for s in outcome.summaries:
        assert all(0 <= score <= 1 for scores in s.scores.values() for score in scores)
        assert s.adapter_bytes is not None
        assert s.adapter_bytes > 4 * s.trainable - 1
        assert sorted(s.latency_ms) == [1, 32]
        assert min(s.latency_ms.values()) > 0


def test_training_more_takes_more_memory(outcome):
    """Gradients and two moments of what is trained, and the activations that its gradients need."""
    frozen, lora, full = (s.step_memory for s in outcome.summaries)
    assert frozen < lora < full
    difference = outcome.summaries[2].trainable - outcome.summaries[0].trainable
    assert full - frozen > 2 * 4 * difference


def test_a_row_has_all_that_repeats_it(outcome, tmp_path):
    row = next(row for row in outcome.rows.values() if row["candidate"] == HOSTILE and row["error"] is None)
    again = train(TrainConfig.from_dict({**row["config"], "output": str(tmp_path / "again")}))
    assert again.metrics == row["metrics"]
    assert {"jax", "lora_jax", "python"} <= row["versions"].keys()
    assert row["device"]["platform"] == "cpu"


class Page(html.parser.HTMLParser):
    """Elements and texts; every element that is opened has to be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(outcome) -> str:
    return write_report(outcome, command=["lora-jax", "compare", "--output", "a & b"]).read_text()


def test_the_page_is_one_file_without_scripts(page):
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    sources = [attributes["src"] or "" for tag, attributes in parsed.elements if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert all(attributes.get("alt") for tag, attributes in parsed.elements if tag == "img")
    assert not re.search(r"(src|href)=\"http|@import|url\(", page)
    assert 'name="viewport"' in page


def test_labels_are_shown_as_they_are(page):
    assert "<script" not in page
    assert HOSTILE in Page(page).text


def test_the_page_says_what_happened(page, outcome):
    text = Page(page).text
    assert outcome.recommendation is not None
    assert f"Recommended: {outcome.recommendation.summary.candidate.label}." in text
    assert "NotFiniteError" in text
    assert "train 60 examples, dev 16 examples, test 12 examples" in text
    assert "lora-jax compare --output 'a & b'" in text
    assert "demonstration" not in text


def test_all_files_are_there(page, outcome):
    folder = outcome.prepared.folder
    for name in ("quality", "parameters", "time"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    assert "# Which method for this task?" in (folder / "report.md").read_text()
    rows = list(csv.DictReader((folder / "tables" / "summary.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [s.candidate.label for s in outcome.summaries]
    for row, s in zip(rows, outcome.summaries, strict=True):
        assert float(row["test_mean"]) == np.mean(s.scores["test"])
        assert float(row["test_deviation"]) == pytest.approx(np.std(s.scores["test"], ddof=1))
    runs = list(csv.DictReader((folder / "tables" / "runs.csv").read_text().splitlines()))
    assert len(runs) == len(outcome.rows) == 7
    assert sum(bool(row["error"]) for row in runs) == 1


def test_markdown_shows_text_as_it_is():
    table = Table("t", ("a|b", "n"), [("x | y <b>\nz *", "1")], ("see _this_",))
    assert markdown(table) == "| a\\|b | n |\n| --- | ---: |\n| x \\| y \\<b\\> z \\* | 1 |\n\nsee \\_this\\_\n"


def with_preset(outcome: Outcome, name: str, scores) -> Outcome:
    """The outcome of a preset whose candidates have the scores `scores(place)`, without a run."""
    candidates = PRESETS[name].candidates(500)
    settings = dataclasses.replace(outcome.prepared.settings, preset=name)
    summaries: list[Summary] = [
        outcome.summaries[0]._replace(
            candidate=candidate, scores={"dev": scores(place), "test": scores(place)}, trainable=100 * (place + 1)
        )
        for place, candidate in enumerate(candidates)
    ]
    return outcome._replace(
        prepared=outcome.prepared._replace(settings=settings, candidates=candidates), summaries=summaries
    )


def test_papers_stand_beside(outcome):
    tables = {t.name: t for t in make_tables(with_preset(outcome, "paper-lora-rank", lambda place: [0.5, 0.6]))}
    assert tables["paper"].rows[0] == ("LoRA, q, r=1", "55.0 ± 7.1", "100", "68.8", "90.7")
    assert "order" not in tables


def test_orders_are_held_against_the_paper(outcome):
    tables = {t.name: t for t in make_tables(with_preset(outcome, "paper-bitfit-terms", lambda p: [0.9 - 0.1 * p]))}
    assert "paper" not in tables  # its figures can't be cited
    assert tables["order"].rows[0] == ("all biases > query and MLP-up biases", "10.0 points", "yes")
    tables = {t.name: t for t in make_tables(with_preset(outcome, "paper-bitfit-terms", lambda p: [0.1 + 0.1 * p]))}
    assert tables["order"].rows[0] == ("all biases > query and MLP-up biases", "-10.0 points", "no")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_figures(outcome, name):
    charts = {chart.name: chart for chart in make_charts(with_preset(outcome, name, lambda place: [0.5, 0.6]))}
    assert ("axis" in charts) == (PRESETS[name].axis is not None)
    for chart in charts.values():
        chart.figure.draw_without_rendering()


@pytest.mark.parametrize("name", PRESETS)
def test_candidates_of_ones_own_stand_in_for_a_presets(outcome, name):
    settings = dataclasses.replace(outcome.prepared.settings, preset=name)
    placed = [
        s._replace(candidate=dataclasses.replace(s.candidate, x=float(place + 1)))
        for place, s in enumerate(outcome.summaries)
    ]
    own = outcome._replace(prepared=outcome.prepared._replace(settings=settings), summaries=placed)
    for chart in make_charts(own):
        chart.figure.draw_without_rendering()
    assert {"order", "paper"} & {table.name for table in make_tables(own)} == (
        ({"order"} if PRESETS[name].order else set()) | ({"paper"} if PRESETS[name].published else set())
    )


OBEYED = "=1+1 \x1b[2J\x1b]0;t\x07 [red]x[/x] \u202e--> ]]>"


def test_no_output_obeys_a_label(outcome, tmp_path):
    """In the page, the figures, the tables and Markdown it is shown; in CSV it is no formula."""
    summaries = [s._replace(candidate=dataclasses.replace(s.candidate, label=OBEYED)) for s in outcome.summaries[:1]]
    candidates = tuple(s.candidate for s in summaries)
    prepared = outcome.prepared._replace(folder=tmp_path, candidates=candidates)
    rows = {key: row | {"error": "=2 \x1b[2J"} for key, row in outcome.rows.items()}
    hostile = outcome._replace(prepared=prepared, summaries=summaries, rows=rows, recommendation=None)
    page = write_report(hostile, command=["lora-jax", "\x1b[2J"]).read_text()
    shown = r"=1+1 \x1b[2J\x1b]0;t\x07 [red]x[/x] \u202e--> ]]>"
    assert shown in Page(page).text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        if path.suffix == ".svg":
            ElementTree.parse(path)  # well-formed
        if path.suffix != ".png":
            text = path.read_text()
            assert not [character for character in text if not character.isprintable() and character != "\n"], path
    (row,) = csv.DictReader((tmp_path / "tables" / "summary.csv").read_text().splitlines())
    assert row["method"] == f"'{shown}"
    for row in csv.DictReader((tmp_path / "tables" / "runs.csv").read_text().splitlines()):
        assert row["error"] == r"'=2 \x1b[2J"
        assert float(row["seconds"]) >= 0


def test_a_tables_cells_are_shown_letter_by_letter(capsys):
    from lora_jax.cli.output import print_facts, print_line, print_table

    print_table(("a [b]", "n"), [("[small]", "1"), ("[/x] :smile:", "\x1b[2J")], title="[/y]\x1b]0;t\x07")
    print_facts({"label [i]": "[bold]a[/x]\x9b2J"})
    print_line("[/x] one\ntwo")
    text = capsys.readouterr().out
    for part in ("a [b]", "[small]", "[/x] :smile:", r"\x1b[2J", r"[/y]\x1b]0;t\x07", r"label [i]  [bold]a[/x]\x9b2J"):
        assert part in text
    assert r"[/x] one\ntwo" in text
    assert all(line.isprintable() for line in text.splitlines())
