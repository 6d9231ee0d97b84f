"""`lora-jax predict`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_jax.text import json_line

from .options import (
    add_base_argument,
    add_column_arguments,
    add_generation_arguments,
    generation_options,
    given_columns,
    refuse_generation,
)

if TYPE_CHECKING:
    from lora_jax.models import Progress
    from lora_jax.training.completer import Completer
    from lora_jax.training.data import Columns
    from lora_jax.training.predict import Prediction
    from lora_jax.training.task_file import TaskFile

    Row = dict[str, Any]
    Answer = Callable[[list[Row]], Iterable[Row]]
    Load = Callable[[Progress], Answer]

NAME = "predict"
HELP = "label texts, or continue prompts, from lines, JSONL or a data file"
DESCRIPTION = """\
Labels texts; writes one JSON object a line, in the order of the input:
{"text": ..., "label": ..., "probability": ...}. With an adapter of a language model, continues prompts:
{"prompt": ..., "completion": ...}.

The input has one text a line (blank lines are left out); one JSON object a line where it ends in .jsonl or with
--jsonl, whose other fields are passed through (its own `label` as `given_label`); or columns where it ends in .tsv,
.csv or .parquet. For an adapter trained on conversations a line is what the user says; in JSONL the conversation is in
the column of its messages."""
EPILOG = """\
examples:
  lora-jax predict --adapter out messages.txt
  echo "where is my order?" | lora-jax predict --adapter out
  lora-jax predict --adapter out --text sentence data.jsonl > labelled.jsonl
  lora-jax predict --adapter out prompts.txt --max-new-tokens 60 --num-beams 4
  lora-jax predict --adapter out prompts.txt --temperature 0.8 --top-p 0.95 --seed 1"""

_CHUNK = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="?", default="-", metavar="FILE", help="texts; - (default) is standard input")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="a run's folder, or the adapter in it")
    parser.add_argument("--jsonl", action="store_true", help="standard input is JSONL")
    parser.add_argument("--all", action="store_true", help="add the probability of every label")
    add_column_arguments(parser)
    add_base_argument(parser)
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.training.predict import adapter_folder
    from lora_jax.training.task_file import read_task

    from .weights_progress import WeightsProgress

    saved = read_task(adapter_folder(args.adapter))
    wanted = _complete if saved.task.kind == "causal-lm" else _label
    rows, load = wanted(args, saved, given_columns(args, saved))
    first = list(itertools.islice(rows, 1))  # a missing file is told before the model is loaded
    with WeightsProgress() as progress:
        answer = load(progress)
    rows = itertools.chain(first, rows)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for row in answer(chunk):
            print(json_line(row))
        sys.stdout.flush()


def _label(args: argparse.Namespace, saved: TaskFile, columns: Columns) -> tuple[Iterator[Row], Load]:
    from lora_jax.training.predict import load_predictor

    refuse_generation(args, saved.task.kind)
    text, pair = columns.text, columns.text_pair

    def load(progress: Progress) -> Answer:
        predictor = load_predictor(args.adapter, base=getattr(args, "base", None), progress=progress)

        def answer(chunk: list[Row]) -> Iterable[Row]:
            pairs = [row[pair] for row in chunk] if pair is not None else None
            predictions = predictor.predict([row[text] for row in chunk], pairs)
            for row, prediction in zip(chunk, predictions, strict=True):
                yield _labelled(row, prediction, saved, everything=args.all)

        return answer

    return _rows(args, text, pair), load


def _complete(args: argparse.Namespace, saved: TaskFile, columns: Columns) -> tuple[Iterator[Row], Load]:
    from lora_jax.training.completer import load_completer
    from lora_jax.training.errors import ConfigError

    if args.all:
        raise ConfigError("`all` is for adapters with labels, and this one is of a causal-lm.")
    options = generation_options(args)
    column = columns.messages or columns.prompt or columns.text

    def load(progress: Progress) -> Answer:
        completer = load_completer(args.adapter, base=getattr(args, "base", None), progress=progress)

        def answer(chunk: list[Row]) -> Iterable[Row]:
            prompts = _prompts([row[column] for row in chunk], columns, completer)
            for row, completion in zip(chunk, completer.complete(prompts, options), strict=True):
                yield {**_given(row, ("completion",)), "completion": completion.text}

        return answer

    return _rows(args, column, None, conversations=columns.messages is not None), load


def _prompts(values: list[Any], columns: Columns, completer: Completer) -> list[str]:
    from lora_jax.training.chat import render_prompts
    from lora_jax.training.documents import check_messages

    if columns.messages is None:
        return [value + (columns.separator if columns.prompt is not None else "") for value in values]
    talks = [
        [{"role": "user", "content": value}] if isinstance(value, str) else check_messages(value, f"prompt {row}")
        for row, value in enumerate(values, start=1)
    ]
    special = completer.special
    return render_prompts(talks, template=special.chat_template, tokens=special.texts, name="the prompts")


def _rows(
    args: argparse.Namespace, text: str, pair: str | None, *, conversations: bool = False
) -> Iterator[dict[str, Any]]:
    from lora_jax.training.data import SUFFIXES, read_examples
    from lora_jax.training.errors import DataError

    suffix = Path(args.input).suffix.lower()
    if suffix in SUFFIXES and suffix != ".jsonl":
        examples = read_examples(args.input, text=text, text_pair=pair)
        pairs = examples.pairs or itertools.repeat(None)
        yield from ({text: t} | ({pair: p} if pair else {}) for t, p in zip(examples.texts, pairs, strict=False))
        return
    as_json = args.jsonl or suffix == ".jsonl"
    if pair is not None and not as_json:
        raise DataError(f"This adapter takes pairs: give JSONL with the fields '{text}' and '{pair}'.")
    kinds = (str, list) if conversations else (str,)
    if args.input == "-":
        yield from _parsed(sys.stdin.buffer, "standard input", as_json, text, pair, kinds)
        return
    if not Path(args.input).is_file():
        raise DataError(f"{args.input} doesn't exist or is no file.")
    with Path(args.input).open("rb") as file:
        yield from _parsed(file, args.input, as_json, text, pair, kinds)


def _parsed(
    lines: BinaryIO | Iterable[bytes], name: str, as_json: bool, text: str, pair: str | None, kinds: tuple[type, ...]
) -> Iterator[dict[str, Any]]:
    from lora_jax.training.errors import DataError
    from lora_jax.training.file_checks import parse_object

    for number, raw in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from None
        if not line:
            continue
        row = parse_object(line, where) if as_json else {text: line}
        for column in (text, pair):
            if column is not None and not isinstance(row.get(column), kinds):
                raise DataError(
                    f"{where}: field '{column}' holds {row.get(column)!r:.80}, and a text is expected. The fields are "
                    f"{', '.join(row)}; choose with `--text`, `--text-pair`, `--prompt` or `--messages`."
                )
        yield row


def _labelled(row: Row, prediction: Prediction, saved: TaskFile, *, everything: bool) -> Row:
    result = {**_given(row, ("label", "probability")), "label": prediction.label}
    if prediction.probability is not None:
        result["probability"] = prediction.probability
        if everything:
            result["probabilities"] = dict(zip(saved.task.labels, prediction.probabilities, strict=True))
    return result


def _given(row: Row, ours: tuple[str, ...]) -> Row:
    """The fields of the input; those that have the name of one of ours as `given_...`."""
    return {("given_" + key if key in ours else key): value for key, value in row.items()}
