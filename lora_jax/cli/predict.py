"""`lora-jax predict`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.text import json_line

from .arrivals import arriving_lines, chunks
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
    from lora_jax.inference.complete import Completer
    from lora_jax.models import Progress
    from lora_jax.training.examples import Columns
    from lora_jax.training.task_file import TaskFile

    Row = dict[str, Any]
    Answer = Callable[[list[Row]], Iterable[Row]]
    Load = Callable[[Progress], Answer]

NAME = "predict"
USAGE = "--adapter FOLDER [flags] [FILE]"
HELP = "label texts, or continue prompts, from lines, JSONL or a data file"
DESCRIPTION = """\
Labels texts; writes one JSON object a line, in the order of the input:
{"text": ..., "label": ..., "probability": ...}. With an adapter of a language model, continues prompts:
{"prompt": ..., "completion": ...}. Lines of standard input are answered as they
arrive, so it may stay open.

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
  lora-jax predict --adapter out prompts.txt --temperature 0.8 --top-p 0.9"""

_CHUNK = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="?", default="-", metavar="FILE", help="Texts; - is standard input. Default: -.")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="Folder of a run, or of its adapter.")
    parser.add_argument("--jsonl", action="store_true", help="Read standard input as JSONL.")
    parser.add_argument("--all", action="store_true", help="Add the probability of every label.")
    add_column_flags(parser)
    add_base_flag(parser)
    add_generation_flags(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.inference.classify import adapter_folder
    from lora_jax.training.task_file import read_task

    from .weights_progress import WeightsProgress

    saved = read_task(adapter_folder(args.adapter))
    wanted = _complete if saved.task.kind == "causal-lm" else _label
    left = _Left()
    rows, load = wanted(args, saved, given_columns(args, saved), left)
    # A missing file, or a first row that can't be used, is told before the model is loaded.
    first = list(itertools.islice((row for row in rows if row is not None), 1))
    with WeightsProgress() as progress:
        answer = load(progress)
    for chunk in chunks(itertools.chain(first, rows), _CHUNK):
        for row in answer(chunk):
            print(json_line(row))
        sys.stdout.flush()
    for note in left.notes():
        print(f"lora-jax predict: {in_flags(note, args.flags)}", file=sys.stderr)


@dataclasses.dataclass
class _Left:
    """What was left out of the input, told when all is answered.

    Attributes:
        cut: How many texts lost their end, being longer than `max_length` tokens.
        rows: Bad rows, in words.
    """

    cut: int = 0
    max_length: int = 0
    rows: str | None = None

    def notes(self) -> Iterator[str]:
        if self.rows is not None:
            yield self.rows
        if self.cut:
            yield f"{self.cut:,} texts truncated to {self.max_length} tokens"


def _label(
    args: argparse.Namespace, saved: TaskFile, columns: Columns, left: _Left
) -> tuple[Iterator[Row | None], Load]:
    from lora_jax.inference.classify import load_predictor
    from lora_jax.training.data.special_text import special_text_note

    note = _tell_once(args.flags)
    refuse_generation(args, saved.task.kind)
    text, pair = columns.text, columns.text_pair

    def load(progress: Progress) -> Answer:
        predictor = load_predictor(
            args.adapter,
            base=getattr(args, "base", None),
            escape_special_tokens=getattr(args, "escape_special_tokens", None),
            progress=progress,
        )

        def answer(chunk: list[Row]) -> Iterable[Row]:
            pairs = [row[pair] for row in chunk] if pair is not None else None
            if not predictor.escape_special_tokens:
                texts = (row[column] for row in chunk for column in (text, pair) if column is not None)
                note(special_text_note(texts, predictor.special_texts))
            encoded = predictor.encode([row[text] for row in chunk], pairs)
            predictions = predictor.predict_encoded(encoded)
            left.cut, left.max_length = left.cut + encoded.truncated, predictor.max_length
            for row, prediction in zip(chunk, predictions, strict=True):
                yield _labelled(row, prediction, saved, everything=args.all)

        return answer

    return _rows(args, text, pair, left), load


def _complete(
    args: argparse.Namespace, saved: TaskFile, columns: Columns, left: _Left
) -> tuple[Iterator[Row | None], Load]:
    from lora_jax.inference.complete import load_completer
    from lora_jax.training.data.special_text import special_text_note
    from lora_jax.training.errors import ConfigError

    note = _tell_once(args.flags)
    if args.all:
        raise ConfigError("`all` is for adapters with labels, and this one is of a causal-lm.")
    options = generation_options(args)
    column = columns.messages or columns.prompt or columns.text

    def load(progress: Progress) -> Answer:
        completer = load_completer(
            args.adapter,
            base=getattr(args, "base", None),
            escape_special_tokens=getattr(args, "escape_special_tokens", None),
            progress=progress,
        )

        def answer(chunk: list[Row]) -> Iterable[Row]:
            if not completer.escape_special_tokens:
                note(special_text_note(map(_said, (row[column] for row in chunk)), completer.special.added))
            prompts = _prompts([row[column] for row in chunk], columns, completer)
            for row, completion in zip(chunk, completer.complete(prompts, options), strict=True):
                yield {**given_fields(row, ("completion",)), "completion": completion.text}

        return answer

    return _rows(args, column, None, left, conversations=columns.messages is not None), load


def _tell_once(flags: Mapping[str, str]) -> Callable[[list[str]], None]:
    """Prints the first note that it is given, beside the answers."""
    told: list[str] = []

    def tell(notes: list[str]) -> None:
        if notes and not told:
            told.append(notes[0])
            print(f"note: {in_flags(notes[0], flags)}", file=sys.stderr)

    return tell


def _said(prompt: Any) -> str:
    """A prompt's text, or that of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content")) for message in prompt if isinstance(message, dict))


