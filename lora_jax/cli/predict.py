"""`lora-jax predict`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .options import add_base_argument, add_column_arguments

if TYPE_CHECKING:
    from lora_jax.training.predict import Prediction
    from lora_jax.training.task_file import TaskFile

NAME = "predict"
HELP = "label texts from lines, JSONL or a data file"
DESCRIPTION = """\
Labels texts; writes one JSON object a line, in the order of the input:
{"text": ..., "label": ..., "probability": ...}.

The input has one text a line (blank lines are left out); one JSON object a line where it ends in .jsonl or with
--jsonl, whose other fields are passed through (its own `label` as `given_label`); or columns where it ends in .tsv,
.csv or .parquet."""
EPILOG = """\
examples:
  lora-jax predict --adapter out messages.txt
  echo "where is my order?" | lora-jax predict --adapter out
  lora-jax predict --adapter out --text sentence data.jsonl > labelled.jsonl"""

_CHUNK = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="?", default="-", metavar="FILE", help="texts; - (default) is standard input")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="a run's folder, or the adapter in it")
    parser.add_argument("--jsonl", action="store_true", help="standard input is JSONL")
    parser.add_argument("--all", action="store_true", help="add the probability of every label")
    add_column_arguments(parser)
    add_base_argument(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax.training.predict import adapter_folder, load_predictor
    from lora_jax.training.task_file import read_task

    from .weights_progress import WeightsProgress

    saved = read_task(adapter_folder(args.adapter))
    text, pair = getattr(args, "text", saved.text), getattr(args, "text_pair", saved.text_pair)
    rows = _rows(args, saved, text, pair)
    first = list(itertools.islice(rows, 1))  # a missing file is told before the model is loaded
    with WeightsProgress() as progress:
        predictor = load_predictor(args.adapter, base=getattr(args, "base", None), progress=progress)
    rows = itertools.chain(first, rows)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        pairs = [row[pair] for row in chunk] if pair is not None else None
        for row, prediction in zip(chunk, predictor.predict([row[text] for row in chunk], pairs), strict=True):
            print(json.dumps(_output(row, prediction, saved, everything=args.all), ensure_ascii=False))
        sys.stdout.flush()


def _rows(args: argparse.Namespace, saved: TaskFile, text: str, pair: str | None) -> Iterator[dict[str, Any]]:
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
    if args.input == "-":
        yield from _parsed(sys.stdin.buffer, "standard input", as_json, text, pair)
        return
    if not Path(args.input).is_file():
        raise DataError(f"{args.input} doesn't exist or is no file.")
    with Path(args.input).open("rb") as file:
        yield from _parsed(file, args.input, as_json, text, pair)


def _parsed(
    lines: BinaryIO | Iterable[bytes], name: str, as_json: bool, text: str, pair: str | None
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
            if column is not None and not isinstance(row.get(column), str):
                raise DataError(
                    f"{where}: field '{column}' holds {row.get(column)!r:.80}, and a text is expected. The fields are "
                    f"{', '.join(row)}; choose with `--text` and `--text-pair`."
                )
        yield row


def _output(row: dict[str, Any], prediction: Prediction, saved: TaskFile, *, everything: bool) -> dict[str, Any]:
    result = {("given_" + key if key in ("label", "probability") else key): value for key, value in row.items()}
    result["label"] = prediction.label
    if prediction.probability is not None:
        result["probability"] = prediction.probability
        if everything:
            result["probabilities"] = dict(zip(saved.task.labels, prediction.probabilities, strict=True))
    return result
