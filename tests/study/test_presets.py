"""The ablations: their candidates exist, spend what the papers spent, and stand beside the papers' figures."""

from __future__ import annotations

import dataclasses

import pytest

from lora_jax.cli.compare import PRESETS as OFFERED
from lora_jax.study import Comparison
from lora_jax.study.grid.paper_presets import PRESETS
from lora_jax.study.grid.settings import prepare_comparison
from tests.tiny_bert import write_tiny_bert


@pytest.fixture(scope="module")
def wide(shared, tmp_path_factory) -> dict:
    """On a base that a rank of 64 fits in."""
    return {**shared, "base": str(write_tiny_bert(tmp_path_factory.mktemp("wide"), layers=2, hidden=64, positions=32))}


@pytest.mark.parametrize("name", PRESETS)
def test_every_candidate_finds_its_leaves(name, wide, tmp_path):
    settings = Comparison(output=str(tmp_path / "study"), options=wide, preset=name)
    prepared = prepare_comparison(settings)
    preset, labels = PRESETS[name], {candidate.label for candidate in prepared.candidates}
    assert len(labels) == len(prepared.candidates) >= 4
    if preset.published is not None:
        assert set(preset.published.values) <= labels
        assert {len(row) for row in preset.published.values.values()} == {len(preset.published.columns)}
    assert {label for pair in preset.order for label in pair} <= labels
    assert (preset.axis is not None) == any(candidate.x is not None for candidate in prepared.candidates)


def test_the_commands_offer_them_all():
    assert tuple(PRESETS) == OFFERED


def test_a_preset_at_its_default_rates_alone(shared, tmp_path):
    own = prepare_comparison(Comparison(output=str(tmp_path / "out"), options=shared, preset="paper-lora-targets"))
    once = prepare_comparison(
        Comparison(output=str(tmp_path / "out"), options=shared, preset="paper-lora-targets", rate_factors=(1.0,))
    )
    assert [c.rates for c in once.candidates] == [c.rates[:1] for c in own.candidates]


def test_targets_are_compared_at_one_budget(shared, tmp_path):
    settings = Comparison(output=str(tmp_path / "study"), options=shared, preset="paper-lora-targets")
    prepared = prepare_comparison(settings)
    assert len({report.trainable for report in prepared.reports.values()}) == 1


def test_low_data_has_slices_below_the_whole(shared, tmp_path):
    prepared = prepare_comparison(Comparison(output=str(tmp_path / "study"), options=shared, preset="low-data"))
    assert {candidate.train_rows for candidate in prepared.candidates} == {32, None}
    assert {rows: len(examples) for rows, examples in prepared.slices.items()} == {32: 32}
    fewer = dataclasses.replace(prepared.settings, train_rows=30)
    assert {candidate.train_rows for candidate in prepare_comparison(fewer).candidates} == {None}