def _prompts(values: list[Any], columns: Columns, completer: Completer) -> list[str]:
    from lora_jax.training.data.chat import render_prompts
    from lora_jax.training.data.documents import WEIGHT, check_messages
    from lora_jax.training.data.special_text import check_marks, escape

    if columns.messages is None:
        return [value + (columns.separator if columns.prompt is not None else "") for value in values]
    talks = [
        [{"role": "user", "content": value}]
        if isinstance(value, str)
        else [
            {key: entry for key, entry in message.items() if key != WEIGHT}
            for message in check_messages(value, f"prompt {row}")
        ]
        for row, value in enumerate(values, start=1)
    ]
    special = completer.special
    if completer.escape_special_tokens:
        talks = [escape(talk, special.added) for talk in talks]
    prompts = render_prompts(talks, template=special.chat_template, tokens=special.texts, name="the prompts")
    if completer.escape_special_tokens:
        check_marks(prompts, "the prompts")
    return prompts


def _rows(
    args: argparse.Namespace, text: str, pair: str | None, left: _Left, *, conversations: bool = False
) -> Iterator[Row | None]:
    from lora_jax.training.data.sources import SUFFIXES, read_examples
    from lora_jax.training.errors import DataError

    suffix, skip = Path(args.input).suffix.lower(), getattr(args, "skip_bad_rows", False)
    if suffix in SUFFIXES and suffix != ".jsonl":
        examples = read_examples(args.input, text=text, text_pair=pair, skip_bad_rows=skip)
        left.rows = examples.left_out
        pairs = examples.pairs or itertools.repeat(None)
        yield from ({text: t} | ({pair: p} if pair else {}) for t, p in zip(examples.texts, pairs, strict=False))
        return
    as_json = args.jsonl or suffix == ".jsonl"
    if pair is not None and not as_json:
        raise DataError(f"This adapter takes pairs: give JSONL with the fields '{text}' and '{pair}'.")
    kinds = (str, list) if conversations else (str,)
    if args.input == "-":
        stream = arriving_lines(sys.stdin.buffer)
        yield from _parsed(stream, "standard input", as_json, text, pair, kinds, left if skip else None)
        return
    if not Path(args.input).is_file():
        raise DataError(f"{args.input} doesn't exist or is no file.")
    with Path(args.input).open("rb") as file:
        yield from _parsed(file, args.input, as_json, text, pair, kinds, left if skip else None)


def _parsed(
    stream: Iterable[bytes | None],
    name: str,
    as_json: bool,
    text: str,
    pair: str | None,
    kinds: tuple[type, ...],
    left: _Left | None,
) -> Iterator[Row | None]:
    """A row for each line that isn't blank, and `None` where the next one isn't there yet.

    Bad ones are told of in `left`, or refused where that is `None`.
    """
    from lora_jax.training.data.documents import check_messages
    from lora_jax.training.data.file_formats import read_lines
    from lora_jax.training.data.table import BadRows
    from lora_jax.training.errors import DataError

    bad, count = BadRows(name, skip=True), 0
    for line in read_lines(stream, name):
        if line is None:
            yield None
            continue
        try:
            where = f"{name}, line {line.number}"
            if line.fault is not None:
                raise DataError(f"{where} {line.fault}.")
            row = _parse(line.text.strip(), where, as_json, text, pair, kinds)
            if row and isinstance(row[text], list):
                check_messages(row[text], f"{where}: field '{text}'")
        except DataError as error:
            if left is None:
                raise
            bad.add(line.number, str(error).removeprefix(f"{name}, "))
            row = {}
        if row is not None:
            count += 1
        if row:
            yield row
    if left is not None and bad:
        left.rows = bad.describe(count)


def _parse(line: str, where: str, as_json: bool, text: str, pair: str | None, kinds: tuple[type, ...]) -> Row | None:
    from lora_jax.text import listed
    from lora_jax.training.data.json_lines import check_writable, parse_object
    from lora_jax.training.data.table import short_repr
    from lora_jax.training.errors import DataError

    if not line:
        return None
    row = parse_object(line, where) if as_json else {text: line}
    if as_json:
        check_writable(row, where)  # its fields go out again
    for column in (text, pair):
        if column is not None and not isinstance(row.get(column), kinds):
            raise DataError(
                f"{where}: field '{column}' must be a text, got {short_repr(row.get(column))}. The fields are "
                f"{listed(list(row), 20)}; choose with `text`, `text_pair`, `prompt` or `messages`."
            )
    return row


def _labelled(row: Row, prediction: Prediction, saved: TaskFile, *, everything: bool) -> Row:
    ours = ("label", "probability", *(("probabilities",) if everything else ()))
    result = {**given_fields(row, ours), "label": prediction.label}
    if prediction.probability is not None:
        result["probability"] = prediction.probability
        if everything:
            result["probabilities"] = dict(zip(saved.task.labels, prediction.probabilities, strict=True))
    return result


def given_fields(row: Row, ours: tuple[str, ...]) -> Row:
    """The fields of the input; those that have the name of one of ours as `given_...`, until that is free."""
    given: Row = {}
    for key, value in row.items():
        name = key
        while name in ours or (name != key and name in row):
            name = f"given_{name}"
        given[name] = value
    return given
