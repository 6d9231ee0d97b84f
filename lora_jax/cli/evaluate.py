"""`lora-jax eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import (
    add_base_argument,
    add_column_arguments,
    add_generation_arguments,
    generation_options,
    given_columns,
    refuse_generation,
)

if TYPE_CHECKING:
    from lora_jax.models import SpecialTokens
    from lora_jax.training.completer import Completion
    from lora_jax.training.data import Columns
    from lora_jax.training.generation_metrics import Referenced
    from lora_jax.training.task_file import TaskFile

NAME = "eval"
HELP = "score an adapter on a data set"
DESCRIPTION = """\
Scores a saved adapter: on labelled texts with its metrics, a language model with its perplexity; with --generate also
with BLEU and ROUGE-L of what it writes to each prompt. Rows that share a prompt are its references."""
EPILOG = """\
examples:
  lora-jax eval --adapter out --test test.tsv
  lora-jax eval --adapter out --test owner/name@test --text sentence --json
  lora-jax eval --adapter out --test test.jsonl --generate --num-beams 10 --predictions written.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="a run's folder, or the adapter in it")
    parser.add_argument("--test", required=True, metavar="DATA", help="a file or a hub data set, as for train")
    add_column_arguments(parser)
    add_base_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--generate", action="store_true", help="a language model: write, and score what is written")
    parser.add_argument("--limit", type=int, metavar="N", help="write to the first N prompts only")
    parser.add_argument("--predictions", metavar="FILE", help="for what is written, as JSONL")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.training.predict import adapter_folder
    from lora_jax.training.progress import format_metrics
    from lora_jax.training.task_file import read_task

    from .tables import print_facts

    saved = read_task(adapter_folder(args.adapter))
    score = _score_language if saved.task.kind == "causal-lm" else _score_labelled
    counts, metrics = score(args, saved, given_columns(args, saved))
    if args.json:
        print(json.dumps({"data": args.test, **counts, **metrics}))
        return
    facts = {"rows": f"{counts['rows']:,}", "metrics": format_metrics(metrics)}
    if counts["truncated"]:
        facts["truncated"] = f"{counts['truncated']:,} texts cut at {counts['max_length']} tokens"
    if counts["skipped"]:
        facts["bad rows"] = f"{counts['skipped']:,} left out"
    if "prompts" in counts:
        facts["written"] = f"to {counts['prompts']:,} prompts, {counts['ended']:,} texts ended within the limit"
    if counts.get("dropped"):
        facts["left out"] = f"{counts['dropped']:,} texts: all that was to be predicted was cut off"
    print_facts(facts)


def _score_labelled(
    args: argparse.Namespace, saved: TaskFile, columns: Columns
) -> tuple[dict[str, Any], dict[str, float | None]]:
    from lora_jax.training.data import read_examples
    from lora_jax.training.errors import ConfigError
    from lora_jax.training.predict import load_predictor
    from lora_jax.training.task import LabelledTask

    from .weights_progress import WeightsProgress

    refuse_generation(args, saved.task.kind)
    if args.generate:
        raise ConfigError(f"`generate` is for adapters of a causal-lm, and this one is of a {saved.task.kind}.")
    examples = read_examples(
        args.test,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        split="test",
        skip_bad_rows=hasattr(args, "skip_bad_rows"),
    )
    assert isinstance(saved.task, LabelledTask)
    saved.task.encode(examples)  # an unknown label is told before the model is loaded
    with WeightsProgress() as progress:
        predictor = load_predictor(args.adapter, base=getattr(args, "base", None), progress=progress)
    encoded = predictor.encode(examples.texts, examples.pairs)
    counts = {"rows": encoded.rows, "truncated": encoded.truncated, "max_length": predictor.max_length}
    counts |= {"skipped": examples.skipped}
    return counts, predictor.evaluate(examples)


def _score_language(
    args: argparse.Namespace, saved: TaskFile, columns: Columns
) -> tuple[dict[str, Any], dict[str, float | None]]:
    import lora_jax as lj
    from lora_jax.training.completer import load_completer
    from lora_jax.training.documents import pairs_of, read_documents
    from lora_jax.training.errors import ConfigError
    from lora_jax.training.generation_metrics import with_references

    from .weights_progress import WeightsProgress

    options = generation_options(args)
    base, skip = getattr(args, "base", None), hasattr(args, "skip_bad_rows")
    special = lj.models.read_special_tokens(base or saved.base)
    documents = read_documents(args.test, columns, special=special, split="test", skip_bad_rows=skip)
    if not args.generate and (args.predictions is not None or args.limit is not None):
        raise ConfigError("`predictions` and `limit` are for what is written: pass `--generate` too.")
    prompts = with_references(pairs_of(documents))[: args.limit] if args.generate else []
    with WeightsProgress() as progress:
        completer = load_completer(args.adapter, base=base, progress=progress)
    rows, metrics = completer.evaluate(documents)
    counts = {"rows": rows.texts, "truncated": rows.truncated, "dropped": rows.dropped, "max_length": rows.max_length}
    counts |= {"skipped": documents.skipped}
    if args.generate:
        written = completer.complete([prompt.prompt for prompt in prompts], options, form=documents.format)
        counts |= {"prompts": len(prompts), "ended": sum(completion.ended for completion in written)}
        metrics |= _compare(prompts, written, special, args.predictions)
    return counts, metrics


def _compare(
    prompts: Sequence[Referenced], written: Sequence[Completion], special: SpecialTokens, path: str | None
) -> dict[str, float]:
    from lora_jax import files
    from lora_jax.training.generation_metrics import text_metrics

    texts = [completion.text.strip() for completion in written]
    # A rendered answer has the mark of its end, which a written one ends with.
    ends = [text for text in special.texts.values() if text]
    references = [[_without(ends, text).strip() for text in prompt.references] for prompt in prompts]
    if path is not None:
        rows = zip(prompts, texts, references, strict=True)
        lines = [{"prompt": p.prompt, "completion": text, "references": own} for p, text, own in rows]
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return text_metrics(texts, references)


def _without(marks: Sequence[str], text: str) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text
