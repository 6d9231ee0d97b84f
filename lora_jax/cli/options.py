"""Flags that commands share, and how they become a `TrainConfig`; one that isn't given leaves the YAML file's value."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.training import TrainConfig

_PRESETS = ("all", "all-linear", "attention", "mlp")
_METHOD_FLAGS = {
    "rank": "rank",
    "alpha": "alpha",
    "targets": "targets",
    "also_train": "also_train",
    "lora_dropout": "dropout",
    "scaling": "scaling",
    "init": "init",
    "count": "count",
    "size": "size",
    "kind": "kind",
    "dimension": "dimension",
}
_BASELINES = ("norms", "top-layers", "random-mask", "random-subspace")


def add_column_arguments(parser: argparse._ActionsContainer) -> None:
    _add(parser, "--text", metavar="COLUMN", help="column of the text (default: text)")
    _add(parser, "--text-pair", metavar="COLUMN", help="column of a second text, for tasks on pairs")
    _add(parser, "--label", metavar="COLUMN", help="column of the label (default: label)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group(
        "data",
        "A file that ends in .tsv (with a header, no quoting), .csv, .jsonl or .parquet; or a hub data set as\n"
        "owner/name:subset@split.",
    )
    _add(data, "--train", metavar="DATA", help="labelled texts to learn from")
    _add(data, "--dev", metavar="DATA", help="labelled texts that choose the best checkpoint")
    _add(data, "--test", metavar="DATA", help="labelled texts that the chosen checkpoint is scored on")
    add_column_arguments(data)
    _add(data, "--task", choices=("classification", "regression"), help="labels or numbers (default: classification)")
    _add(data, "--max-length", type=int, metavar="N", help="tokens of a text; longer ones are cut (default: 128)")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("base and method")
    add_base_argument(method)
    _add(
        method, "--pooling", choices=("first", "mean"), help="what the head sees: the first token (default) or the mean"
    )
    _add(method, "--dtype", choices=("float32", "bfloat16"), help="of the frozen base (default: float32)")
    _add(
        method,
        "--method",
        choices=("frozen", "bitfit", "lora", "full", *_BASELINES),
        help="the head alone, biases, low-rank factors (default), or everything; and baselines: the norms' scales and "
        "shifts, the last layers, numbers chosen by chance, a random subspace",
    )
    _add(method, "--rank", type=int, metavar="R", help="LoRA: the rank (default: 8)")
    _add(method, "--alpha", type=float, metavar="A", help="LoRA: updates are scaled by A/R (default: 16)")
    _add(
        method,
        "--targets",
        nargs="+",
        metavar="NAME",
        help="LoRA: all-linear (default), attention, mlp, or modules (query value); "
        "BitFit: all (default), or modules (attention/query mlp/up)",
    )
    _add(method, "--also-train", nargs="*", metavar="NAME", help="modules trained in full (default: classifier)")
    _add(method, "--lora-dropout", type=float, metavar="P", help="LoRA: of the factors' input (default: 0)")
    _add(method, "--scaling", choices=("standard", "rank_stabilized"), help="LoRA: by A/R or A/√R")
    _add(method, "--init", choices=("gaussian", "kaiming"), help="LoRA: start of the factor a")
    _add(method, "--count", type=int, metavar="N", help="top-layers: how many (default: 2)")
    _add(
        method,
        "--size",
        type=_size,
        metavar="K",
        help="random-mask: how many numbers, their share as 0.01, or bitfit for as many as biases (default)",
    )
    _add(method, "--kind", choices=("uniform", "rows", "columns"), help="random-mask: numbers (default), or lines")
    _add(method, "--dimension", type=int, metavar="D", help="random-subspace: of its vector (default: 1000)")


def add_base_argument(parser: argparse._ActionsContainer) -> None:
    _add(parser, "--base", metavar="MODEL", help="folder or hub name (default: sentence-transformers/all-MiniLM-L6-v2)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    _add(training, "--epochs", type=int, metavar="N", help="how often every row is seen (default: 4)")
    _add(training, "--steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    _add(training, "--batch-size", type=int, metavar="N", help="rows of a step (default: 32)")
    _add(training, "--accumulate", type=int, metavar="N", help="parts that a step is computed in, to save memory")
    _add(
        training,
        "--remat",
        choices=("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"),
        help="what of a layer is kept for the backward pass, to save memory (default: all)",
    )
    _add(
        training,
        "--lr",
        type=_rate,
        metavar="RATE",
        help="peak learning rate (default: by method), or one a label: lora_a=1e-3,lora_b=4e-3,head=1e-3",
    )
    _add(training, "--weight-decay", type=_rate, metavar="RATE", help="of AdamW, or one a label (default: 0.01)")
    _add(training, "--warmup", type=float, metavar="SHARE", help="of the steps, with a rising rate (default: 0.06)")
    _add(training, "--schedule", choices=("linear", "cosine", "constant"), help="after the warm-up (default: linear)")
    _add(training, "--clip-norm", type=_optional(float), metavar="NORM", help="of the gradient, or none (default: 1)")
    _add(training, "--dropout", type=_optional(float), metavar="P", help="of the model (default: the base's own)")
    _add(training, "--buckets", type=int, metavar="N", help="the most lengths to pad batches to (default: what pays)")
    _add(training, "--seed", type=int, metavar="N", help="of head, factors, order and dropout (default: 0)")
    _add(training, "--metric", metavar="NAME", help="that --dev chooses by (default: accuracy, or pearson)")
    _add(training, "--eval-every", type=int, metavar="STEPS", help="evaluate and save (default: once an epoch)")
    _add(training, "--log-every", type=int, metavar="STEPS", help="rows of metrics.jsonl (default: 10)")
    _add(training, "--tensorboard", action="store_true", help="write scalars for TensorBoard")


def make_config(args: argparse.Namespace, **defaults: Any) -> TrainConfig:
    """The config of a YAML file (`--config`) with the flags that were given over it."""
    from lora_jax.training.config import TrainConfig, read_yaml

    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "traceback")}
    options = defaults | (read_yaml(given.pop("config")) if "config" in given else {})
    method = _method_options(options.get("method", "lora"), given)
    return TrainConfig.from_dict({**options, **given, "method": method})


def _method_options(from_file: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the method's flags out of `given`; over the file's options, if they are of the same method."""
    options = dict(from_file) if isinstance(from_file, dict) else {"name": from_file}
    name = given.pop("method", options.get("name", "lora"))
    if name != options.get("name", "lora"):
        options = {}
    flags = {field: given.pop(flag) for flag, field in _METHOD_FLAGS.items() if flag in given}
    if "targets" in flags:
        flags["targets"] = preset_or_names(flags["targets"])
    return {**options, "name": name, **flags}


def preset_or_names(targets: list[str]) -> str | list[str]:
    """What `--targets` means: one preset is a preset, and names are names."""
    return targets[0] if len(targets) == 1 and targets[0] in _PRESETS else targets


def _add(parser: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """An option that is absent from the namespace unless it is given."""
    parser.add_argument(*names, default=argparse.SUPPRESS, **options)


def _rate(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return float(text)
    pairs = [entry.partition("=") for entry in text.split(",")]
    return {label.strip(): float(value) for label, _, value in pairs}


def _size(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the method refuses what it doesn't know


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse
