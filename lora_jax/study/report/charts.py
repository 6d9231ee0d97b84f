"""The charts of a comparison, readable at a phone's width and without distinguishing colours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_jax import files
from lora_jax.text import printable

from ..grid.paper_presets import PRESETS, Preset
from ..runs.comparison import Outcome
from ..runs.quality import Quality
from ..runs.summary import Summary
from .tables import by_quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct for all kinds of colour blindness, without yellow, which is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_MARKS = 10  # more words beside points would overlap
_WIDTH = 5.0  # inches; on a phone of 360 pixels, 11-point text is some 11 pixels high
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.xmargin": 0.08,
    "axes.ymargin": 0.08,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "lora_jax",  # the same figure is the same file
    "text.parse_math": False,  # a label may hold a dollar sign
    "figure.constrained_layout.use": True,
}


class Chart(NamedTuple):
    """A figure with its texts.

    Attributes:
        name: Name of its files.
        title: Title above the figure.
        description: Text alternative and caption.
        figure: The figure.
    """

    name: str
    title: str
    description: str
    figure: Figure


def make_charts(outcome: Outcome) -> list[Chart]:
    """The charts for which there are results."""
    with _style():
        charts = [_quality_chart(outcome), _rates_chart(outcome)]
        # Candidates that differ only in their training examples have the same parameters and take the same time.
        if all(s.candidate.train_rows is None for s in outcome.summaries):
            charts += _scatter_charts(outcome)
        preset = PRESETS.get(outcome.prepared.settings.preset or "")
        if preset is not None and preset.axis is not None:
            charts.insert(1, _axis_chart(outcome, preset, preset.axis.name))
    return [chart for chart in charts if chart is not None]


def save(chart: Chart, folder: Path) -> None:
    """Writes `NAME.svg` and `NAME.png`."""
    with _style():
        files.write_figure(folder / f"{chart.name}.svg", chart.figure, metadata={"Date": None})
        files.write_figure(folder / f"{chart.name}.png", chart.figure, dpi=200)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _new(height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A new figure, without a window or pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, list(np.atleast_1d(figure.subplots(panels, 1, **options)))


def _quality_chart(outcome: Outcome) -> Chart | None:
    """One row per candidate: the mean, the standard deviation as a bar, and a dot for each seed below."""
    split, quality = outcome.prepared.split, Quality(outcome.prepared.metric)
    summaries = [s for s in by_quality(outcome) if s.scores[split]]
    if not summaries:
        return None
    looks = _looks(outcome.summaries)
    figure, (axes,) = _new(0.9 + 0.36 * len(summaries))
    for place, s in enumerate(summaries):
        values = [quality.shown(value) for value in s.scores[split]]
        colour, mark = looks[s.candidate.series]
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
        axes.errorbar(np.mean(values), place, xerr=deviation, fmt=mark, color=colour, capsize=3, markersize=6)
        if len(values) > 1:
            axes.plot(values, [place + 0.26] * len(values), ".", color=colour, alpha=0.7, markersize=5)
    axes.set_yticks(range(len(summaries)), [_short(s.candidate.label) for s in summaries])
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{split} {quality.title}")
    best = summaries[0]
    return Chart(
        "quality",
        "Quality by method",
        f"{best.candidate.label} has the best mean, {quality.spread(best.scores[split])}. Large marks: mean over "
        "seeds, with the standard deviation as a bar. Small dots: individual seeds.",
        figure,
    )


def _scatter_charts(outcome: Outcome) -> list[Chart | None]:
    return [
        _scatter(
            outcome,
            lambda s: s.trainable,
            name="parameters",
            title="Quality against trained parameters",
            label="trained parameters",
            note="Lines join candidates of the same kind; the horizontal axis is logarithmic.",
            logarithmic=True,
        ),
        _scatter(
            outcome,
            lambda s: s.train_seconds,
            name="time",
            title="Quality against training time",
            label="training time, s (steps × median step)",
            note="Without compilation and evaluation.",
        ),
    ]


def _scatter(
    outcome: Outcome,
    place: Callable[[Summary], float | None],
    *,
    name: str,
    title: str,
    label: str,
    note: str,
    logarithmic: bool = False,
) -> Chart | None:
    split, quality = outcome.prepared.split, Quality(outcome.prepared.metric)
    summaries = [s for s in outcome.summaries if s.scores[split] and place(s) is not None]
    if len(summaries) < 2:
        return None
    figure, (axes,) = _new(3.9)
    marks = len(summaries) <= _MOST_MARKS
    _draw_series(axes, summaries, _looks(outcome.summaries), place, split, quality, lines=logarithmic, marks=marks)
    if logarithmic:
        axes.set_xscale("log")
        _plain_ticks(axes, [place(s) or 0.0 for s in summaries])
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{split} {quality.title}")
    _legend(figure, axes)
    return Chart(name, title, f"{note} Bars: standard deviation over seeds.", figure)


def _axis_chart(outcome: Outcome, preset: Preset, name: str) -> Chart | None:
    """Quality along the preset's axis, with the paper's figures in panels below."""
    split, quality = outcome.prepared.split, Quality(outcome.prepared.metric)
    summaries = [s for s in outcome.summaries if s.scores[split] and s.candidate.x is not None]
    if not summaries:
        return None
    columns = preset.published.columns if preset.published is not None else ()
    figure, panels = _new(3.7 + 2.2 * len(columns), 1 + len(columns), sharex=True)
    looks = _looks(outcome.summaries)
    _draw_series(panels[0], summaries, looks, lambda s: s.candidate.x, split, quality, lines=True)
    for s in outcome.summaries:
        if s.candidate.x is None and s.scores[split]:  # not on the axis: drawn as a level
            level = float(np.mean([quality.shown(value) for value in s.scores[split]]))
            panels[0].axhline(
                level, color=looks[s.candidate.series][0], linestyle="--", label=_short(s.candidate.label)
            )
    panels[0].set_ylabel(f"{split} {quality.title}")
    if preset.published is not None:
        panels[0].set_title("here", fontsize=11, loc="left")
        for column, axes in enumerate(panels[1:]):
            for series, (colour, mark) in looks.items():
                points = [
                    (s.candidate.x, preset.published.values[s.candidate.label][column])
                    for s in outcome.summaries
                    if s.candidate.series == series and s.candidate.label in preset.published.values
                ]
                axes.plot(*zip(*points, strict=True), marker=mark, color=colour, linestyle=":", fillstyle="none")
            axes.set_title(f"the paper, {columns[column]}", fontsize=11, loc="left")
            axes.set_ylabel("accuracy, %")
    panels[-1].set_xscale("log")
    places: list[float] = []
    for x in sorted({s.candidate.x for s in outcome.summaries if s.candidate.x is not None}):
        if not places or x > 1.4 * places[-1]:  # closer, their numbers would touch
            places.append(x)
    panels[-1].set_xticks(places, [f"{x:,g}" for x in places])
    panels[-1].minorticks_off()
    panels[-1].set_xlabel(name)
    _legend(figure, panels[0])
    note = f" Below, dotted: the paper's results ({preset.published.setting})." if preset.published is not None else ""
    description = f"One line per kind of candidate; bars: standard deviation over seeds.{note}"
    return Chart("axis", f"Quality against {name}", description, figure)


def _rates_chart(outcome: Outcome) -> Chart | None:
    """How much the rate matters to each candidate."""
    quality = Quality(outcome.prepared.metric)
    drawn = [(s, {r: v for r, v in s.tried.items() if v is not None}) for s in outcome.summaries]
    drawn = [(s, tried) for s, tried in drawn if len(tried) > 1]
    # More lines can't be distinguished; the table shows them.
    if not drawn or len(drawn) > _MOST_MARKS:
        return None
    figure, (axes,) = _new(4.1)
    looks, seen = _looks(outcome.summaries), dict.fromkeys(_looks(outcome.summaries), 0)
    for s, tried in drawn:
        colour, mark = looks[s.candidate.series]
        line = _LINES[seen[s.candidate.series] % len(_LINES)]
        seen[s.candidate.series] += 1
        rates = sorted(tried)
        values = [quality.shown(tried[rate]) for rate in rates]
        label = _short(s.candidate.label)
        axes.plot(rates, values, label=label, marker=mark, color=colour, linestyle=line, fillstyle="none")
        if s.rate in tried:
            axes.plot(s.rate, quality.shown(tried[s.rate]), marker=mark, color=colour, markersize=8)
    axes.set_xscale("log")
    _plain_ticks(axes, [rate for _, tried in drawn for rate in tried])
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(f"dev {quality.title}")
    _legend(figure, axes)
    return Chart(
        "rates",
        "How the learning rates were chosen",
        "Dev scores with the first seed. Filled: the chosen rate.",
        figure,
    )


def _draw_series(
    axes: Axes,
    summaries: Sequence[Summary],
    looks: dict[str, tuple[str, str]],
    place: Callable[[Summary], float | None],
    split: str,
    quality: Quality,
    *,
    lines: bool,
    marks: bool = False,
) -> None:
    for series, (colour, mark) in looks.items():
        own = sorted((s for s in summaries if s.candidate.series == series), key=lambda s: place(s) or 0)
        if not own:
            continue
        x = [place(s) or 0.0 for s in own]
        values = [[quality.shown(value) for value in s.scores[split]] for s in own]
        y = [float(np.mean(scores)) for scores in values]
        deviation = [float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0 for scores in values]
        axes.errorbar(
            x,
            y,
            yerr=deviation,
            marker=mark,
            color=colour,
            linestyle="-" if lines else "none",
            capsize=2.5,
            label=_short(series),
        )
        if marks and len(own) > 1:
            for s, left, height in zip(own, x, y, strict=True):
                if s.candidate.mark:
                    offset = {"xytext": (6, 4), "textcoords": "offset points"}
                    axes.annotate(_short(s.candidate.mark), (left, height), fontsize=9, color=colour, **offset)


def _looks(summaries: Sequence[Summary]) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each series, the same in every chart."""
    series = dict.fromkeys(s.candidate.series for s in summaries)
    return {
        name: (_COLOURS[place % len(_COLOURS)], _MARKS[(place + place // len(_COLOURS)) % len(_MARKS)])
        for place, name in enumerate(series)
    }


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks as plain numbers instead of powers of ten, more of them for a narrow range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    span = max(values) / min(values)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if span < 4 else (1.0, 2.0, 5.0) if span < 30 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: _count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, where it covers no point at any width."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 22 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)


def _short(label: str, limit: int = 32) -> str:
    """A label for a figure, shortened and without control characters, which SVG can't hold."""
    label = printable(label)
    return label if len(label) <= limit else label[: limit - 1] + "…"
