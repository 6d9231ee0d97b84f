"""All analyses of one adapter, or of two: what `lora-jax analyze` prints and writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.methods import Method
from lora_jax.paths import is_bias_name, leaves_by_path
from lora_jax.state import marked_leaves
from lora_jax.text import csv_text
from lora_jax.weights import is_adapted

from . import figures
from .measures import (
    Amplification,
    BiasChanges,
    LayerChange,
    LeafChange,
    adapter_similarities,
    amplification,
    bias_changes,
    change_svd,
    layer_changes,
    leaf_changes,
)


class AdapterStudy(NamedTuple):
    """What one training changed.

    Attributes:
        changes: of the leaves that moved, those that moved most for their size first.
        layers: in their order; empty where nothing in a layer moved.
        biases: `None` where no bias moved.
        spectra: the singular values of `ΔW` of each weight with factors.
        amplifications: of the same weights.
        similarities: `φ(i, j)` of the factor `a` with another adapter's; empty without one.
    """

    changes: list[LeafChange]
    layers: list[LayerChange]
    biases: BiasChanges | None
    spectra: dict[str, np.ndarray]
    amplifications: dict[str, Amplification]
    similarities: dict[str, np.ndarray]


def study_adapter(base_params: Any, params: Any, method: Method, *, others: Any = None) -> AdapterStudy:
    """Everything that `analysis` can say of a trained tree. The head is left out: it started at random.

    Args:
        base_params: the base's tree.
        params: what training made of it.
        method: that it was trained with.
        others: another trained tree of the same model, to compare subspaces with.
    """
    heads = set(method.head(marked_leaves(params)))
    every = [row for row in leaf_changes(base_params, params) if row.path not in heads]
    moved = [row for row in every if row.change > 0]
    layers = layer_changes(every)
    before = leaves_by_path(base_params)
    spectra: dict[str, np.ndarray] = {}
    amplified: dict[str, Amplification] = {}
    for path, leaf in leaves_by_path(params).items():
        if not is_adapted(leaf) or not leaf.has_base or not {"i", "o"} <= set(leaf.axes):
            continue  # a random mask's entries and a subspace's leaves are no matrices with directions
        values, rows = change_svd(before[path], leaf).values, amplification(before[path], leaf)
        for number, (spectrum, row) in enumerate(zip(values, rows, strict=True)):
            name = path if len(rows) == 1 else f"{path}/{number}"
            spectra[name], amplified[name] = spectrum, row
    return AdapterStudy(
        changes=sorted(moved, key=lambda row: -row.relative),
        layers=layers if any(row.change for row in layers) else [],
        biases=_biases(base_params, params, heads) if any(is_bias_name(row.path) for row in moved) else None,
        spectra=spectra,
        amplifications=amplified,
        similarities={} if others is None else adapter_similarities(params, others),
    )


def _biases(base_params: Any, params: Any, heads: set[str]) -> BiasChanges:
    found = bias_changes(base_params, params)
    return found._replace(elsewhere={path: value for path, value in found.elsewhere.items() if path not in heads})


def write_study(folder: str | Path, study: AdapterStudy, *, names: tuple[str, str] = ("first", "other")) -> list[Path]:
    """Writes a CSV file for each analysis that there is, and a figure as PNG and SVG.

    Args:
        folder: one that exists.
        study: from `study_adapter`.
        names: of the adapter and the other one, for the figure of their similarity.

    Returns:
        The files.
    """
    folder = Path(folder)
    changes = [(*row, row.relative) for row in study.changes]
    written = [_write(folder, "changes", ("path", "change", "base", "relative"), changes)]
    if study.layers:
        rows = [(*row, row.relative) for row in study.layers]
        written.append(_write(folder, "layers", ("stack", "layer", "change", "base", "relative"), rows))
        written += figures.save_figure(figures.layer_change_figure(study.layers), folder, "layers")
    if study.biases is not None:
        written.append(_write(folder, "biases", ("stack", "layer", "term", "change"), _bias_rows(study.biases)))
        if study.biases.layers:
            written += figures.save_figure(figures.bias_change_figure(study.biases), folder, "biases")
    if study.spectra:
        spectra = [(path, 1 + i, value) for path, values in study.spectra.items() for i, value in enumerate(values)]
        written.append(_write(folder, "singular_values", ("path", "number", "value"), spectra))
        written += figures.save_figure(figures.singular_values_figure(study.spectra), folder, "singular_values")
        rows = [(path, *row) for path, row in study.amplifications.items()]
        written.append(_write(folder, "amplification", ("path", *Amplification._fields), rows))
    if study.similarities:
        cells = [
            (path, 1 + i, 1 + j, value)
            for path, grid in study.similarities.items()
            for (i, j), value in np.ndenumerate(grid)
        ]
        written.append(_write(folder, "similarity", ("path", "i", "j", "phi"), cells))
        figure = figures.similarity_figure(study.similarities, names=names)
        written += figures.save_figure(figure, folder, "similarity")
    return written


def _bias_rows(biases: BiasChanges) -> list[tuple[Any, ...]]:
    inside = [
        (biases.stack, layer, term, biases.values[i, j])
        for i, layer in enumerate(biases.layers)
        for j, term in enumerate(biases.terms)
        if np.isfinite(biases.values[i, j])
    ]
    return inside + [("", "", path, value) for path, value in biases.elsewhere.items()]


def _write(folder: Path, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    path = folder / f"{name}.csv"
    cells = ([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    path.write_text(csv_text(header, cells, line_end="\r\n"), encoding="utf-8", newline="")
    return path
