"""The settings of a comparison: data, candidates, seeds, and the options that all runs share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lora_jax import data, files
from lora_jax.tools.inspect import MethodReport, inspect_method
from lora_jax.training.baseline import Baseline, baseline_of
from lora_jax.training.config import TrainConfig, check_seed
from lora_jax.training.errors import ConfigError, RunFolderError
from lora_jax.training.examples import Examples
from lora_jax.training.metrics import is_undefined
from lora_jax.training.run.folder import held_alone
from lora_jax.training.run.inputs import base_parts

from .candidates import Candidate, default_candidates
from .paper_presets import PRESETS
from .plan import PlannedRun
from .splits import Splits, comparison_splits, take_rows, write_rows

_VARIED = ("method", "lr", "seed", "output")
_FORMAT = 1
# Suits the few examples; the options of `lora-jax demo`.
_DEMONSTRATION = {"epochs": 5, "batch_size": 16}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings of `compare`.

    Attributes:
        output: Folder of the comparison: a new one, or that of the same comparison, which is resumed.
        options: Options of all runs, as in `TrainConfig`, without method, lr, seed and output. Without `train`, the
            bundled messages are used as a demonstration.
        candidates: Candidates to compare; `None` for those of the preset or the default grid.
        preset: Name in `paper_presets.PRESETS`, which defines candidates, an axis and published figures. `candidates`
            replace those of the preset.
        rate_factors: Multiples of the default rate to try for a preset's candidates; `None` for the preset's own.
        seeds: Seeds of head, factors, order and dropout. Rates are chosen with the first.
        train_rows: Number of training examples to draw; `None` for all.
        dev_share: Share of the training examples that is held out if `options` have no dev.
        data_seed: Seed of both draws.
        minutes: Time limit: a run is started only if it is predicted to end in time; `None` for no limit.
    """

    output: str
    options: Mapping[str, object] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] | None = None
    preset: str | None = None
    rate_factors: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    train_rows: int | None = None
    dev_share: float = 0.2
    data_seed: int = 0
    minutes: float | None = None

    def __post_init__(self) -> None:
        if varied := [name for name in _VARIED if name in self.options]:
            raise ConfigError(
                f"`{varied[0]}` can't be given to a comparison: methods, rates and seeds vary there. Choose them by "
                "`candidates` and `seeds`."
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        if not self.seeds or any(type(seed) is not int or seed < 0 for seed in (*self.seeds, self.data_seed)):
            raise ConfigError(f"`seeds` must be non-negative integers, got {self.seeds!r}.")
        for seed in self.seeds:
            check_seed("seeds", seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"`seeds` must differ, got {self.seeds!r}.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"`minutes` must be a positive number, got {self.minutes!r}.")
        if self.candidates is not None and not self.candidates:
            raise ConfigError("`candidates` must not be empty.")

    @property
    def is_demonstration(self) -> bool:
        return "train" not in self.options


class Prepared(NamedTuple):
    """A comparison whose options and labels have all been checked.

    Attributes:
        settings: The settings as given.
        folder: `settings.output`.
        candidates: Candidates in the order of the tables.
        splits: The examples.
        slices: Slices of the training examples, by their size.
        metric: The metric that quality is measured with.
        reports: What each candidate trains, by its id.
        description: The content of `comparison.json`.
        config: The config that all runs share.
    """

    settings: Comparison
    folder: Path
    candidates: tuple[Candidate, ...]
    splits: Splits
    slices: dict[int, Examples]
    metric: str
    reports: dict[str, MethodReport]
    description: dict[str, object]
    config: TrainConfig

    def baseline(self, split: str) -> Baseline:
        """The scores of giving the most frequent answer of the training data to every example."""
        task, examples = self.splits.task, self.splits.examples
        return baseline_of(task, task.prior(task.encode(examples["train"])), task.encode(examples[split]))

    @property
    def split(self) -> str:
        """The split on which quality is reported: test if there is one."""
        return "test" if "test" in self.splits.examples else "dev"

    def run_folder(self, run: PlannedRun) -> Path:
        return self.folder / "runs" / run.id

    def run_config(self, run: PlannedRun) -> TrainConfig:
        sources = {split: self.source(split) for split in self.splits.examples}
        if run.candidate.train_rows is not None:
            sources["train"] = self.slice_source(run.candidate.train_rows)
        return replace(
            self.config,
            **sources,
            method=dict(run.candidate.method),
            lr=run.rate,
            seed=run.seed,
            output=str(self.run_folder(run)),
        )

    def source(self, split: str) -> str:
        return self.splits.sources.get(split, str(self.folder / "data" / f"{split}.jsonl"))

    def slice_source(self, rows: int) -> str:
        return str(self.folder / "data" / f"train-{rows}.jsonl")


def prepare_comparison(settings: Comparison) -> Prepared:
    """Reads the data and checks every config and every leaf that would be trained. Nothing is written.

    Raises:
        ConfigError: An option is invalid, or a selector matches nothing; the candidate is named.
        DataError: The data can't be used.
        RunFolderError: `settings.output` holds another comparison or other files.
    """
    options = dict(settings.options)
    if settings.is_demonstration:
        options = _DEMONSTRATION | options | {split: str(data.path(split)) for split in ("train", "dev", "test")}
    config = TrainConfig.from_dict({**options, "output": settings.output, "method": "frozen"})
    if config.task == "causal-lm":
        raise ConfigError(
            "`task` must be classification or regression in a comparison, got causal-lm. Compare language models by "
            "separate runs of `lora-jax train`."
        )
    splits = comparison_splits(config, dev_share=settings.dev_share, seed=settings.data_seed)
    task, rows = splits.task, splits.examples["train"]
    if settings.train_rows is not None:
        rows = take_rows(rows, task, settings.train_rows, seed=settings.data_seed)
        sources = {split: source for split, source in splits.sources.items() if split != "train"}
        splits = splits._replace(examples=splits.examples | {"train": rows}, sources=sources)
    candidates = _candidates(settings, len(rows))
    metric = task.check_metric(config.metric)
    for split in ("dev", "test"):
        if split in splits.examples and is_undefined(metric, task.encode(splits.examples[split])):
            raise ConfigError(
                f"`{split}`: {metric} is undefined because all examples have the same target. Use other data, or "
                "another `metric`, such as `loss`."
            )
    # Explicit, so that candidates on fewer examples take as many steps and are evaluated as often as the others.
    epoch = math.ceil(len(rows) / config.batch_size)
    config = replace(
        config, metric=metric, steps=config.steps or config.epochs * epoch, eval_every=config.eval_every or epoch
    )
    reports = {}
    for candidate in candidates:
        try:
            made = replace(config, method=dict(candidate.method), lr=candidate.rates[0])
            reports[candidate.id] = inspect_method(made, num_labels=task.num_labels or 1)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"Candidate {candidate.label!r}: {error}") from error
    slices = {
        count: take_rows(rows, task, count, seed=settings.data_seed)
        for count in {candidate.train_rows for candidate in candidates}
        if count is not None
    }

    folder = Path(settings.output)
    description = {
        "format": _FORMAT,
        "options": {key: value for key, value in config.to_dict().items() if key not in _VARIED},
        "rows": {split: len(examples) for split, examples in splits.examples.items()},
        "content": splits.fingerprints,
        "base": {name.removeprefix("base "): value for name, value in base_parts(config.base).items()},
        "held_out": splits.held_out,
        "train_rows": settings.train_rows,
        "data_seed": settings.data_seed,
    }
    _check_folder(folder, description)
    return Prepared(settings, folder, candidates, splits, slices, metric, reports, description, config)


@contextlib.contextmanager
def started(prepared: Prepared) -> Iterator[None]:
    """Creates the folder with the description and the drawn examples, and locks it for the block.

    Raises:
        RunFolderError: The folder can't be created, or another process is using it.
    """
    folder, drawn = prepared.folder, {}
    for split, examples in prepared.splits.examples.items():
        if split not in prepared.splits.sources:
            drawn[prepared.source(split)] = examples
    for rows, examples in prepared.slices.items():
        drawn[prepared.slice_source(rows)] = examples
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"`output` {folder} can't be created: {error.strerror}.") from error
    with held_alone(folder):
        _check_folder(folder, prepared.description)  # another process may have started meanwhile
        for path, examples in drawn.items():
            write_rows(examples, prepared.config, Path(path))
        files.write_json(folder / "comparison.json", files.with_checksum(prepared.description))
        yield


