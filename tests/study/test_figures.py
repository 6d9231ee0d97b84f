"""Figures show what they were given; the files are the same on every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra `study`")

from lora_jax.study.analysis import figures
from lora_jax.study.analysis.measures import BiasChanges, LayerChange


def shown(axes: Any) -> np.ndarray:
    return axes.images[0].get_array().filled(np.nan)


def test_the_heat_map_has_terms_down_and_layers_across(tmp_path: Path) -> None:
    values = np.array([[0.1, 0.4], [0.2, np.nan], [0.3, 0.6]])
    figure = figures.bias_change_figure(BiasChanges("layers", (0, 1, 2), ("query", "mlp/up"), values, {}))
    axes = figure.axes[0]
    np.testing.assert_array_equal(shown(axes), values.T)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["query", "mlp/up"]
    assert sorted(text.get_text() for text in axes.texts) == ["0.1", "0.2", "0.3", "0.4", "0.6"]


def test_a_figure_is_the_same_file_every_time(tmp_path: Path) -> None:
    changes = [LayerChange("layers", i, 0.01 * i, 1.0) for i in range(3)]
    first, again = (
        [path.read_bytes() for path in figures.save_figure(figures.layer_change_figure(changes), tmp_path, name)]
        for name in ("one", "one")
    )
    assert first == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "one.svg"]


def test_similarity_grids_are_on_one_scale() -> None:
    grids = {f"layers/{i}/attention/query/kernel": np.full((4, 8), i / 4) for i in range(5)}
    figure = figures.similarity_figure(grids)
    images = [image for axes in figure.axes for image in axes.images if axes.get_title()]
    assert len(images) == 5
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert len(figures.similarity_figure({f"w{i}": np.ones((1, 1)) for i in range(20)}).axes) == 12 + 1


def test_singular_values_of_unequal_ranks() -> None:
    figure = figures.singular_values_figure({"a": np.array([3.0, 2.0, 1.0]), "b": np.array([1.0])})
    np.testing.assert_array_equal(shown(figure.axes[0]), [[3, 2, 1], [1, np.nan, np.nan]])


def test_bars_are_percent_by_layer() -> None:
    figure = figures.layer_change_figure([LayerChange("layers", i, 0.01 * i, 1.0) for i in range(3)])
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[0].patches], [0, 1, 2])  # type: ignore[attr-defined]
