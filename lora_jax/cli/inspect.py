"""`lora-jax inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax.text import listed

from .options import BASE, COLUMNS, add_run_flags, make_config

if TYPE_CHECKING:
    from lora_jax.tools.inspect import AdapterReport, MethodReport, Tensor
    from lora_jax.tools.inspect_peft import PeftReport

NAME = "inspect"
USAGE = "[FOLDER] [flags]"
HELP = "what a method would train, or what an adapter holds"
DESCRIPTION = """\
Without a folder: what a method would train on a base model, its memory and the size of its file, before any training.

With a folder: the content of a saved adapter. For a PEFT adapter also whether lora_jax can read it, and if not, why,
and what vLLM would refuse."""
EPILOG = """\
examples:
  lora-jax inspect
  lora-jax inspect --method bitfit --targets attention/query mlp/up
  lora-jax inspect --method lora --rank 4 --targets query value --train data.tsv
  lora-jax inspect out
  lora-jax inspect from_the_hub --base bert-base-uncased --max-lora-rank 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suppress = argparse.SUPPRESS
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="Folder of a run, an adapter or a PEFT adapter.")
    parser.add_argument("--adapter", metavar="FOLDER", help="The same.")
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        default=16,
        metavar="R",
        help="Largest rank that vLLM is started with. Default: 16.",
    )
    parser.add_argument("--config", metavar="FILE", default=suppress, help="YAML file with options of a run.")
    parser.add_argument("--num-labels", type=int, metavar="N", help="Number of labels, without --train. Default: 2.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    add_run_flags(parser, ("train", "task", *COLUMNS, *BASE, "method"))


def run(args: argparse.Namespace) -> None:
    from lora_jax.tools.inspect import inspect_adapter, inspect_method
    from lora_jax.tools.inspect_peft import inspect_peft
    from lora_jax.tools.source import folder_kind, no_adapter
    from lora_jax.training.errors import ConfigError

    from .output import print_json

    # What isn't an option of a run is taken out first.
    own = ("folder", "adapter", "max_lora_rank", "num_labels", "json")
    folder, adapter, max_lora_rank, num_labels, as_json = (vars(args).pop(name) for name in own)
    if folder is not None and adapter is not None:
        raise ConfigError(f"Two folders to inspect are given: {folder} and `adapter` {adapter}.")
    if (folder := folder or adapter) is not None:
        kind = folder_kind(folder)
        if kind in ("delta", "model"):
            raise no_adapter(kind, Path(folder))
        if kind == "peft":
            report = inspect_peft(folder, base=getattr(args, "base", None), max_lora_rank=max_lora_rank)
            print_json(report) if as_json else _show_peft(report)
        else:
            report = inspect_adapter(folder)
            print_json(report) if as_json else _show_adapter(report)
        return
    config = make_config(args, train="(none)", output="(none)")
    if num_labels is None:
        num_labels = _count_labels(config)
    report = inspect_method(config, num_labels=num_labels)
    print_json(report) if as_json else _show_method(report, config.base, config.method)


def _count_labels(config) -> int:
    from lora_jax.training.data.labelled import read_labelled
    from lora_jax.training.task import make_task

    if config.train == "(none)" or config.task != "classification":
        return 2
    examples = read_labelled(config, config.train, "train")
    return len(make_task(config.task, examples).labels)


def _show_method(report: MethodReport, base: str, method: object) -> None:
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts, print_groups, print_table

    print_facts({"base": base, "method": str(method)})
    print_groups(report.groups)
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
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts

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
    _show_tensors(report.tensors)


def _show_peft(report: PeftReport) -> None:
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts

    config = report.config
    # Said elsewhere here: how targets were chosen, by what they are. Or about the file, not the adapter.
    known = ("peft_type", "base_model_name_or_path", "task_type", "target_modules", "inference_mode", "peft_version")
    facts = {
        "adapter": f"{report.folder} ({format_bytes(report.file_bytes)})",
        "method": f"PEFT's {config.get('peft_type', 'unknown')}",
        "base": str(config.get("base_model_name_or_path", "not said")),
        "task type": str(config.get("task_type", "not said")),
        "options": ", ".join(f"{name} {_option(value)}" for name, value in sorted(config.items()) if name not in known),
        "targets": listed([f"{t.name} × {t.modules} (rank {t.rank})" for t in report.targets], 16) or "none",
    }
    if report.whole:
        facts["in full"] = listed(report.whole)
    read = "yes, onto its base: `lora-jax convert --to lora_jax`"
    if report.refusal is not None:
        read = f"no: {report.refusal}"
    elif report.unchecked is not None:
        read = f"not checked against its base: {report.unchecked}"
    facts["lora_jax reads it"] = read
    print_facts(facts)
    print_facts(
        {f"vLLM {place}": problem for place, problem in enumerate(report.vllm, 1)} or {"vLLM": "finds no fault"}
    )
    _show_tensors(report.tensors)


def _option(value: object) -> str:
    if isinstance(value, dict):
        return f"({listed([f'{key}: {item}' for key, item in value.items()], 3)})"
    return f"({listed(list(map(str, value)), 5)})" if isinstance(value, list) else str(value)


def _show_tensors(tensors: list[Tensor]) -> None:
    from .output import format_shape, print_table

    rows = [(t.name, t.dtype, format_shape(t.shape), f"{t.norm:.4g}") for t in tensors]
    print_table(("tensor", "dtype", "shape", "norm"), rows, text_columns=2)