def _candidates(settings: Comparison, rows: int) -> tuple[Candidate, ...]:
    if settings.candidates is not None:
        candidates = settings.candidates
    elif settings.preset is not None:
        candidates = PRESETS[settings.preset].candidates(rows)
        if settings.rate_factors is not None:
            candidates = tuple(candidate.at(settings.rate_factors) for candidate in candidates)
    else:
        candidates = default_candidates()
    labels = [candidate.label for candidate in candidates]
    ids = [candidate.id for candidate in candidates]
    for number, candidate in enumerate(candidates):
        if labels.index(candidate.label) < number:
            raise ConfigError(f"Two candidates are called {candidate.label!r}: give one of them another `label`.")
        if (first := ids.index(ids[number])) < number:
            raise ConfigError(f"{candidate.label!r} is the same as {labels[first]!r}: remove one of them.")
    return candidates


def _check_folder(folder: Path, description: Mapping[str, object]) -> None:
    """Raises if a folder holds something else, and shows what differs."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"`output` {folder} must be a folder, not a file.")
    path = folder / "comparison.json"
    if not path.exists():
        # A process that was killed at its start may have left these.
        begun = ("runs", "data")
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if held := [name for name in names if name not in begun]:
            raise RunFolderError(
                f"`output` {folder} holds other files ({', '.join(held[:5])}): choose a new or an empty folder."
            )
        return
    earlier = files.read_json(path)
    if (
        not isinstance(earlier, dict)
        or earlier.get("format") != _FORMAT
        or not isinstance(earlier.get("options"), dict)
    ):
        raise RunFolderError(f"`output` {folder} holds a comparison of another version: choose a new folder.")
    earlier = files.without_checksum(earlier, path)
    if "base" not in earlier:  # written by an earlier version
        description = {name: value for name, value in description.items() if name != "base"}
    # An option that the earlier version lacked had its default.
    defaults = {option.name: option.default for option in fields(TrainConfig) if option.default is not MISSING}
    theirs = _flat(earlier | {"options": defaults | earlier["options"]})
    mine = _flat(description)
    if different := [key for key in mine if mine[key] != theirs.get(key)]:
        shown = "; ".join(f"`{key}` is {theirs.get(key)!r} there and {mine[key]!r} here" for key in different[:4])
        raise RunFolderError(
            f"`output` {folder} holds another comparison: {shown}. Choose another folder, or use the same options to "
            "resume that one (candidates, rates, seeds and minutes may differ)."
        )


def _flat(description: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in description.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat
