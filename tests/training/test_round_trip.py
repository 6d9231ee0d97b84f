"""From a file to texts and labels: whatever Python's own writers write comes back, character for character."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.study.grid.splits import write_rows
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.sources import read_examples
from lora_jax.training.examples import Examples
from lora_jax.training.task import make_task

# What readers are known to trip over, and a character of every plane. Drawn evenly: chance alone finds few of these.
PIECES = (
    *("a", "Ünïcode", "e\u0301", " ", ",", ";", "\t", '"', '""', "'", "\\", "\\n", "\\u0041", "\\ud800", "#", "=1+1"),
    # Line ends: those of files, and those that only `str.splitlines` knows.
    *("\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"),
    *("\ufeff", "\x00", "\x1a", "\x7f", "\u200b", "\ufffd", "\uffff"),
    *("NA", "null", "NaN", "None", "true", "inf", "1", "01", "007", "1.0", "1e5", "-0", "0x1F", "1_000", "١"),
    *("2024-01-02", "2024-01-02T03:04:05Z", "12:30", "sep=;", "{", "[]", "</s>", "text", "label"),
    *(chr(plane * 0x10000 + 0x1234) for plane in range(17) if plane),
    *("\U0001f600", "\U0010ffff"),
)
TSV_HAS_NONE_OF = ("\t", "\n", "\r")
Rows = list[dict[str, Any]]


def cell(rng: random.Random, without: tuple[str, ...] = ()) -> str:
    """A text that isn't blank, which readers refuse."""
    while True:
        text = "".join(rng.choices(PIECES, k=rng.choice((1, 1, 2, 3, 6))))
        if text.strip() and not any(character in text for character in without):
            return text


def anything(rng: random.Random) -> Any:
    """What a column that nobody asked for may hold."""
    kinds = (None, True, 1, 1.5, "2024-01-02", [], {}, [1, "a"], {"b": None}, float("nan"), 10**30)
    return rng.choice(kinds)


def encoded(text: str, rng: random.Random) -> bytes:
    return (b"\xef\xbb\xbf" if rng.random() < 0.5 else b"") + text.encode()


def write_tsv(path: Path, names: list[str], rows: Rows, rng: random.Random) -> None:
    end = rng.choice(("\n", "\r\n", "\r"))
    lines = [names, *([row[name] for name in names] for row in rows)]
    text = end.join("\t".join(line) for line in lines) + rng.choice(("", end, end * 2))
    path.write_bytes(encoded(text, rng))


def write_csv(path: Path, names: list[str], rows: Rows, rng: random.Random) -> None:
    file = io.StringIO(newline="")
    # With \n as its line end, Python 3.11 writes a text with \r in it without quotes.
    end = rng.choice(("\r\n", "\n"))
    quoting = csv.QUOTE_ALL if end == "\n" or rng.random() < 0.5 else csv.QUOTE_MINIMAL
    writer = csv.writer(file, quoting=quoting, lineterminator=end, delimiter=rng.choice(",;\t"))
    writer.writerow(names)
    writer.writerows([row[name] for name in names] for row in rows)
    path.write_bytes(encoded(file.getvalue(), rng))


def write_jsonl(path: Path, names: list[str], rows: Rows, rng: random.Random) -> None:
    end, ascii_only = rng.choice(("\n", "\r\n", "\n \n")), rng.random() < 0.5
    lines = [
        json.dumps({name: row[name] for name in rng.sample(names, len(names))}, ensure_ascii=ascii_only) for row in rows
    ]
    path.write_bytes(encoded(end.join(lines) + rng.choice(("", end)), rng))


def write_parquet(path: Path, names: list[str], rows: Rows, rng: random.Random) -> None:
    columns = {name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in names}
    kind = rng.choice((pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))
    pyarrow.parquet.write_table(pyarrow.table({name: column.cast(kind) for name, column in columns.items()}), path)


WRITERS = {".tsv": write_tsv, ".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_texts_and_labels_come_back(suffix, tmp_path):
    for seed in range(150):
        rng = random.Random(seed)
        without = TSV_HAS_NONE_OF if suffix == ".tsv" else ()
        labels = list(dict.fromkeys(cell(rng, without) for _ in range(3)))
        if len(labels) < 2:
            continue
        rows: Rows = [
            {"text": cell(rng, without), "b": cell(rng, without), "label": label, "": "", "other": "x"}
            for label in [*labels, *rng.choices(labels, k=5)]
        ]
        if suffix == ".jsonl":
            rows = [row | {"other": anything(rng)} for row in rows]
        names = rng.sample(["text", "b", "label", "", "other"], 5)
        path = tmp_path / f"a{suffix}"
        WRITERS[suffix](path, names, rows, rng)
        examples = read_examples(str(path), text="text", text_pair="b", label="label")
        assert examples.texts == [row["text"] for row in rows], seed
        assert examples.pairs == [row["b"] for row in rows], seed
        assert examples.labels == [row["label"] for row in rows], seed
        task = make_task("classification", examples)
        assert [task.labels[place] for place in task.encode(examples)] == [row["label"] for row in rows], seed


def test_rows_that_a_comparison_writes_come_back(tmp_path):
    config = TrainConfig(train="a.tsv", output="out", text="s", text_pair="b", label="y")
    for seed in range(30):
        rng = random.Random(seed)
        texts, pairs = ([cell(rng) for _ in range(6)] for _ in range(2))
        labels = [rng.choice((cell(rng), 1, "1", "01", 1.5, True)) for _ in range(6)]
        path = write_rows(Examples("a", texts, pairs, labels), config, tmp_path / "rows.jsonl")
        found = read_examples(path, text="s", text_pair="b", label="y")
        assert (found.texts, found.pairs, found.labels) == (texts, pairs, labels), seed


def test_a_number_and_its_text_are_one_label(tmp_path):
    """Of JSON, `"01"` is a text and `1` a number; both `1` and `"1"` are written 1."""
    path = tmp_path / "a.jsonl"
    labels = ["01", 1, "1", 1.0, "1.0", True, "true", "2024-01-02", "007", 10**30]
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    examples = read_examples(str(path), text="text", label="label")
    assert examples.labels is not None
    assert examples.labels == labels
    assert [type(label) for label in examples.labels] == [type(label) for label in labels]
    task = make_task("classification", examples)
    names = ["01", "1", "1", "1", "1.0", "true", "true", "2024-01-02", "007", str(10**30)]
    assert [task.labels[place] for place in task.encode(examples)] == names


def test_a_column_may_change_its_type_late(tmp_path):
    """Nothing is inferred from the first megabytes, nor from columns that nobody asked for."""
    path = tmp_path / "a.jsonl"
    first = [{"text": "2024-01-02", "label": 1, "x": None}] * 3 + [{"text": "12:30", "label": 1}] * 20_000
    last = [
        {"text": "007", "label": "1.5", "x": "new", "y": {"z": [1]}},
        {"text": "8", "label": 1.5, "x": [float("nan")]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*first, *last]))
    examples = read_examples(str(path), text="text", label="label")
    assert examples.labels is not None
    assert examples.texts[-3:] == ["12:30", "007", "8"]
    assert (examples.texts[0], examples.labels[0], examples.labels[-2:]) == ("2024-01-02", 1, ["1.5", 1.5])
