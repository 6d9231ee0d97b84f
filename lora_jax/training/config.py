"""Every choice of a training run, in one frozen object that a YAML file can hold."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lora_jax import LoRA, files
from lora_jax.text import clipped, nearest_name

from .errors import ConfigError
from .examples import Columns
from .method_options import default_learning_rate, make_method, method_name, method_options
from .task import KINDS, Kind
from .yaml_file import read_yaml_file

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "bfloat16")
POOLINGS = ("first", "mean")
Remat = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]

# Options that have a meaning for some tasks only.
_OF_TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("text_pair", "label", "pooling"), ("classification", "regression")),
    **dict.fromkeys(("prompt", "completion", "separator", "messages", "packing", "label_smoothing"), ("causal-lm",)),
}
_LENGTHS = {"classification": 128, "regression": 128, "causal-lm": 512}

_LARGEST_SEED = 2**63 - 1

# What doesn't change the result: a run with other values of these is the same run.
_PRESENTATION = ("output", "log_every", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        train: a data file (`.tsv`, `.csv`, `.jsonl`, `.parquet`) or a hub data set (`owner/name:subset@split`).
        output: the run's folder.
        dev: data that chooses the best checkpoint; without it the last is taken.
        test: data that the chosen checkpoint is scored on, once.
        text, text_pair, label: column names.
        prompt, completion: column names of a language model's prompts and what is to follow them: the loss is on the
            completion and the end-of-text after it. Without them, and without `messages`, all of `text` is learnt.
        separator: what stands between a prompt and its completion.
        messages: the column of conversations, lists of `{"role": ..., "content": ...}`: the loss is on what the
            assistant says.
        skip_bad_rows: whether rows that can't be used (not UTF-8, a wrong number of fields, no text, no label) are
            left out and counted; otherwise they are refused, all at once.
        task: `"classification"`, `"regression"` or `"causal-lm"`.
        base: a known name, a hub name or a folder; for a language model it must be given.
        pooling: what the head sees: the `"first"` token (in BERT through the pooler) or the `"mean"` of all.
        method: one of `lj.Frozen`, `lj.BitFit`, `lj.LoRA`, `lj.FullFineTune`; or its options as a mapping
            (`{"name": "lora", "rank": 4}`).
        max_length: tokens of a row, at most the model's positions; longer texts are cut, counted and reported. `None`
            for 128, or 512 for a language model, whose rows may hold several texts.
        escape_special_tokens: Whether special tokens that a text or a message spells out (`</s>`, `<|im_end|>`) are
            taken as plain text; otherwise they are control tokens, and a note says where there are some.
        packing: whether a language model's rows hold as many texts as fit, which don't see each other.
        dropout: of the model's hidden states and attention while training, in place of the base's own rates; `None`
            for those. (LoRA's is an option of the method.)
        dtype: of the frozen base: `"float32"` or `"bfloat16"`.
        epochs: how often every row is seen, unless `steps` says how many batches.
        batch_size: rows of one optimizer step.
        accumulate: computes a step in this many parts, one after the other: less memory, the same result.
        remat: what of a layer is kept for the backward pass, see `lj.models.load`: less memory, the same result.
        lr: the peak learning rate of AdamW, or one for each label (`{"lora_a": 1e-3, "lora_b": 4e-3, "head": 1e-3}`);
            `None` takes the method's.
        lora_plus_ratio: LoRA+: how many times `lr` the rate of LoRA's or DoRA's `B` is; `None` for the same rate as
            that of `A` and the head. The paper (arXiv:2402.12354) takes 16, with an `lr` below LoRA's.
        weight_decay: decoupled, on every trainable leaf, biases and norms too, as `torch.optim.AdamW` does with one
            group of parameters; or one for each label.
        warmup: the share of the steps in which the rate rises linearly from 0.
        schedule: then it falls to 0 as a line or half a cosine, or stays.
        label_smoothing: of a language model's training loss, see `CausalLM`.
        clip_norm: the global norm of the trainable leaves' gradient is cut to this; `None` for no clipping.
        buckets: the most lengths that batches are padded to, one compiled program each; `None` for as many as pay in
            a run of this length.
        seed: of the head, the factors, the order and the dropout.
        metric: that `dev` chooses by; `None` takes accuracy, Pearson's correlation or perplexity.
        eval_every: steps between evaluations and checkpoints; `None` for once an epoch.
        log_every: steps between rows of `metrics.jsonl`.
        tensorboard: whether to write scalars for TensorBoard too.
    """

    train: str
    output: str
    dev: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    separator: str = "\n"
    messages: str | None = None
    skip_bad_rows: bool = False
    task: Kind = "classification"
    base: str = DEFAULT_BASE
    pooling: Literal["first", "mean"] = "first"
    method: Any = "lora"
    max_length: int | None = None
    escape_special_tokens: bool = False
    packing: bool = True
    dropout: float | None = None
    dtype: str = "float32"
    epochs: int = 4
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    remat: Remat | None = None
    lr: float | Mapping[str, float] | None = None
    lora_plus_ratio: float | None = None
    weight_decay: float | Mapping[str, float] = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    label_smoothing: float = 0.0
    clip_norm: float | None = 1.0
    buckets: int | None = None
    seed: int = 0
    metric: str | None = None
    eval_every: int | None = None
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "output", "text", "label", "base"):
            _check_text(name, getattr(self, name))
        for name in ("dev", "test", "text_pair", "prompt", "completion", "messages", "metric"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name, choices in (
            ("task", KINDS),
            ("pooling", POOLINGS),
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("escape_special_tokens", (True, False)),
            ("packing", (True, False)),
            ("skip_bad_rows", (True, False)),
            ("tensorboard", (True, False)),
        ):
            _check_choice(name, getattr(self, name), choices)
        if not isinstance(self.separator, str):
            raise ConfigError(f"`separator` is {self.separator!r}, and a text is expected.")
        self._check_task()
        if self.remat is not None:
            _check_choice("remat", self.remat, get_args(Remat))
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1)):
            _check_int(name, getattr(self, name), least)
        for name in ("steps", "eval_every", "buckets"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.max_length is None:
            object.__setattr__(self, "max_length", _LENGTHS[self.task])
        _check_int("max_length", self.max_length, 4)
        check_seed("seed", self.seed)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"`accumulate` is {self.accumulate}, which doesn't divide `batch_size` {self.batch_size}: a step is "
                "computed in equal parts."
            )
        if isinstance(self.method, (str, Mapping)):
            object.__setattr__(self, "method", make_method(self.method, self.task))
        if self.lr is None:
            object.__setattr__(self, "lr", default_learning_rate(self.method, self.task))
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, {label: _number(f"{name}.{label}", v) for label, v in value.items()})
            else:
                object.__setattr__(self, name, _number(name, value))
        if self.lora_plus_ratio is not None:
            self._check_lora_plus()
        for name in ("dropout", "warmup", "label_smoothing"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _number(name, getattr(self, name), below=1.0))
        if self.clip_norm is not None:
            object.__setattr__(self, "clip_norm", _number("clip_norm", self.clip_norm))
            if self.clip_norm == 0:
                raise ConfigError("`clip_norm` is 0, which would stop all learning: leave it out for no clipping.")

    def _check_task(self) -> None:
        """Refuses options that mean nothing for the task, or that lack another."""
        for option in dataclasses.fields(self):
            if getattr(self, option.name) != option.default:
                check_option(option.name, self.task)
        check_columns(self.columns)
        if self.task == "causal-lm" and self.base == DEFAULT_BASE:
            raise ConfigError(
                "`base` is needed for causal-lm: a decoder's folder or hub name (gpt2, meta-llama/..., Qwen/...). The "
                "default base is an encoder."
            )

    def _check_lora_plus(self) -> None:
        """A ratio needs two rates that one number sets."""
        object.__setattr__(self, "lora_plus_ratio", _number("lora_plus_ratio", self.lora_plus_ratio))
        if self.lora_plus_ratio == 0:
            raise ConfigError("`lora_plus_ratio` is 0, and `b` starts at zero, so that nothing would be learnt by it.")
        if not isinstance(self.method, LoRA) or self.method.freeze_a:
            name = method_name(self.method) + (" with `freeze_a`" if isinstance(self.method, LoRA) else "")
            raise ConfigError(
                f"`lora_plus_ratio` is between the rates of LoRA's two factors, and {name} doesn't train them: leave "
                "it out, or choose lora or dora."
            )
        if isinstance(self.lr, Mapping):
            raise ConfigError(
                "`lora_plus_ratio` multiplies one `lr`, and there is one for each label: leave it out, and give "
                "`lora_b` its own."
            )

    @property
    def columns(self) -> Columns:
        """Which columns of the data are read."""
        return Columns(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Columns)})

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """The config of these options; an unknown one is named, and so is the nearest known."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in options if key not in names]:
            near = nearest_name(unknown[0], names)
            hint = f"; the nearest is `{near}`" if near else f". Known are {', '.join(names)}"
            raise ConfigError(f"`{clipped(unknown[0])}` is no option of a training run{hint}.")
        if missing := [name for name in ("train", "output") if options.get(name) is None]:
            raise ConfigError(f"`{missing[0]}` is missing: a run needs the option `{missing[0]}`.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Every option, in plain types."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return options | {"method": method_options(self.method)}

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """`{option: (mine, other's)}` where the two would not give the same result."""
        mine, others = _flat(self.to_dict()), _flat(other.to_dict())
        keys = [key for key in {**mine, **others} if key not in _PRESENTATION]
        return {key: (mine.get(key), others.get(key)) for key in keys if mine.get(key) != others.get(key)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, read safely: see `read_yaml_file`."""
    try:
        options = read_yaml_file(path)
    except files.FileError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path} must hold options, one a line (`train: data.tsv`).")
    return options


