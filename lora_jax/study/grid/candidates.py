"""What is compared: methods with their settings, and the learning rates that each is tried at."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_jax.files import FileError
from lora_jax.training.errors import ConfigError
from lora_jax.training.method_options import DEFAULTS, METHODS, default_learning_rate, make_method, method_options
from lora_jax.training.yaml_file import read_yaml_file

# The default grid. A new method joins with a line here; its rates follow from its default.
GRID: tuple[Mapping[str, Any], ...] = (
    {"name": "frozen"},
    {"name": "bitfit"},
    {"name": "lora", "rank": 2, "targets": ("query", "value")},
    {"name": "lora", "rank": 2, "targets": "all-linear"},
    {"name": "lora", "rank": 8, "targets": "all-linear"},
    {"name": "full"},
)
# What a comparison takes where an entry doesn't say, beside an alpha of twice the rank. A Gaussian start has standard
# deviation 1/r, so that a rate which suits one rank is too high for a lower one; this start, of the authors' code and
# of PEFT, is the same for every rank.
_ACROSS_RANKS: Mapping[str, Mapping[str, Any]] = {"lora": {"init": "kaiming"}, "dora": {"init": "kaiming"}}
RATE_FACTORS = (1.0, 1 / 3, 3.0)
_ENTRY = ("label", "series", "lr", "x", "train_rows")  # of a grid file's entry, beside the method's options
TITLES = {
    "frozen": "head only",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "(IA)³",
    "vera": "VeRA",
    "adapter": "bottleneck adapters",
    "prefix": "prefix",
    "full": "full fine-tuning",
    "norms": "norms",
    "top-layers": "last layers",
    "random-mask": "random mask",
    "random-subspace": "random subspace",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with its settings, and how it is shown.

    Attributes:
        label: its name in tables and figures, unique in a comparison.
        method: all its options, as `training.method_options` has them.
        rates: peak learning rates to try, the default first.
        series: candidates of one series have one colour, and a line where there is an axis.
        mark: a word beside its points in figures, to tell it from others of its series.
        x: its place on the comparison's axis, if that has one.
        train_rows: how many of the training rows it learns from; `None` for all.
    """

    label: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    series: str
    mark: str = ""
    x: float | None = None
    train_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise ConfigError(f"`lr` of {self.label!r} is empty: at least one learning rate is expected.")
        for rate in self.rates:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ConfigError(f"`lr` of {self.label!r} has {rate!r}, and a number above 0 is expected.")

    def at(self, factors: Sequence[float]) -> Candidate:
        """This candidate at other rates: its first one times `factors`."""
        return replace(self, rates=_rates(self.rates[0], factors))

    @property
    def id(self) -> str:
        """Of its method and rows, whatever its label: a name for files."""
        content = json.dumps([self.method, self.train_rows], sort_keys=True)
        return f"{self.method['name']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def make_candidate(
    method: Mapping[str, Any] | str,
    *,
    label: str | None = None,
    rates: Iterable[float] | None = None,
    factors: Sequence[float] = RATE_FACTORS,
    series: str | None = None,
    mark: str = "",
    x: float | None = None,
    train_rows: int | None = None,
) -> Candidate:
    """A candidate of plain options.

    What isn't said is as `lora-jax train` has it, but for LoRA's start, `"kaiming"`, and its `alpha`, twice the rank:
    one rate then suits all ranks.

    Args:
        method: as `training.method_options.make_method` takes it.
        label, series: `None` for names made from the options.
        rates: learning rates; `None` for the method's default times `factors`.
        factors: of the default rate, the first is tried first.
        mark, x, train_rows: as `Candidate` has them.

    Example:
        >>> candidate = make_candidate({"name": "lora", "rank": 4, "targets": ["query", "value"]})
        >>> candidate.label, candidate.series, candidate.rates
        ('LoRA r=4, query+value', 'LoRA, query+value', (0.002, 0.00067, 0.006))
    """
    made = _made(method)
    options = method_options(made)
    rate = default_learning_rate(made)
    return Candidate(
        label=label if label is not None else describe(options),
        method=options,
        rates=tuple(rates) if rates is not None else _rates(rate, factors),
        series=series if series is not None else describe({**options, "rank": None}),
        mark=mark,
        x=x,
        train_rows=train_rows,
    )


