"""All analyses of one adapter or two, as `lora-jax analyze` prints and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax import files
from lora_jax.methods import Method
from lora_jax.paths import is_bias_name, leaves_by_path
from lora_jax.state import marked_leaves
from lora_jax.text import csv_text
from lora_jax.types import Params
from lora_jax.weights import InsertedNode, is_adapted

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
        changes: Changes of the leaves that moved, with the largest relative change first.
        layers: Changes of the layers in order; empty if nothing in a layer moved.
        biases: Changes of the biases; `None` if none moved.
        spectra: Singular values of `ΔW` for each weight with factors.
        amplifications: Amplification for the same weights.
        similarities: `φ(i, j)` of the factor `a` with that of another adapter; empty without one.
    """

    changes: list[LeafChange]
    layers: list[LayerChange]
    biases: BiasChanges | None
    spectra: dict[str, np.ndarray]
    amplifications: dict[str, Amplification]
    similarities: dict[str, np.ndarray]


def study_adapter(base_params: Params, params: Params, method: Method, *, others: Params = None) -> AdapterStudy:
    """All analyses of a trained tree, without the head, which started at random.

    Args:
        base_params: Parameters of the base.
        params: Trained parameters.
        method: Method that they were trained with.
        others: Another trained tree of the same model, to compare subspaces with.
    """
    heads = set(method.head(marked_leaves(params)))
    every = [row for row in leaf_changes(base_params, params) if row.path not in heads]
    moved = [row for row in every if row.change > 0]
    layers = layer_changes(every)
    before = leaves_by_path(base_params)
    spectra: dict[str, np.ndarray] = {}
    amplified: dict[str, Amplification] = {}
    for path, leaf in leaves_by_path(params).items():
        if not is_adapted(leaf) or isinstance(leaf, InsertedNode) or not {"i", "o"} <= set(leaf.axes):
            continue  # random masks and random subspaces have no in and out axes
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


def _biases(base_params: Params, params: Params, heads: set[str]) -> BiasChanges:
    found = bias_changes(base_params, params)
    return found._replace(elsewhere={path: value for path, value in found.elsewhere.items() if path not in heads})


def write_study(folder: str | Path, study: AdapterStudy, *, names: tuple[str, str] = ("first", "other")) -> list[Path]:
    """Writes each available analysis as CSV, and its figure as PNG and SVG.

    Args:
        folder: An existing folder.
        study: Result of `study_adapter`.
        names: Names of the adapter and the other one, for the figure of their similarity.

    Returns:
        Paths of the files.
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


def _bias_rows(biases: BiasChanges) -> list[tuple[object, ...]]:
    inside = [
        (biases.stack, layer, term, biases.values[i, j])
        for i, layer in enumerate(biases.layers)
        for j, term in enumerate(biases.terms)
        if np.isfinite(biases.values[i, j])
    ]
    return [*inside, *(("", "", path, value) for path, value in biases.elsewhere.items())]


def _write(folder: Path, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path = folder / f"{name}.csv"
    cells = ([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    files.write_text(path, csv_text(header, cells, line_end="\r\n"))
    return path
