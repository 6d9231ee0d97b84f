"""The figures of `analysis`, one function each, in colours that everyone can distinguish."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax import files
from lora_jax.text import printable

from .measures import BiasChanges, LayerChange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Darker is more, also in greyscale: cividis is perceptually uniform for all kinds of colour blindness.
_COLOURS = "cividis_r"
_BLUE = "#0072B2"  # from Okabe and Ito's palette
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "lora_jax",  # the same figure is the same file
    "text.parse_math": False,  # a path may hold a dollar sign
    "figure.constrained_layout.use": True,
}
_MOST_CELLS = 16  # in a row; with more, numbers in cells are unreadable
_MOST_GRIDS = 12
_MOST_BARS = 40


def bias_change_figure(changes: BiasChanges) -> Figure:
    """`(1 / dim b) · ‖b₀ − b_F‖₁`, terms down and layers across, as in figure 2 of the BitFit paper."""
    with _style():
        rows, columns = len(changes.terms), len(changes.layers)
        figure, axes = _figure(2.6 + 0.55 * max(columns, 3), 1.4 + 0.36 * rows)
        table = changes.values.T
        image = axes.imshow(table, cmap=_COLOURS, aspect="auto", vmin=0)
        axes.set_xticks(range(columns), [str(layer) for layer in changes.layers])
        axes.set_yticks(range(rows), [printable(term) for term in changes.terms])
        axes.set_xlabel("layer")
        _plain(axes)
        _write_cells(axes, table)
        figure.colorbar(image, label="mean |change| of a bias")
        return figure


def similarity_figure(grids: Mapping[str, np.ndarray], *, names: tuple[str, str] = ("first", "other")) -> Figure:
    """`φ(i, j)` for the first twelve weights: `i` directions of the first down, `j` of the other across."""
    shown = list(grids.items())[:_MOST_GRIDS]
    with _style():
        columns = min(len(shown), 3)
        lines = -(-len(shown) // columns)
        figure, all_axes = _figure(1.2 + 2.6 * columns, 0.8 + 2.6 * lines, lines, columns)
        image = None
        for axes, (path, grid) in zip(np.ravel(all_axes), shown, strict=False):
            image = axes.imshow(grid, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
            for axis, size in ((axes.xaxis, grid.shape[1]), (axes.yaxis, grid.shape[0])):
                step = max(1, size // 4)
                ticks = sorted({0, *range(2 * step - 1, size, step), size - 1})
                axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
            axes.set_title(_two_lines(path), fontsize=9)
            _plain(axes)
        for axes in np.ravel(all_axes)[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel(f"j directions, {printable(names[1])}", fontsize=11)
        figure.supylabel(f"i directions, {printable(names[0])}", fontsize=11)
        if image is not None:
            figure.colorbar(image, ax=all_axes, label="shared subspace φ(i, j)", shrink=0.8)
        return figure


def singular_values_figure(spectra: Mapping[str, np.ndarray]) -> Figure:
    """The singular values of `ΔW` for the first forty weights, one row per weight."""
    paths = list(spectra)[:_MOST_BARS]
    widest = max(len(spectra[path]) for path in paths)
    table = np.full((len(paths), widest), np.nan)
    for row, path in enumerate(paths):
        table[row, : len(spectra[path])] = spectra[path]
    with _style():
        figure, axes = _figure(4.4 + 0.45 * min(widest, 24), 1.3 + 0.3 * len(paths))
        image = axes.imshow(table, cmap=_COLOURS, aspect="auto", vmin=0)
        axes.set_yticks(range(len(paths)), [printable(path) for path in paths], fontsize=9)
        step = max(1, widest // 12)
        axes.set_xticks(range(0, widest, step), [str(1 + place) for place in range(0, widest, step)])
        axes.set_xlabel("singular value of ΔW")
        _plain(axes)
        figure.colorbar(image, label="σ")
        return figure


def layer_change_figure(changes: Sequence[LayerChange]) -> Figure:
    """`‖ΔW‖ / ‖W‖` of each layer, as bars."""
    several = len({change.stack for change in changes}) > 1
    names = [printable(f"{change.stack}/{change.layer}") if several else str(change.layer) for change in changes]
    with _style():
        figure, axes = _figure(6.0, 1.2 + 0.3 * len(changes))
        values = [100 * change.relative for change in changes]
        bars = axes.barh(names, values, color=_BLUE, height=0.7)
        axes.bar_label(bars, [f"{value:.2g} %" for value in values], padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_ylabel("layer")
        axes.set_xlabel("‖ΔW‖ / ‖W‖ in percent")
        return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Writes `name.png` and `name.svg`."""
    paths = [Path(folder) / f"{name}.{ending}" for ending in ("png", "svg")]
    with _style():
        files.write_figure(paths[0], figure, dpi=160, bbox_inches="tight")
        files.write_figure(paths[1], figure, bbox_inches="tight", metadata={"Date": None})
    return paths


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    from matplotlib.figure import Figure  # not pyplot's, which would open a window or keep it forever

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cells(axes: Axes, table: np.ndarray) -> None:
    """The number in each cell, dark on light and light on dark."""
    if table.shape[1] > _MOST_CELLS or not np.isfinite(table).any():
        return
    half = np.nanmax(table) / 2
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if value > half else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _two_lines(path: str) -> str:
    """A path that fits above a small figure."""
    path = printable(path)
    parts = path.split("/")
    middle = max(1, len(parts) // 2)
    return "/".join(parts[:middle]) + "/\n" + "/".join(parts[middle:]) if len(path) > 24 else path
