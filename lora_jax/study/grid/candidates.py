"""What is compared: methods with their settings, and the learning rates at which each is tried."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lora_jax.files import FileError
from lora_jax.methods import Method
from lora_jax.training.errors import ConfigError
from lora_jax.training.method_options import make_method, method_class, method_options
from lora_jax.training.yaml_file import read_yaml_file

Value = TypeVar("Value")

# The default grid, a selection of the registered methods; their rates follow from each method's default.
GRID: tuple[Mapping[str, object], ...] = (
    {"name": "frozen"},
    {"name": "bitfit"},
    {"name": "lora", "rank": 2, "targets": ("query", "value")},
    {"name": "lora", "rank": 2, "targets": "all-linear"},
    {"name": "lora", "rank": 8, "targets": "all-linear"},
    {"name": "full"},
)
RATE_FACTORS = (1.0, 1 / 3, 3.0)
# Keys of a grid file's entry beside the method's options.
_ENTRY = ("label", "series", "lr", "x", "train_rows")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with its settings, and how it is shown.

    Attributes:
        label: Name in tables and figures, unique in a comparison.
        method: All options of the method, as `training.method_options` has them.
        rates: Peak learning rates to try, the default first.
        series: Name of the series; its candidates share a colour, and a line if there is an axis.
        mark: Word beside its points in figures, to tell it from others of its series.
        x: Position on the comparison's axis, if that has one.
        train_rows: Number of training examples; `None` for all.
    """

    label: str
    method: Mapping[str, object]
    rates: tuple[float, ...]
    series: str
    mark: str = ""
    x: float | None = None
    train_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise ConfigError(f"`lr` of {self.label!r} must have at least one learning rate, got none.")
        for rate in self.rates:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ConfigError(f"`lr` of {self.label!r} must be above 0, got {rate!r}.")

    def at(self, factors: Sequence[float]) -> Candidate:
        """This candidate at other rates, its first one times `factors`."""
        return replace(self, rates=_rates(self.rates[0], factors))

    @property
    def id(self) -> str:
        """A name for files that depends on the method and the examples, not on the label."""
        content = json.dumps([self.method, self.train_rows], sort_keys=True)
        return f"{self.method['name']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def make_candidate(
    method: Mapping[str, object] | str,
    *,
    label: str | None = None,
    rates: Iterable[float] | None = None,
    factors: Sequence[float] = RATE_FACTORS,
    series: str | None = None,
    mark: str = "",
    x: float | None = None,
    train_rows: int | None = None,
) -> Candidate:
    """A candidate from plain options.

    Options that aren't given have the defaults of `lora-jax train`, except those in `Method.comparison_defaults`: LoRA
    starts with `"kaiming"` and has an `alpha` of twice the rank, so that one rate suits all ranks.

    Args:
        method: Name of the method or its options, see `training.method_options.make_method`.
        label, series: Names; `None` makes them from the options.
        rates: Learning rates; `None` for the method's default times `factors`.
        factors: Factors of the default rate; the first is tried first.
        mark, x, train_rows: See `Candidate`.

    Example:
        >>> candidate = make_candidate({"name": "lora", "rank": 4, "targets": ["query", "value"]})
        >>> candidate.label, candidate.series, candidate.rates
        ('LoRA r=4, query+value', 'LoRA, query+value', (0.002, 0.00067, 0.006))
    """
    made = _made(method)
    options = method_options(made)
    rate = made.learning_rate("classification")
    return Candidate(
        label=label if label is not None else describe(options),
        method=options,
        rates=tuple(rates) if rates is not None else _rates(rate, factors),
        series=series if series is not None else describe({**options, "rank": None}),
        mark=mark,
        x=x,
        train_rows=train_rows,
    )


