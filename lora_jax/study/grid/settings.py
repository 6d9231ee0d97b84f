"""What a comparison is of: its data, its candidates, its seeds, and what all runs share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from .splits import Splits, read_splits, take_rows, write_rows

_VARIED = ("method", "lr", "seed", "output")
_FORMAT = 1
# Few rows want small batches: these are the options of `lora-jax demo`.
_DEMONSTRATION = {"epochs": 5, "batch_size": 16}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings of `compare`.

    Attributes:
        output: the folder of the comparison: new, or that of the same one, which goes on.
        options: of all runs, as `TrainConfig` has them, without method, lr, seed and output. Without `train` the
            shipped messages are used, a demonstration.
        candidates: what is compared; `None` for the preset's or the default grid.
        preset: a name in `presets.PRESETS`, which brings candidates, an axis and published figures. With `candidates`
            too, these stand in for its own.
        rate_factors: of the default rate of each of a preset's candidates, those to try; `None` for the usual ones.
        seeds: of head, factors, order and dropout. Rates are chosen with the first.
        train_rows: of the training rows, so many are drawn; `None` for all.
        dev_share: of the training rows, held out where `options` have no dev.
        data_seed: of both draws.
        minutes: a run is started only if it is predicted to end within them; `None` for no limit.
    """

    output: str
    options: Mapping[str, Any] = field(default_factory=dict)
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
                "`candidates` and `seeds` (`--methods`, `--grid`, `--seeds`)."
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"`preset` is {self.preset!r}, and one of {', '.join(PRESETS)} is expected.")
        if not self.seeds or any(type(seed) is not int or seed < 0 for seed in (*self.seeds, self.data_seed)):
            raise ConfigError(f"`seeds` are {self.seeds!r}, and whole numbers of at least 0 are expected.")
        for seed in self.seeds:
            check_seed("seeds", seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"`seeds` are {self.seeds!r}, and each is expected once.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"`minutes` is {self.minutes!r}, and a number above 0 is expected.")
        if self.candidates is not None and not self.candidates:
            raise ConfigError("`candidates` is empty: at least one is expected.")

    @property
    def is_demonstration(self) -> bool:
        return "train" not in self.options


class Prepared(NamedTuple):
    """A comparison whose every option and label has been checked.

    Attributes:
        settings: as given.
        folder: `settings.output`.
        candidates: in the order of the tables.
        splits: the rows.
        slices: of the training rows, by how many.
        metric: the quality.
        reports: what each candidate trains, by its id.
        description: what `comparison.json` holds.
        config: what all runs share.
    """

    settings: Comparison
    folder: Path
    candidates: tuple[Candidate, ...]
    splits: Splits
    slices: dict[int, Examples]
    metric: str
    reports: dict[str, MethodReport]
    description: dict[str, Any]
    config: TrainConfig

    def baseline(self, split: str) -> Baseline:
        """What the answer that is most frequent in the training rows scores, given to every row."""
        task, examples = self.splits.task, self.splits.examples
        return baseline_of(task, task.prior(task.encode(examples["train"])), task.encode(examples[split]))

    @property
    def split(self) -> str:
        """Where quality is reported: test where there is one."""
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


def prepare(settings: Comparison) -> Prepared:
    """Reads the data, makes every config and finds every leaf that would be trained. Nothing is written.

    Raises:
        ConfigError, ValueError: a wrong option, or a selector that matches nothing; the candidate is named.
        DataError: data that can't be used.
        RunFolderError: `settings.output` holds another comparison or other files.
    """
    options = dict(settings.options)
    if settings.is_demonstration:
        options = _DEMONSTRATION | options | {split: str(data.path(split)) for split in ("train", "dev", "test")}
    config = TrainConfig.from_dict({**options, "output": settings.output, "method": "frozen"})
    if config.task == "causal-lm":
        raise ConfigError(
            "`task` is causal-lm, and comparisons are of classifications and regressions: compare language models by "
            "one `lora-jax train` each."
        )
    splits = read_splits(config, dev_share=settings.dev_share, seed=settings.data_seed)
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
                f"`{split}`: {metric} is undefined, as all rows have one target. Give rows that differ, or choose "
                "another `metric`, such as `loss`."
            )
    # Written out, so that candidates on fewer rows take as many steps and are evaluated as often as the others.
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
    """Makes the folder, and writes what the comparison is of and the rows that were drawn for it; for the block, no
    other process works there.

    Raises:
        RunFolderError: the folder can't be made, or another process is at work in it.
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
        raise RunFolderError(f"`output` {folder} can't be made: {error.strerror}.") from error
    with held_alone(folder):
        _check_folder(folder, prepared.description)  # another may have begun since
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
    for place, candidate in enumerate(candidates):
        if labels.index(candidate.label) < place:
            raise ConfigError(f"Two candidates are called {candidate.label!r}: give one another `label`.")
        if (first := ids.index(ids[place])) < place:
            raise ConfigError(f"{candidate.label!r} is {labels[first]!r} again: leave one out.")
    return candidates


def _check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Refuses a folder that holds something else, and shows what differs."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"`output` {folder} is a file, and a folder is expected.")
    path = folder / "comparison.json"
    if not path.exists():
        # What a process that was killed while it began may have left.
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
    if "base" not in earlier:  # of an earlier version
        description = {name: value for name, value in description.items() if name != "base"}
    # An option that the earlier version didn't have was as it is by default.
    defaults = {option.name: option.default for option in fields(TrainConfig) if option.default is not MISSING}
    theirs = _flat(earlier | {"options": defaults | earlier["options"]})
    mine = _flat(description)
    if different := [key for key in mine if mine[key] != theirs.get(key)]:
        shown = "; ".join(f"`{key}` is {theirs.get(key)!r} there and {mine[key]!r} here" for key in different[:4])
        raise RunFolderError(
            f"`output` {folder} holds another comparison: {shown}. Choose another folder, or the same options to go on "
            "with that one (candidates, rates, seeds and minutes may differ)."
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in description.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat
