"""Flags that commands share, and how they become a `TrainConfig`; a flag not given leaves the file's value."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .method_flags import add_method_flags, method_choices, method_options
from .parser import in_flags

if TYPE_CHECKING:
    from lora_jax.inference.complete import GenerationOptions
    from lora_jax.training import TrainConfig
    from lora_jax.training.examples import Columns
    from lora_jax.training.options import Option
    from lora_jax.training.task_file import TaskFile

# What all runs of a comparison share, and what a saved adapter brings along.
LOOP = (
    *("epochs", "steps", "batch_size", "accumulate", "remat", "weight_decay", "warmup", "schedule", "label_smoothing"),
    *("clip_norm", "dropout", "buckets", "metric", "eval_every"),
)
DATA = ("train", "dev", "test", "task", "max_length", "packing")
COLUMNS = (
    *("text", "text_pair", "label", "prompt", "completion", "messages", "skip_bad_rows", "separator"),
    "escape_special_tokens",
)
BASE = ("base", "dtype", "pooling")


def add_run_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Flags of a run's options, as their fields describe them: the common ones by group, then the rare ones."""
    from lora_jax.training.config import OPTIONS
    from lora_jax.training.options import GROUPS

    wanted = set(names)
    for title, rare in (("{}", False), ("{}, rarely needed", True)):
        for group in GROUPS:
            chosen = [
                option
                for name, option in OPTIONS.items()
                if name in wanted and (option.about.group, option.about.rare) == (group, rare)
            ]
            if chosen:
                section = parser.add_argument_group(title.format(group))
                for option in chosen:
                    _add_option(section, option)
                if "method" in [option.name for option in chosen]:
                    add_method_flags(section, rare=False)
    if "method" in wanted:
        add_method_flags(parser.add_argument_group("method, options of particular methods"), rare=True)


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """Columns of data for a saved adapter, which keeps those of its training."""
    from lora_jax.training.config import OPTIONS

    section = parser.add_argument_group("columns", "The default of each is its value in training.")
    for name in COLUMNS:
        about = dataclasses.replace(OPTIONS[name].about, shown="")
        _add_option(section, OPTIONS[name]._replace(about=about, default=None))


def _add_option(parser: argparse._ActionsContainer, option: Option) -> None:
    flag, about = f"--{option.name.replace('_', '-')}", option.about
    text = option.describe()
    if bool in option.types:
        text = text.removeprefix("Whether to ")
        _add(parser, flag, action=argparse.BooleanOptionalAction, help=_help(text[0].upper() + text[1:]))
        return
    if option.name == "method":
        _add(parser, flag, **method_choices(), metavar=about.unit)
        return
    if len(about.tasks) == 1:
        text = f"({about.tasks[0]}) {text}"
    if option.choices:
        _add(parser, flag, choices=option.choices, metavar=about.unit, help=_help(text))
    else:
        _add(parser, flag, type=_value(option), metavar=about.unit, help=_help(text))


def _value(option: Option) -> Callable[[str], object]:
    """How the text after a flag is read."""
    if option.name == "separator":
        return _with_line_ends
    if Mapping in option.types:
        return _rate
    kind = next((kind for kind in (int, float) if kind in option.types), None)
    if kind is None:
        return str
    return _optional(kind) if option.is_optional else kind


def _help(text: str) -> str:
    """A description as help: arguments as flags, and nothing that argparse would format."""
    names = {name: f"--{name.replace('_', '-')}" for name in re.findall(r"`([a-z_]+)`", text)}
    return in_flags(text, names).replace("`", "").replace("%", "%%")


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


def add_base_flag(parser: argparse._ActionsContainer) -> None:
    """The base of a saved adapter."""
    _add(parser, "--base", metavar="MODEL", help="Base model, a folder or a hub name. Default: what the adapter names.")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    writing = parser.add_argument_group("generation", "For the adapter of a language model.")
    _add(writing, "--max-new-tokens", type=int, metavar="N", help="Maximum number of new tokens. Default: 128.")
    _add(
        writing,
        "--temperature",
        type=float,
        metavar="T",
        help="Temperature of sampling; 0 takes the most probable token. Default: 0.",
    )
    _add(writing, "--top-k", type=int, metavar="K", help="Number of most probable tokens to sample from. Default: all.")
    _add(
        writing, "--top-p", type=float, metavar="P", help="Total probability of the tokens to sample from. Default: 1."
    )
    _add(writing, "--num-beams", type=int, metavar="N", help="Number of beams of a beam search. Default: 1, no search.")
    _add(
        writing,
        "--length-penalty",
        type=float,
        metavar="A",
        help="Exponent A of the score log p / length^A of a beam search. Default: 1.",
    )
    _add(
        writing,
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        dest="no_repeat_ngram_size",
        help="Length of token sequences that may not occur twice, prompt included. Default: no limit.",
    )
    _add(writing, "--batch-size", type=int, metavar="N", help="Prompts per batch. Default: 16.")
    _add(writing, "--seed", type=int, metavar="N", help="Seed of sampling. Default: 0.")


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """The generation options of the flags that were given."""
    from lora_jax.inference.complete import GenerationOptions

    names = [field.name for field in dataclasses.fields(GenerationOptions)]
    return GenerationOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def refuse_generation(args: argparse.Namespace, kind: str) -> None:
    """Refuses flags of generation for an adapter with labels."""
    from lora_jax.inference.complete import GenerationOptions
    from lora_jax.training.errors import ConfigError

    for field in dataclasses.fields(GenerationOptions):
        if hasattr(args, field.name):
            raise ConfigError(f"`{field.name}` is for adapters of a causal-lm, and this one is of a {kind}.")


def given_columns(args: argparse.Namespace, saved: TaskFile) -> Columns:
    """The columns of training, overridden by those that are given."""
    from lora_jax.training.config import check_columns, check_option

    names = [field.name for field in dataclasses.fields(saved.columns)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    for name in given:
        check_option(name, saved.task.kind)
    columns = dataclasses.replace(saved.columns, **given)
    check_columns(columns)
    return columns


def make_config(args: argparse.Namespace, **defaults: object) -> TrainConfig:
    """The config of a YAML file (`--config`), overridden by the flags that were given."""
    from lora_jax.training.config import TrainConfig

    options, given = _read(args)
    options = defaults | options
    method = method_options(options.get("method", "lora"), given)
    return TrainConfig.from_dict({**options, **given, "method": method})


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """The options of a YAML file, overridden by the flags that were given."""
    options, given = _read(args)
    return options | given


def _read(args: argparse.Namespace) -> tuple[dict[str, object], dict[str, object]]:
    """Options of the YAML file, and of the flags."""
    from lora_jax.training.config_file import read_yaml

    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "traceback", "flags")}
    return read_yaml(given.pop("config")) if "config" in given else {}, given


def _add(parser: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """An option that is absent from the namespace unless it is given."""
    parser.add_argument(*names, default=argparse.SUPPRESS, **options)


def _with_line_ends(text: str) -> str:
    r"""Shells pass `\n` and `\t` as they are written."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _rate(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return float(text)
    pairs = [entry.partition("=") for entry in text.split(",")]
    return {label.strip(): float(value) for label, _, value in pairs}