def describe(options: Mapping[str, Any]) -> str:
    """A method's options in a few words: its rank and targets, and what else differs from the default."""
    name = options["name"]
    usual = method_options(_made(name))
    words = [str(TITLES.get(name, name))]
    if options.get("rank") is not None:
        words[0] += f" r={options['rank']}"
    if "rank" in usual or options.get("targets") != usual.get("targets"):
        words.append(_names(options.get("targets")))
    if options.get("alpha") is not None and options.get("rank") is not None and options["alpha"] != 2 * options["rank"]:
        words.append(f"alpha {options['alpha']:g}")
    words += [
        f"{key} {_names(value)}"
        for key, value in options.items()
        if key not in ("name", "rank", "targets", "alpha") and value != usual.get(key)
    ]
    return ", ".join(words)


def default_candidates(
    methods: Sequence[str] | None = None, *, ranks: Sequence[int] | None = None, factors: Sequence[float] = RATE_FACTORS
) -> tuple[Candidate, ...]:
    """The grid that is compared where nothing else is chosen.

    Args:
        methods: the methods to take, by name; `None` for the grid's. One that the grid hasn't comes with its defaults.
        ranks: in place of the grid's, for each set of targets.
        factors: of each method's default rate.

    Raises:
        ConfigError: a method that doesn't exist.
    """
    chosen = list(GRID) if methods is None else [options for name in methods for options in _of_name(name)]
    if ranks is not None:
        ranked = {json.dumps({**options, "rank": None}): options for options in chosen if "rank" in options}
        others = [options for options in chosen if "rank" not in options]
        chosen = others + [{**options, "rank": rank} for options in ranked.values() for rank in ranks]
    return tuple(
        make_candidate(options, factors=factors, mark=f"r={options['rank']}" if "rank" in options else "")
        for options in chosen
    )


def read_grid(path: str | Path) -> tuple[Candidate, ...]:
    """Candidates from YAML: a list of method options, each with some of an entry's own.

    These are `label`, `series`, `x` and `train_rows`, as `Candidate` has them, and `lr`, one rate or several. `x` is a
    place on the axis of the preset that the grid stands in for; of an entry with `train_rows` it is these, unless said.

    Raises:
        ConfigError: what isn't such a list; an unknown method or option; an entry is named by its number.
    """
    try:
        entries = read_yaml_file(path)
    except FileError as error:
        raise ConfigError(f"`grid` {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"`grid` {path} must hold a list of methods, one a line: `- {{name: lora, rank: 4}}`.")
    candidates = []
    for number, entry in enumerate(entries, start=1):
        options = dict(entry)
        label, series, rates, x, rows = (options.pop(name, None) for name in _ENTRY)
        try:
            for name, text in (("label", label), ("series", series)):
                if text is not None and not isinstance(text, str):
                    raise ConfigError(f"`{name}` is {text!r}, and a text is expected.")
            if rows is not None and (type(rows) is not int or rows < 1):
                raise ConfigError(f"`train_rows` is {rows!r}, and a whole number of at least 1 is expected.")
            x = rows if x is None else _number("x", x)
            if x is not None and (type(x) not in (int, float) or not 0 < x < math.inf):
                raise ConfigError(f"`x` is {x!r}, and a number above 0 is expected: the axis is logarithmic.")
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


def _made(method: Mapping[str, Any] | str) -> Any:
    options = {"name": method} if isinstance(method, str) else method
    name = options.get("name", "lora")
    usual = dict(_ACROSS_RANKS.get(name, {}))
    rank = options.get("rank")
    if isinstance(rank, int) and "alpha" in DEFAULTS.get(name, {}):
        usual["alpha"] = 2.0 * rank
    return make_method({**usual, **options})


def _of_name(name: str) -> list[Mapping[str, Any]]:
    if name not in METHODS:
        raise ConfigError(f"`methods` has {name!r}, and {', '.join(METHODS)} are known.")
    return [options for options in GRID if options["name"] == name] or [{"name": name, **DEFAULTS[name]}]


def _number(name: str, value: Any) -> Any:
    # YAML reads `1e-3`, without a point, as a text.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ConfigError(f"`{name}` is {value!r}, and a number is expected.") from None


def _names(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return value.replace("all-linear", "all linear") if isinstance(value, str) else str(value)