def describe(options: Mapping[str, object]) -> str:
    """A method's options in a few words: its rank and targets, and what else differs from the default."""
    cls = method_class(options["name"])
    usual = method_options(_made(cls.name))
    words = [cls.title]
    rank, alpha = options.get("rank"), options.get("alpha")
    if rank is not None:
        words[0] += f" r={rank}"
    if "rank" in usual or options.get("targets") != usual.get("targets"):
        words.append(_names(options.get("targets")))
    if isinstance(alpha, (int, float)) and isinstance(rank, int) and alpha != 2 * rank:
        words.append(f"alpha {alpha:g}")
    words += [
        f"{key} {_names(value)}"
        for key, value in options.items()
        if key not in ("name", "rank", "targets", "alpha") and value != usual.get(key)
    ]
    return ", ".join(words)


def default_candidates(
    methods: Sequence[str] | None = None, *, ranks: Sequence[int] | None = None, factors: Sequence[float] = RATE_FACTORS
) -> tuple[Candidate, ...]:
    """The grid that is compared by default.

    Args:
        methods: Names of the methods to compare; `None` for the grid's. Methods outside the grid have their defaults.
        ranks: Ranks in place of the grid's, for each set of targets.
        factors: Factors of each method's default rate.

    Raises:
        ConfigError: A method doesn't exist.
    """
    selected = list(GRID) if methods is None else [options for name in methods for options in _of_name(name)]
    if ranks is not None:
        ranked = {json.dumps({**options, "rank": None}): options for options in selected if "rank" in options}
        others = [options for options in selected if "rank" not in options]
        selected = others + [{**options, "rank": rank} for options in ranked.values() for rank in ranks]
    return tuple(
        make_candidate(options, factors=factors, mark=f"r={options['rank']}" if "rank" in options else "")
        for options in selected
    )


def read_grid(path: str | Path) -> tuple[Candidate, ...]:
    """Candidates from YAML: a list of method options, each with some keys of the entry's own.

    These are `label`, `series`, `x` and `train_rows`, see `Candidate`, and `lr`, one rate or several. `x` is a position
    on the axis of the preset that the grid replaces; by default it is `train_rows`.

    Raises:
        ConfigError: The file holds no such list, or an unknown method or option; entries are named by their numbers.
    """
    try:
        entries = read_yaml_file(path)
    except FileError as error:
        raise ConfigError(f"`grid` {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"`grid` {path} must hold a list of methods, one per line: `- {{name: lora, rank: 4}}`.")
    candidates = []
    for number, entry in enumerate(entries, start=1):
        options = dict(entry)
        label, series, rates, x, rows = (options.pop(name, None) for name in _ENTRY)
        try:
            for name, text in (("label", label), ("series", series)):
                if text is not None and not isinstance(text, str):
                    raise ConfigError(f"`{name}` must be a text, got {text!r}.")
            if rows is not None and (type(rows) is not int or rows < 1):
                raise ConfigError(f"`train_rows` must be a positive integer, got {rows!r}.")
            x = rows if x is None else _number("x", x)
            if x is not None and (type(x) not in (int, float) or not 0 < x < math.inf):
                raise ConfigError(f"`x` must be a number above 0, since the axis is logarithmic, got {x!r}.")
            if rates is not None:
                rates = [_number("lr", rate) for rate in (rates if isinstance(rates, list) else [rates])]
            mark = f"r={options['rank']}" if "rank" in options else ""
            own = {"label": label, "rates": rates, "series": series, "mark": mark, "train_rows": rows}
            candidates.append(make_candidate(options, x=None if x is None else float(x), **own))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"`grid` {path}, entry {number}: {error}") from error
    return tuple(candidates)


def _rates(rate: float, factors: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{rate * factor:.2g}") for factor in factors)


def _made(method: Mapping[str, object] | str) -> Method:
    options = {"name": method} if isinstance(method, str) else method
    return make_method({**method_class(options.get("name", "lora")).comparison_defaults(options), **options})


def _of_name(name: str) -> list[Mapping[str, object]]:
    defaults = method_class(name, "methods").task_defaults("classification")
    return [options for options in GRID if options["name"] == name] or [{"name": name, **defaults}]


def _number(name: str, value: Value | str) -> Value | float:
    # YAML reads `1e-3`, without a point, as a string.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ConfigError(f"`{name}` must be a number, got {value!r}.") from None


def _names(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return value.replace("all-linear", "all linear") if isinstance(value, str) else str(value)
