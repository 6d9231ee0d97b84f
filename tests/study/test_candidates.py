"""Candidates: their names, their rates, and the files and options that they come from."""

from __future__ import annotations

import pytest

from lora_jax.methods import Method
from lora_jax.study.grid.candidates import GRID, default_candidates, describe, make_candidate, read_grid
from lora_jax.training.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"name": "frozen"}, "head only"),
        ({"name": "bitfit"}, "BitFit"),
        ({"name": "bitfit", "targets": ["attention/query", "mlp/up"]}, "BitFit, attention/query+mlp/up"),
        ({"name": "lora", "rank": 4}, "LoRA r=4, all linear"),
        ({"name": "lora", "rank": 4, "targets": ["query"], "dropout": 0.1}, "LoRA r=4, query, dropout 0.1"),
        ({"name": "lora", "rank": 4, "init": "gaussian"}, "LoRA r=4, all linear, init gaussian"),
        ({"name": "full"}, "full fine-tuning"),
    ],
)
def test_a_label_says_what_differs(options, label):
    assert make_candidate(options).label == describe(make_candidate(options).method) == label


def test_rates_are_the_default_first_and_around_it():
    assert make_candidate("full").rates == (1e-4, 3.3e-5, 3e-4)
    assert make_candidate("full", factors=[1, 2]).rates == (1e-4, 2e-4)
    assert make_candidate("full", rates=[5e-5]).rates == (5e-5,)


def test_an_id_is_of_the_method_not_of_the_label():
    one, other = make_candidate("lora", label="one"), make_candidate("lora", label="other")
    assert one.id == other.id
    assert len({one.id, make_candidate({"name": "lora", "rank": 4}).id, make_candidate("lora", train_rows=9).id}) == 3


def test_every_method_has_its_place_in_the_default_grid():
    assert {options["name"] for options in GRID} <= set(Method.by_name)
    labels = [candidate.label for candidate in default_candidates()]
    assert len(set(labels)) == len(labels) == len(GRID)


def test_methods_and_ranks_are_chosen():
    assert {c.method["name"] for c in default_candidates(["bitfit", "full"])} == {"bitfit", "full"}
    chosen = [(c.method["rank"], c.method["targets"]) for c in default_candidates(["lora"], ranks=[1, 64])]
    assert chosen == [(r, t) for t in (["query", "value"], "all-linear") for r in (1, 64)]
    with pytest.raises(
        ConfigError, match=r"`methods` must be one of adapter, bitfit, .*, got 'lorra'; the nearest is `lora`"
    ):
        default_candidates(["lorra"])


def test_a_grid_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "- {name: bitfit, lr: 1e-3}\n- {name: lora, rank: 3, targets: [query], lr: [1e-3, 2e-3], label: mine}\n"
    )
    bitfit, lora = read_grid(path)
    assert (bitfit.label, bitfit.rates) == ("BitFit", (1e-3,))
    assert (lora.label, lora.rates, lora.method["rank"]) == ("mine", (1e-3, 2e-3), 3)
    assert (lora.x, lora.train_rows) == (None, None)


def test_entries_of_a_grid_file_have_places_on_an_axis(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "- {name: bitfit, train_rows: 40, label: few}\n- {name: bitfit, x: 1e3}\n"
        "- {name: bitfit, x: 60, train_rows: 50, label: some}\n"
    )
    places = [(candidate.x, candidate.train_rows) for candidate in read_grid(path)]
    assert places == [(40.0, 40), (1000.0, None), (60.0, 50)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: lora", "must hold a list of methods"),
        ("- {name: lora", "can't be read as YAML"),
        ("- {name: lora, rank: 4, rank: 8}", "`rank` is there twice: leave one out, line 1"),
        ("- {name: lora, lr: !!float x}", "`x` is no float"),
        ("- &a {name: lora, targets: [*a]}", "an alias that contains itself"),
        ("- {name: bitfit}\n- {name: lora, rnak: 3}", "entry 2: `rnak` is no option of lora; the nearest is `rank`"),
        ("- {name: lorra}", "entry 1: `method` must be one of .*, got 'lorra'"),
        ("- {name: bitfit, lr: high}", "entry 1: `lr` must be a number, got 'high'"),
        ("- {name: bitfit, lr: -1.0}", "entry 1: `lr` of 'BitFit' must be above 0, got -1.0"),
        ("- {name: bitfit, lr: []}", "entry 1: `lr` of 'BitFit' must have at least one"),
        ("- {name: bitfit, x: few}", "entry 1: `x` must be a number, got 'few'"),
        ("- {name: bitfit, x: 0}", "entry 1: `x` must be a number above 0"),
        ("- {name: bitfit, train_rows: 2.5}", "entry 1: `train_rows` must be a positive integer, got 2.5"),
        ("- {name: bitfit, label: 3}", "entry 1: `label` must be a text, got 3"),
        ("- {name: bitfit, series: [a]}", r"entry 1: `series` must be a text, got \['a'\]"),
    ],
)
def test_a_wrong_grid_file_is_refused(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_grid(path)
    with pytest.raises(ConfigError, match="doesn't exist"):
        read_grid(tmp_path / "none.yaml")
