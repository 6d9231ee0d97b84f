"""The options of a run: `TrainConfig` is what was asked for, `RunConfig` what `resolve` settled."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_jax import LoRA
from lora_jax.methods import Method
from lora_jax.text import clipped, nearest_name

from .errors import ConfigError
from .examples import Columns
from .method_options import default_learning_rate, make_method, method_name, method_options
from .options import CAUSAL_LM, LABELLED, TASKS, Option, TaskKind, about, documentation, option, options_of

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
Pooling = Literal["first", "mean"]
Remat = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]

_MAX_LENGTHS = {"classification": 128, "regression": 128, "causal-lm": 512}
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Options that no run could have are refused when the config is made."""

    train: str = field(
        metadata=about(
            "data",
            "Training data: a file (.tsv with a header and no quoting, .csv, .jsonl, .parquet; .txt for causal-lm) or "
            "a hub data set as owner/name:subset@split.",
            unit="DATA",
        )
    )
    dev: str | None = option(
        None, "data", "Data that the best checkpoint is chosen on; without it the last one is taken.", unit="DATA"
    )
    test: str | None = option(None, "data", "Data that the chosen checkpoint is scored on, once.", unit="DATA")
    task: TaskKind = option(
        "classification", "data", "Task: predicting labels, numbers or the next token.", unit="TASK"
    )
    text: str = option("text", "data", "Column of the texts.", unit="COLUMN")
    text_pair: str | None = option(
        None, "data", "Column of the second texts, for tasks on pairs.", unit="COLUMN", tasks=LABELLED
    )
    label: str = option("label", "data", "Column of the labels.", unit="COLUMN", tasks=LABELLED)
    prompt: str | None = option(
        None, "data", "Column of the prompts, which have no part in the loss.", unit="COLUMN", tasks=CAUSAL_LM
    )
    completion: str | None = option(
        None,
        "data",
        "Column of the completions; the loss is on these and the end-of-text token. Without `completion` and "
        "`messages` it is on all of `text`.",
        unit="COLUMN",
        tasks=CAUSAL_LM,
    )
    messages: str | None = option(
        None,
        "data",
        'Column of conversations, lists of {"role": ..., "content": ...}; the loss is on what the assistant says.',
        unit="COLUMN",
        tasks=CAUSAL_LM,
    )
    max_length: int | None = option(
        None,
        "data",
        "Maximum length of a sequence in tokens, at most the model's positions; longer texts are cut and counted.",
        unit="N",
        shown="128, or 512 for causal-lm",
        least=4,
    )
    skip_bad_rows: bool = option(
        False,
        "data",
        "Whether to leave out and count rows that can't be used (not UTF-8, a wrong number of fields, no text, no "
        "label); by default they are refused, all at once.",
    )
    separator: str = option(
        "\n",
        "data",
        "Text between a prompt and its completion.",
        unit="TEXT",
        shown=r"a line end, \n",
        tasks=CAUSAL_LM,
        rare=True,
    )
    escape_special_tokens: bool = option(
        False,
        "data",
        "Whether to take special tokens that a text spells out (</s>, <|im_end|>) as plain text; by default they "
        "act as control tokens, and a note says where there are some.",
        rare=True,
    )
    packing: bool = option(
        True,
        "data",
        "Whether to pack several texts into a sequence; they don't attend to each other.",
        tasks=CAUSAL_LM,
        rare=True,
    )

    base: str = option(
        DEFAULT_BASE,
        "model",
        "Base model: a known name, a hub name or a folder. For causal-lm a decoder must be given.",
        unit="MODEL",
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "model", "Data type of the frozen parameters.", unit="DTYPE"
    )
    pooling: Pooling = option(
        "first",
        "model",
        "Input of the head, the first token (in BERT through the pooler) or the mean of all.",
        unit="NAME",
        tasks=LABELLED,
        rare=True,
    )
    dropout: float | None = option(
        None,
        "model",
        "Dropout rate of the hidden states and the attention in training. LoRA's is an option of the method.",
        unit="P",
        shown="the base model's rates",
        rare=True,
        below=1.0,
    )
    remat: Remat | None = option(
        None,
        "model",
        "Activations of a layer that are kept for the backward pass; fewer save memory and give the same result.",
        unit="POLICY",
        shown="all are kept",
        rare=True,
    )

    method: Method | Mapping[str, object] | str = option(
        "lora",
        "method",
        'Fine-tuning method: one of lora_jax, its name, or its options as a mapping ({"name": "lora", "rank": 4}).',
        unit="NAME",
    )

    epochs: int = option(
        4, "optimization", "Number of passes over the training data, unless `steps` is given.", unit="N"
    )
    steps: int | None = option(None, "optimization", "Number of optimizer steps, in place of `epochs`.", unit="N")
    batch_size: int = option(32, "optimization", "Sequences per optimizer step.", unit="N")
    lr: float | Mapping[str, float] | None = option(
        None,
        "optimization",
        "Peak learning rate of AdamW; one value, or one per label (lora_a, lora_b, head, …).",
        unit="RATE",
        shown="the method's, 5e-4 for lora and 1e-4 for full",
    )
    weight_decay: float | Mapping[str, float] = option(
        0.01,
        "optimization",
        "Decoupled weight decay of AdamW on every trained leaf, biases and norms too; one value, or one per label.",
        unit="RATE",
    )
    warmup: float = option(
        0.06, "optimization", "Share of the steps in which the learning rate rises from 0.", unit="SHARE", below=1.0
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "optimization", "Learning-rate schedule after the warm-up; linear and cosine end at 0.", unit="NAME"
    )
    seed: int = option(
        0, "optimization", "Seed of the head, the factors, the order of the data and dropout.", unit="N", least=0
    )
    accumulate: int = option(
        1,
        "optimization",
        "Number of equal parts that a batch is computed in, one after the other; more save memory and give the "
        "same result.",
        unit="N",
        rare=True,
    )
    clip_norm: float | None = option(
        1.0,
        "optimization",
        "Largest global norm of the gradient; larger ones are scaled down to it.",
        unit="NORM",
        rare=True,
    )
    lora_plus_ratio: float | None = option(
        None,
        "optimization",
        "Ratio of the learning rate of B to that of A in LoRA and DoRA (LoRA+; its paper, arXiv:2402.12354, takes "
        "16 with a lower `lr`).",
        unit="RATIO",
        shown="1",
        rare=True,
    )
    label_smoothing: float = option(
        0.0,
        "optimization",
        "Label smoothing ε of the training loss; metrics are without.",
        unit="E",
        tasks=CAUSAL_LM,
        rare=True,
        below=1.0,
    )
    buckets: int | None = option(
        None,
        "optimization",
        "Maximum number of lengths that batches are padded to, each a program to compile.",
        unit="N",
        shown="as many as save more time than they take to compile",
        rare=True,
    )

    metric: str | None = option(
        None,
        "evaluation",
        "Metric on `dev` that the checkpoint is chosen by.",
        unit="NAME",
        shown="accuracy, pearson or perplexity, by task",
    )
    eval_every: int | None = option(
        None, "evaluation", "Steps between evaluations, and between checkpoints.", unit="N", shown="one epoch"
    )

    output: str = field(
        metadata=about(
            "output",
            "Folder of the run: a new one, or that of the same run to resume.",
            unit="FOLDER",
            changes_result=False,
        )
    )
    log_every: int = option(
        10, "output", "Steps between rows of metrics.jsonl.", unit="N", rare=True, changes_result=False
    )
    tensorboard: bool = option(
        False, "output", "Whether to write scalars for TensorBoard.", rare=True, changes_result=False
    )

    def __post_init__(self) -> None:
        resolve(self)

    @property
    def columns(self) -> Columns:
        """Columns of the data that are read."""
        return Columns(**{column.name: getattr(self, column.name) for column in dataclasses.fields(Columns)})

    @property
    def sources(self) -> dict[str, str]:
        """The data by split, as far as it is given."""
        given = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: source for split, source in given.items() if source is not None}

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> TrainConfig:
        """The config of these options; an unknown one is refused with the nearest known."""
        if unknown := [key for key in options if key not in OPTIONS]:
            near = nearest_name(unknown[0], OPTIONS)
            hint = f"; the nearest is '{near}'" if near else f". Known are {', '.join(OPTIONS)}"
            raise ConfigError(f"'{clipped(unknown[0])}' is no option of a training run{hint}.")
        if missing := [name for name in ("train", "output") if options.get(name) is None]:
            raise ConfigError(f"`{missing[0]}` is missing, and every run needs it.")
        given: Mapping[str, Any] = options
        return TrainConfig(**given)

    def to_dict(self) -> dict[str, object]:
        """Every option as it is settled, in plain types."""
        settled = resolve(self)
        options: dict[str, object] = {name: getattr(settled, name) for name in OPTIONS}
        return options | {"method": method_options(settled.method)}

    def differences(self, other: TrainConfig) -> dict[str, tuple[object, object]]:
        """`{option: (mine, the other's)}` where the two would not give the same result."""
        mine, others = _flat(self.to_dict()), _flat(other.to_dict())
        keys = [key for key in {**mine, **others} if key not in OPTIONS or OPTIONS[key].about.changes_result]
        return {key: (mine.get(key), others.get(key)) for key in keys if mine.get(key) != others.get(key)}


