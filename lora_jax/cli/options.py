"""Flags that commands share, and how they become a `TrainConfig`; one that isn't given leaves the YAML file's value."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.inference.complete import GenerationOptions
    from lora_jax.training import TrainConfig
    from lora_jax.training.examples import Columns
    from lora_jax.training.task_file import TaskFile

TASKS = ("classification", "regression", "causal-lm")
_PRESETS = ("all", "all-linear", "attention", "mlp", "keys-values-mlp")
_METHOD_FLAGS = {
    "rank": "rank",
    "alpha": "alpha",
    "targets": "targets",
    "also_train": "also_train",
    "lora_dropout": "dropout",
    "scaling": "scaling",
    "init": "init",
    "freeze_a": "freeze_a",
    "d_initial": "d_initial",
    "projection_seed": "projection_seed",
    "feedforward": "feedforward",
    "count": "count",
    "size": "size",
    "kind": "kind",
    "dimension": "dimension",
    "placement": "placement",
    "train_norms": "train_norms",
    "length": "length",
    "hidden": "hidden",
}
_METHODS = ("frozen", "bitfit", "lora", "dora", "ia3", "vera", "adapter", "prefix", "full")
_BASELINES = ("norms", "top-layers", "random-mask", "random-subspace")


def add_column_arguments(parser: argparse._ActionsContainer) -> None:
    _add(parser, "--text", metavar="COLUMN", help="column of the text (default: text)")
    _add(parser, "--text-pair", metavar="COLUMN", help="column of a second text, for tasks on pairs")
    _add(parser, "--label", metavar="COLUMN", help="column of the label (default: label)")
    _add(parser, "--prompt", metavar="COLUMN", help="causal-lm: column of the prompt; nothing is learnt of it")
    _add(parser, "--completion", metavar="COLUMN", help="causal-lm: column of what is to follow the prompt")
    _add(
        parser,
        "--separator",
        type=_with_line_ends,
        metavar="TEXT",
        help="causal-lm: between prompt and completion (default: a line end, \\n)",
    )
    _add(parser, "--messages", metavar="COLUMN", help="causal-lm: column of conversations, lists of role and content")
    _add(
        parser,
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that can't be used, and say how many (default: refuse them)",
    )
    _add(
        parser,
        "--escape-special-tokens",
        action=argparse.BooleanOptionalAction,
        help="take special tokens that a text spells out, such as </s>, as plain text (default: as control tokens, "
        "with a note; of an adapter: as in its training)",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group(
        "data",
        "A file that ends in .tsv (with a header, no quoting), .csv, .jsonl or .parquet; for causal-lm also .txt; or\n"
        "a hub data set as owner/name:subset@split.",
    )
    _add(data, "--train", metavar="DATA", help="texts to learn from")
    _add(data, "--dev", metavar="DATA", help="texts that choose the best checkpoint")
    _add(data, "--test", metavar="DATA", help="texts that the chosen checkpoint is scored on")
    _add(data, "--task", choices=TASKS, help="labels, numbers or the next token (default: classification)")
    add_column_arguments(data)
    _add(
        data,
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a row; longer texts are cut (default: 128, causal-lm 512)",
    )
    _add(
        data,
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="causal-lm: several texts in a row, which don't see each other (default: yes)",
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("base and method")
    add_base_arguments(method)
    _add(
        method,
        "--method",
        choices=(*_METHODS, *_BASELINES),
        metavar="NAME",
        help="frozen, the head alone; bitfit, biases; lora (default), low-rank factors; dora, magnitudes as well; "
        "ia3, scales; vera, vectors between shared random factors; adapter, bottlenecks after the sublayers; prefix, "
        "keys and values before the tokens'; full, everything. To compare with: norms; top-layers, the last ones; "
        "random-mask, numbers chosen by chance; random-subspace",
    )
    _add(method, "--rank", type=int, metavar="R", help="LoRA, DoRA, VeRA: the rank (default: 8; of VeRA 256)")
    _add(method, "--alpha", type=float, metavar="A", help="LoRA, DoRA: updates are scaled by A/R (default: 16)")
    _add(
        method,
        "--targets",
        nargs="+",
        metavar="NAME",
        help="LoRA, DoRA, VeRA: all-linear (default), attention, mlp, or modules (query value); "
        "BitFit: all (default), or modules (attention/query mlp/up); IA3: keys-values-mlp (default), or modules",
    )
    _add(
        method,
        "--also-train",
        nargs="*",
        metavar="NAME",
        help="modules trained in full (default: classifier; causal-lm none)",
    )
    _add(method, "--lora-dropout", type=float, metavar="P", help="LoRA, DoRA: of the factors' input (default: 0)")
    _add(method, "--scaling", choices=("standard", "rank_stabilized"), help="LoRA, DoRA: by A/R or A/√R")
    _add(
        method,
        "--init",
        choices=("gaussian", "kaiming", "pissa", "orthogonal"),
        help="LoRA, DoRA: start of the factors, at random (gaussian is the default) or from the weight",
    )
    _add(method, "--freeze-a", action="store_true", help="LoRA, DoRA: train the factor b alone (LoRA-FA)")
    _add(
        method,
        "--d-initial",
        type=float,
        metavar="D",
        help="VeRA: what its vector of the rank starts at (default: 0.1)",
    )
    _add(method, "--projection-seed", type=int, metavar="N", help="VeRA: of the factors that are shared (default: 0)")
    _add(
        method,
        "--feedforward",
        nargs="*",
        metavar="NAME",
        help="IA3: those of --targets whose input is scaled, not the output (default: mlp/down)",
    )
    _add(method, "--count", type=int, metavar="N", help="top-layers: how many (default: 2)")
    _add(
        method,
        "--size",
        type=_size,
        metavar="K",
        help="random-mask: how many numbers, their share as 0.01, or bitfit for as many as biases (default);\n"
        "adapter: the width of the bottleneck (default: 16)",
    )
    _add(
        method,
        "--placement",
        choices=("houlsby", "pfeiffer"),
        help="adapter: after attention and MLP (default), or after the MLP alone",
    )
    _add(
        method,
        "--train-norms",
        action=argparse.BooleanOptionalAction,
        help="adapter: the layers' norms too (default: as in the paper, with houlsby yes, with pfeiffer no)",
    )
    _add(method, "--length", type=int, metavar="M", help="prefix: keys and values in each layer (default: 16)")
    _add(
        method,
        "--hidden",
        type=_optional(int),
        metavar="K",
        help="prefix: of the network that it is trained through, or none (default: 512)",
    )
    _add(method, "--kind", choices=("uniform", "rows", "columns"), help="random-mask: numbers (default), or lines")
    _add(method, "--dimension", type=int, metavar="D", help="random-subspace: of its vector (default: 1000)")


def add_base_argument(parser: argparse._ActionsContainer) -> None:
    _add(parser, "--base", metavar="MODEL", help="folder or hub name (default: sentence-transformers/all-MiniLM-L6-v2)")


def add_base_arguments(group: argparse._ActionsContainer) -> None:
    add_base_argument(group)
    _add(
        group, "--pooling", choices=("first", "mean"), help="what the head sees: the first token (default) or the mean"
    )
    _add(group, "--dtype", choices=("float32", "bfloat16"), help="of the frozen base (default: float32)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    add_loop_arguments(training)
    _add(
        training,
        "--lr",
        type=_rate,
        metavar="RATE",
        help="peak learning rate (default: by method), or one a label: lora_a=1e-3,lora_b=4e-3,head=1e-3",
    )
    _add(
        training,
        "--lora-plus-ratio",
        type=float,
        metavar="L",
        help="LoRA, DoRA: the rate of the factor b is L times --lr (LoRA+; 16 in its paper)",
    )
    _add(training, "--seed", type=int, metavar="N", help="of head, factors, order and dropout (default: 0)")
    _add(training, "--log-every", type=int, metavar="STEPS", help="rows of metrics.jsonl (default: 10)")
    _add(training, "--tensorboard", action="store_true", help="write scalars for TensorBoard")


def add_loop_arguments(training: argparse._ActionsContainer) -> None:
    """What all runs of a comparison share."""
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
    _add(training, "--weight-decay", type=_rate, metavar="RATE", help="of AdamW, or one a label (default: 0.01)")
    _add(training, "--warmup", type=float, metavar="SHARE", help="of the steps, with a rising rate (default: 0.06)")
    _add(training, "--schedule", choices=("linear", "cosine", "constant"), help="after the warm-up (default: linear)")
    _add(training, "--label-smoothing", type=float, metavar="E", help="causal-lm: of the training loss (default: 0)")
    _add(training, "--clip-norm", type=_optional(float), metavar="NORM", help="of the gradient, or none (default: 1)")
    _add(training, "--dropout", type=_optional(float), metavar="P", help="of the model (default: the base's own)")
    _add(training, "--buckets", type=int, metavar="N", help="the most lengths to pad batches to (default: what pays)")
    _add(training, "--metric", metavar="NAME", help="that --dev chooses by (default: accuracy, pearson or perplexity)")
    _add(training, "--eval-every", type=int, metavar="STEPS", help="evaluate and save (default: once an epoch)")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    writing = parser.add_argument_group("writing", "For an adapter of a language model.")
    _add(writing, "--max-new-tokens", type=int, metavar="N", help="the most tokens to add (default: 128)")
    _add(writing, "--temperature", type=float, metavar="T", help="draw tokens; 0 (default) takes the most probable")
    _add(writing, "--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    _add(writing, "--top-p", type=float, metavar="P", help="draw from the fewest tokens that sum to probability P")
    _add(writing, "--num-beams", type=int, metavar="N", help="beam search with N beginnings (default: 1, none)")
    _add(writing, "--length-penalty", type=float, metavar="A", help="of beam search: log p / length^A (default: 1)")
    _add(
        writing,
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        dest="no_repeat_ngram_size",
        help="no N tokens come twice in a row, prompt included (default: any may)",
    )
    _add(writing, "--batch-size", type=int, metavar="N", help="prompts at once (default: 16)")
    _add(writing, "--seed", type=int, metavar="N", help="of the drawing (default: 0)")


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """How to write, by the flags that were given."""
    from lora_jax.inference.complete import GenerationOptions

    names = [field.name for field in dataclasses.fields(GenerationOptions)]
    return GenerationOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def refuse_generation(args: argparse.Namespace, kind: str) -> None:
    """Tells that a flag of `add_generation_arguments` means nothing for an adapter with labels."""
    from lora_jax.inference.complete import GenerationOptions
    from lora_jax.training.errors import ConfigError

    for field in dataclasses.fields(GenerationOptions):
        if hasattr(args, field.name):
            raise ConfigError(f"`{field.name}` is for adapters of a causal-lm, and this one is of a {kind}.")


def given_columns(args: argparse.Namespace, saved: TaskFile) -> Columns:
    """The columns of training, with those over them that are given."""
    from lora_jax.training.config import check_columns, check_option

    names = [field.name for field in dataclasses.fields(saved.columns)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    for name in given:
        check_option(name, saved.task.kind)
    columns = dataclasses.replace(saved.columns, **given)
    check_columns(columns)
    return columns


def make_config(args: argparse.Namespace, **defaults: Any) -> TrainConfig:
    """The config of a YAML file (`--config`) with the flags that were given over it."""
    from lora_jax.training.config import TrainConfig

    options, given = _read(args)
    options = defaults | options
    method = _method_options(options.get("method", "lora"), given)
    return TrainConfig.from_dict({**options, **given, "method": method})


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a YAML file with the flags that were given over them."""
    options, given = _read(args)
    return options | given


def _read(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the YAML file, and of the flags."""
    from lora_jax.training.config import read_yaml

    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "traceback")}
    return read_yaml(given.pop("config")) if "config" in given else {}, given


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


def _with_line_ends(text: str) -> str:
    r"""Shells pass `\n` and `\t` as they are written."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


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
