"""`lora-jax eval`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import (
    add_base_flag,
    add_column_flags,
    add_generation_flags,
    generation_options,
    given_columns,
    refuse_generation,
)
from .parser import in_flags

if TYPE_CHECKING:
    from lora_jax.inference.classify import Prediction
    from lora_jax.inference.complete import Completion
    from lora_jax.inference.text_metrics import Referenced
    from lora_jax.models import SpecialTokens
    from lora_jax.training.baseline import Baseline
    from lora_jax.training.examples import Columns, Examples
    from lora_jax.training.task_file import TaskFile

    # Counts, metrics, and what one answer to all scores.
    Score = tuple[dict[str, Any], dict[str, float | None], Baseline | None]

NAME = "eval"
USAGE = "--adapter FOLDER --test DATA [flags]"
HELP = "score an adapter on a data set"
DESCRIPTION = """\
Scores a saved adapter: on labelled texts by the metrics of its task, a language model by its perplexity; with
--generate also by BLEU and ROUGE-L of its completions. Rows that share a prompt are its references."""
EPILOG = """\
examples:
  lora-jax eval --adapter out --test test.tsv
  lora-jax eval --adapter out --test test.tsv --predictions predicted.jsonl
  lora-jax eval --adapter out --test owner/name@test --text sentence --json
  lora-jax eval --adapter out --test test.jsonl --generate --num-beams 10"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="Folder of a run, or of its adapter.")
    parser.add_argument("--test", required=True, metavar="DATA", help="Data to score on, a file or a hub data set.")
    add_column_flags(parser)
    add_base_flag(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--generate", action="store_true", help="Generate completions with a language model, and score them."
    )
    parser.add_argument("--limit", type=int, metavar="N", help="Number of prompts to complete. Default: all.")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="JSONL file to write: predictions, or completions with --generate.",
    )
    add_generation_flags(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.inference.classify import adapter_folder
    from lora_jax.training.task_file import read_task

    from .output import print_facts, score_facts

    saved = read_task(adapter_folder(args.adapter))
    score = _score_language if saved.task.kind == "causal-lm" else _score_labelled
    counts, metrics, baseline = score(args, saved, given_columns(args, saved))
    if args.json:
        beside = {} if baseline is None else {"baseline": baseline._asdict()}
        # JSON has no infinity, which a perplexity can be.
        finite = {name: None if value is None or math.isinf(value) else value for name, value in metrics.items()}
        print(json.dumps({"data": args.test, **counts, **finite, **beside}, allow_nan=False))
        return
    facts = {"rows": f"{counts['rows']:,}"} | score_facts("metrics", metrics, baseline)
    if counts["truncated"]:
        facts["truncated"] = f"{counts['truncated']:,} texts truncated to {counts['max_length']} tokens"
    if counts["skipped"]:
        facts["bad rows"] = f"{counts['skipped']:,} left out"
    if "prompts" in counts:
        facts["written"] = f"to {counts['prompts']:,} prompts, {counts['ended']:,} texts ended within the limit"
    if counts.get("dropped"):
        facts["left out"] = f"{counts['dropped']:,} texts: all that was to be predicted was cut off"
    print_facts(facts)


def _score_labelled(args: argparse.Namespace, saved: TaskFile, columns: Columns) -> Score:
    import numpy as np

    from lora_jax.inference.classify import load_predictor
    from lora_jax.training.baseline import baseline_of
    from lora_jax.training.data.sources import read_examples
    from lora_jax.training.data.special_text import special_text_note
    from lora_jax.training.errors import ConfigError
    from lora_jax.training.task import LabelledTask

    from .weights_progress import WeightsProgress

    refuse_generation(args, saved.task.kind)
    if args.generate:
        raise ConfigError(f"`generate` is for adapters of a causal-lm, and this one is of a {saved.task.kind}.")
    if args.limit is not None:
        raise ConfigError(f"`limit` is for adapters of a causal-lm, and this one is of a {saved.task.kind}.")
    assert isinstance(saved.task, LabelledTask)
    examples = read_examples(
        args.test,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        split="test",
        skip_bad_rows=getattr(args, "skip_bad_rows", False),
        check_label=saved.task.target,
    )
    targets = saved.task.encode(examples)
    with WeightsProgress() as progress:
        predictor = load_predictor(
            args.adapter,
            base=getattr(args, "base", None),
            escape_special_tokens=getattr(args, "escape_special_tokens", None),
            progress=progress,
        )
    if not predictor.escape_special_tokens:
        for note in special_text_note([*examples.texts, *(examples.pairs or ())], predictor.special_texts):
            print(f"note: {in_flags(note, args.flags)}", file=sys.stderr)
    encoded = predictor.encode(examples.texts, examples.pairs)
    counts = {"rows": encoded.num_sequences, "truncated": encoded.truncated, "max_length": predictor.max_length}
    counts |= {"skipped": examples.skipped}
    outputs = predictor.encoded_outputs(encoded)
    if args.predictions is not None:
        _write_predictions(args.predictions, examples, columns, predictor.predictions(outputs))
    # An adapter of an earlier version doesn't know what it was trained on.
    prior = np.array(saved.prior) if saved.prior else saved.task.prior(targets)
    return counts, saved.task.measure(outputs, targets), baseline_of(saved.task, prior, targets)


def _write_predictions(path: str, examples: Examples, columns: Columns, predictions: Sequence[Prediction]) -> None:
    """As `lora-jax predict` writes them, with the label of the data as `given_label`."""
    from lora_jax import files

    from .predict import given_fields

    lines = []
    for row, prediction in enumerate(predictions):
        line: dict[str, Any] = {columns.text: examples.texts[row]}
        if columns.text_pair is not None and examples.pairs is not None:
            line[columns.text_pair] = examples.pairs[row]
        line = given_fields(line, ("given_label", "label", "probability"))
        line |= {"given_label": (examples.labels or [])[row], "label": prediction.label}
        if prediction.probability is not None:
            line["probability"] = prediction.probability
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    files.write_text(path, "".join(lines))


def _score_language(args: argparse.Namespace, saved: TaskFile, columns: Columns) -> Score:
    import lora_jax as lj
    from lora_jax.inference.complete import load_completer
    from lora_jax.inference.text_metrics import with_references
    from lora_jax.training.data.documents import pairs_of, read_documents
    from lora_jax.training.errors import ConfigError

    from .weights_progress import WeightsProgress

    options = generation_options(args)
    base, skip = getattr(args, "base", None), getattr(args, "skip_bad_rows", False)
    special = lj.models.read_special_tokens(base or saved.base)
    escaped = getattr(args, "escape_special_tokens", saved.escape_special_tokens)
    documents = read_documents(
        args.test, columns, special=special, split="test", skip_bad_rows=skip, escape_special_tokens=escaped
    )
    for note in documents.notes:
        print(f"note: {in_flags(note, args.flags)}", file=sys.stderr)
    if not args.generate and (args.predictions is not None or args.limit is not None):
        raise ConfigError("`predictions` and `limit` are for generated completions: pass `generate=True` too.")
    prompts = with_references(pairs_of(documents))[: args.limit] if args.generate else []
    with WeightsProgress() as progress:
        completer = load_completer(args.adapter, base=base, escape_special_tokens=escaped, progress=progress)
    rows, metrics = completer.evaluate(documents)
    counts = {"rows": rows.texts, "truncated": rows.truncated, "dropped": rows.dropped, "max_length": rows.max_length}
    counts |= {"skipped": documents.skipped}
    if args.generate:
        written = completer.complete([prompt.prompt for prompt in prompts], options, form=documents.format)
        counts |= {"prompts": len(prompts), "ended": sum(completion.ended for completion in written)}
        metrics |= _compare(prompts, written, special, args.predictions)
    return counts, metrics, None


def _compare(
    prompts: Sequence[Referenced], written: Sequence[Completion], special: SpecialTokens, path: str | None
) -> dict[str, float]:
    from lora_jax import files
    from lora_jax.inference.text_metrics import text_metrics
    from lora_jax.training.data.special_text import unescape, without_control_tokens

    texts = [completion.text.strip() for completion in written]
    # A rendered answer has the mark of its end, which a written one ends with.
    ends = [text for text in special.texts.values() if text]
    references = [[without_control_tokens(text, ends).strip() for text in prompt.references] for prompt in prompts]
    if path is not None:
        rows = zip(prompts, texts, references, strict=True)
        lines = [{"prompt": unescape(p.prompt), "completion": text, "references": own} for p, text, own in rows]
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return text_metrics(texts, references)
