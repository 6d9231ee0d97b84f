"""`lora-jax inspect`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .options import TASKS, add_column_arguments, add_method_arguments, make_config

if TYPE_CHECKING:
    from lora_jax.training.inspection import AdapterReport, MethodReport

NAME = "inspect"
HELP = "what a method would train, or what an adapter holds"
DESCRIPTION = """\
Without --adapter: what a method would train on a base, its memory and its file, before any training.
With --adapter: the content of a saved adapter."""
EPILOG = """\
examples:
  lora-jax inspect                                     LoRA on every linear layer of the default base
  lora-jax inspect --method bitfit --targets attention/query mlp/up
  lora-jax inspect --method lora --rank 4 --targets query value --train data.tsv
  lora-jax inspect --adapter out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suppress = argparse.SUPPRESS
    parser.add_argument("--adapter", metavar="FOLDER", help="a run's folder, or the adapter in it")
    parser.add_argument("--config", metavar="FILE", default=suppress, help="YAML with options of a run")
    parser.add_argument("--train", metavar="DATA", default=suppress, help="data to count the labels of")
    parser.add_argument("--num-labels", type=int, metavar="N", help="labels, where there is no --train (default: 2)")
    parser.add_argument(
        "--task", choices=TASKS, default=suppress, help="labels, numbers or the next token (default: classification)"
    )
    add_column_arguments(parser)
    add_method_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from lora_jax.training.inspection import inspect_adapter, inspect_method

    # What isn't an option of a run is taken out first.
    adapter, num_labels, as_json = (vars(args).pop(name) for name in ("adapter", "num_labels", "json"))
    if adapter is not None:
        report = inspect_adapter(adapter)
        _print_json(report) if as_json else _show_adapter(report)
        return
    config = make_config(args, train="(none)", output="(none)")
    if num_labels is None:
        num_labels = _count_labels(config)
    report = inspect_method(config, num_labels=num_labels)
    _print_json(report) if as_json else _show_method(report, config.base, config.method)


def _count_labels(config) -> int:
    from lora_jax.training.data import read_examples
    from lora_jax.training.task import make_task

    if config.train == "(none)" or config.task != "classification":
        return 2
    examples = read_examples(config.train, text=config.text, text_pair=config.text_pair, label=config.label)
    return len(make_task(config.task, examples).labels)


def _show_method(report: MethodReport, base: str, method: object) -> None:
    from lora_jax.training.progress import format_bytes

    from .tables import print_facts, print_table

    print_facts({"base": base, "method": str(method)})
    rows = [
        (g.pattern, g.label, str(g.leaves), _shape(g.shape), f"{g.params:,}", format_bytes(g.bytes))
        for g in report.groups
    ]
    print_table(("trained leaves", "label", "leaves", "shape", "parameters", "size"), rows, text_columns=2)
    labels = [
        (label, f"{params:,}", f"{100 * params / report.total:.3g} %", format_bytes(size))
        for label, (params, size) in report.per_label.items()
    ]
    print_table(("label", "parameters", "share", "size"), labels)
    print_facts(
        {
            "trained": f"{report.trainable:,} of {report.total:,} parameters ({report.percent:.3g} %)",
            "frozen base": format_bytes(report.frozen_bytes),
            "training adds": f"{format_bytes(report.trainable_bytes)} of parameters, "
            f"{format_bytes(report.gradient_bytes)} of gradients, {format_bytes(report.optimizer_bytes)} of optimizer "
            "state (and activations, by batch)",
            "adapter file": f"{format_bytes(report.adapter_bytes)} and a header",
        }
    )


def _show_adapter(report: AdapterReport) -> None:
    from lora_jax.training.progress import format_bytes

    from .tables import print_facts, print_table

    task = report.task
    options = {key: value for key, value in report.method.items() if key not in ("name", "targets", "also_train")}
    facts = {"adapter": f"{report.folder} ({format_bytes(report.file_bytes)})", "method": report.method["name"]}
    if options:
        facts["options"] = ", ".join(f"{key} {value}" for key, value in options.items() if value not in ({}, []))
    if task is not None:
        facts |= {"base": task.base, "task": task.task.kind, "max length": str(task.max_length)}
        if task.task.labels:
            facts["labels"] = ", ".join(task.task.labels)
    facts["fingerprint"] = f"of {len(report.base):,} frozen leaves of the base"
    print_facts(facts)
    rows = [(t.name, t.dtype, _shape(t.shape), f"{t.norm:.4g}") for t in report.tensors]
    print_table(("tensor", "dtype", "shape", "norm"), rows, text_columns=2)


def _print_json(report: AdapterReport | MethodReport) -> None:
    import dataclasses
    from pathlib import Path

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(type(value).__name__)

    content = report._asdict()
    for key, value in content.items():
        if isinstance(value, list):
            content[key] = [row._asdict() for row in value]
    print(json.dumps(content, default=plain))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "various" if shape is None else "×".join(map(str, shape))