def write_yaml(path: str | Path, config: TrainConfig) -> None:
    """Writes the resolved options, atomically."""
    files.write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=120))


def check_seed(name: str, value: object) -> None:
    """Refuses what `jax.random.key` takes no seed from."""
    _check_int(name, value, 0)
    assert isinstance(value, int)
    if value > _LARGEST_SEED:
        raise ConfigError(f"`{name}` is {value!r:.80}, and a whole number below 2**63 is expected.")


def check_option(name: str, task: str) -> None:
    """Refuses an option that means nothing for a task."""
    tasks = _OF_TASKS.get(name, KINDS)
    if task not in tasks:
        raise ConfigError(
            f"`{name}` is for {' and '.join(tasks)}, and `task` is {task}: leave it out, or choose another `task`."
        )


def check_columns(columns: Columns) -> None:
    """Refuses a prompt without a completion, and prompts beside conversations."""
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if getattr(columns, one) is not None and getattr(columns, other) is None:
            raise ConfigError(f"`{one}` is given without `{other}`: name the columns of both.")
    if columns.messages is not None and columns.prompt is not None:
        raise ConfigError("`messages` are whole conversations: leave out `prompt` and `completion`, or `messages`.")


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"`{name}` is {value!r:.200}, and a non-empty text is expected.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # of a command line that isn't UTF-8
        raise ConfigError(
            f"`{name}` {value!r:.200} isn't UTF-8: rename it, or set `PYTHONUTF8=1` where the locale isn't."
        )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or type(value) is not type(choices[0]):
        raise ConfigError(f"`{name}` is {value!r:.200}, and one of {', '.join(map(str, choices))} is expected.")


def _check_int(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"`{name}` is {value!r:.200}, and a whole number of at least {least} is expected.")


def _number(name: str, value: object, *, below: float = math.inf) -> float:
    # YAML reads `1e-3`, without a point, as a text.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"`{name}` is {value!r:.200}, and a number of at least 0{limit} is expected.")
    return float(value)