OPTIONS = options_of(TrainConfig)
TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n\n{documentation(OPTIONS)}"


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """A config as `resolve` settled it, the one that a run works with and keeps: no choice is left open.

    Attributes:
        method: Method, made of its name or options.
        max_length: Maximum length of a sequence in tokens.
        lr: Peak learning rate; one value, or one per label.
    """

    method: Method = field()
    max_length: int = field()
    lr: float | Mapping[str, float] = field()

    def __post_init__(self) -> None:
        """Nothing is left to check."""


def resolve(config: TrainConfig) -> RunConfig:
    """The config that a run works with: checked, its method made, and numbers that YAML reads as texts converted.

    Raises:
        ConfigError: An option that is of the wrong type, out of range or at odds with another.
    """
    if isinstance(config, RunConfig):
        return config
    asked = {name: getattr(config, name) for name in OPTIONS}
    settled = {name: _checked(described, asked[name]) for name, described in OPTIONS.items()}
    for name, described in OPTIONS.items():
        if asked[name] != described.default:
            check_option(name, config.task)
    check_columns(config.columns)
    check_seed("seed", config.seed)
    if config.task == "causal-lm" and config.base == DEFAULT_BASE:
        raise ConfigError(
            "`base` is needed for causal-lm: a decoder's folder or hub name (gpt2, meta-llama/..., Qwen/...). The "
            "default base is an encoder."
        )
    if config.batch_size % config.accumulate:
        raise ConfigError(
            f"`accumulate` must divide `batch_size` {config.batch_size}, got {config.accumulate}: a step is computed "
            "in equal parts."
        )
    if settled["clip_norm"] == 0:
        raise ConfigError("`clip_norm` must be above 0, got 0: choose None for no clipping.")
    asked_method = config.method
    method = make_method(asked_method, config.task) if isinstance(asked_method, str | Mapping) else asked_method
    rate = default_learning_rate(method, config.task)  # refuses what is no method
    if settled["lr"] is None:
        settled["lr"] = rate
    if settled["lora_plus_ratio"] is not None:
        _check_lora_plus(settled["lora_plus_ratio"], settled["lr"], method)
    if settled["max_length"] is None:
        settled["max_length"] = _MAX_LENGTHS[config.task]
    fields: dict[str, Any] = settled | {"method": method}
    return RunConfig(**fields)


def _check_lora_plus(ratio: object, lr: object, method: Method) -> None:
    """A ratio needs two rates that one number sets."""
    if ratio == 0:
        raise ConfigError("`lora_plus_ratio` must be above 0, got 0: B starts at zero and would stay there.")
    if not isinstance(method, LoRA) or method.freeze_a:
        name = method_name(method) + (" with `freeze_a`" if isinstance(method, LoRA) else "")
        raise ConfigError(
            f"`lora_plus_ratio` is the ratio of the rates of LoRA's two factors, and {name} doesn't train both: leave "
            "it out, or choose lora or dora."
        )
    if isinstance(lr, Mapping):
        raise ConfigError(
            "`lora_plus_ratio` multiplies a single `lr`, and there is one per label: leave it out, and give `lora_b` "
            "its own rate."
        )


def check_seed(name: str, value: object) -> None:
    """Refuses what `jax.random.key` takes no seed from."""
    if _integer(name, value, 0) > _LARGEST_SEED:
        raise ConfigError(f"`{name}` must be an integer below 2**63, got {value!r:.80}.")


def check_option(name: str, task: str) -> None:
    """Refuses an option that means nothing for a task."""
    tasks = OPTIONS[name].about.tasks if name in OPTIONS else TASKS
    if task not in tasks:
        raise ConfigError(
            f"`{name}` is for {' and '.join(tasks)}, and `task` is {task}: leave it out, or choose another `task`."
        )


def check_columns(columns: Columns) -> None:
    """Refuses a prompt without a completion, and prompts beside conversations."""
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if getattr(columns, one) is not None and getattr(columns, other) is None:
            raise ConfigError(f"`{one}` is given without `{other}`: name both columns.")
    if columns.messages is not None and columns.prompt is not None:
        raise ConfigError("`messages` are whole conversations: leave out `prompt` and `completion`, or `messages`.")


def _flat(options: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _checked(described: Option, value: object) -> object:
    """The value of an option, if it is of its type and in its range; a number as a float where it is one."""
    name, about = described.name, described.about
    if (value is None and described.is_optional) or name == "method":
        return value
    if described.choices or bool in described.types:
        choices = described.choices or (True, False)
        if value not in choices or type(value) is not type(choices[0]):
            raise ConfigError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r:.200}.")
        return value
    if float in described.types:
        if isinstance(value, Mapping):
            return {label: _number(name, number, about.below, f" for '{label}'") for label, number in value.items()}
        return _number(name, value, about.below)
    return _integer(name, value, about.least) if int in described.types else _text(name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not (value or name == "separator"):
        kind = "string" if name == "separator" else "non-empty string"
        raise ConfigError(f"`{name}` must be a {kind}, got {value!r:.200}.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # of a command line that isn't UTF-8
        raise ConfigError(
            f"`{name}` {value!r:.200} isn't UTF-8: rename it, or set `PYTHONUTF8=1` where the locale isn't UTF-8."
        )
    return value


def _integer(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"`{name}` must be an integer of at least {least}, got {value!r:.200}.")
    return value


def _number(name: str, value: object, below: float = math.inf, where: str = "") -> float:
    number = value
    # YAML reads `1e-3`, without a point, as a text.
    if isinstance(number, str):
        with contextlib.suppress(ValueError):
            number = float(number)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"`{name}` must be a number of at least 0{limit}, got {value!r:.200}{where}.")
    return float(number)
