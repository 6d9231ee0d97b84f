"""Reading labelled texts: what comes back, and what each bad file is told."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import resource
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest

from lora_jax.training.config import TrainConfig
from lora_jax.training.data import file_formats as data_files
from lora_jax.training.data.labelled import read_splits
from lora_jax.training.data.sources import read_examples
from lora_jax.training.errors import DataError

ROWS = [('say "hi', "NA"), ("01", "null"), ("naïve — ünïcode", "x y")]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_tsv(tmp_path: Path) -> str:
    return write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))


def as_csv(tmp_path: Path) -> str:
    quoted = "".join('"{}","{}"\n'.format(text.replace('"', '""'), label) for text, label in ROWS)
    return write(tmp_path / "a.csv", "text,label\n" + quoted)


def as_jsonl(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in ROWS))


def as_parquet(tmp_path: Path) -> str:
    table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


@pytest.mark.parametrize("make", [as_tsv, as_csv, as_jsonl, as_parquet])
def test_every_format_gives_the_same_strings(make, tmp_path):
    # Quotes, leading zeros, "NA" and "null" come back as they were written.
    examples = read_examples(make(tmp_path), text="text", label="label")
    assert examples.texts == [text for text, _ in ROWS]
    assert examples.labels == [label for _, label in ROWS]
    assert examples.pairs is None
    assert len(examples) == 3


@pytest.mark.parametrize("make", [as_tsv, as_csv, as_jsonl, as_parquet])
@pytest.mark.parametrize("name", ["a[1]", "*", "b::a", "gs:", "a?"])
def test_a_name_is_no_pattern_and_no_scheme(make, name, tmp_path):
    """Not of other files beside it, whose rows would be learnt without a word."""
    given = Path(make(tmp_path))
    path = given.with_name(name + given.suffix)
    given.rename(path)
    given.with_name("b1" + given.suffix).write_bytes(path.read_bytes())
    given.with_name("ab" + given.suffix).write_bytes(path.read_bytes())
    assert read_examples(str(path), text="text", label="label").texts == [text for text, _ in ROWS]


def test_byte_order_mark_line_ends_and_blank_lines(tmp_path):
    source = write(tmp_path / "a.tsv", b"\xef\xbb\xbftext\tlabel\r\na b\tx\r\n\r\nc\ty\r\n")
    examples = read_examples(source, text="text", label="label")
    assert examples.texts == ["a b", "c"]
    assert examples.labels == ["x", "y"]


def test_csv_field_with_a_line_end(tmp_path):
    source = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\nb,y\n')
    assert read_examples(source, text="text", label="label").texts == ["two\nlines", "b"]


def test_pairs(tmp_path):
    source = write(tmp_path / "a.tsv", "s1\ts2\tlabel\na\tb\t1\nc\td\t0\n")
    examples = read_examples(source, text="s1", text_pair="s2", label="label")
    assert (examples.texts, examples.pairs, examples.labels) == (["a", "c"], ["b", "d"], ["1", "0"])


def test_jsonl_labels_keep_their_types(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    assert read_examples(source, text="text", label="label").labels == [1, 0]


def test_hub_name_split_and_class_labels(monkeypatch):
    asked = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_examples("owner/name", text="text", label="label", split="validation").labels == ["pos", "neg"]
    read_examples("glue:sst2@train[:10%]", text="text", label="label")
    assert asked == [("owner/name", None, "validation"), ("glue", "sst2", "train[:10%]")]


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(name, subset, *, split):
        raise RuntimeError("no network\nlong tail")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"no file owner/name, and the data set 'owner/name' can't .*no network$"):
        read_examples("owner/name", text="text", label="label")


def test_hidden_test_labels(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(DataError, match=r"owner/name, row 2 has no label in column 'label'"):
        read_examples("owner/name", text="text", label="label")


BAD_FILES = {
    "empty": ("a.tsv", b"", r"a\.tsv is empty\."),
    "only blank lines": ("a.csv", b"\n\n", r"a\.csv is empty"),
    "only a header": ("a.tsv", b"text\tlabel\n", r"a\.tsv has a header and no rows"),
    "no such column": ("a.tsv", b"sentence\tlabel\na\tx\n", r"has no column 'text'; its columns are sentence, label"),
    "column twice": ("a.tsv", b"text\ttext\na\tx\n", r"has the column 'text' more than once"),
    "latin-1 TSV": ("a.tsv", b"text\tlabel\na\tx\ncaf\xe9\ty\n", r"row 2 \(line 3\) is not UTF-8: byte 4 of .* 0xe9"),
    "latin-1 header": ("a.tsv", b"t\xe9xt\tlabel\na\tx\n", r"the header \(line 1\) is not UTF-8"),
    "latin-1 CSV": (
        "a.csv",
        b'text,label\n"a\nb",x\ncaf\xe9,y\n',
        r"row 2 \(line 4\) is not UTF-8",
    ),
    "latin-1 JSONL": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xff"}\n', r"row 2 \(line 2\) is not UTF-8"),
    "too few fields": ("a.tsv", b"text\tlabel\na\tx\nb\n", r"row 2 \(line 3\) has 1 fields, and the header has 2"),
    "too many fields": ("a.csv", b"text,label\na,x\nb,y,z\n", r"row 2 \(line 3\) has 3 fields, and the header has 2"),
    "open quote": ("a.csv", b'text,label\n"a"b,x\n', r"line 2: this is not CSV"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', r"row 2 \(line 2\) is not JSON"),
    "no object": ("a.jsonl", b"[1, 2]\n", r"row 1 \(line 1\) must be a JSON object .*, got a list"),
    "not Parquet": ("a.parquet", b"text,label\n", r"a\.parquet can't be read as \.parquet"),
    "empty text": ("a.tsv", b"text\tlabel\na\tx\n \ty\n", r"row 2: column 'text' is empty"),
    "no text": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"label": 1}\n',
        r"row 2: column 'text' must be .*, got None",
    ),
    "text is a number": ("a.jsonl", b'{"text": 3, "label": 1}\n', r"row 1: column 'text' must be a text, got 3"),
    "no label": ("a.tsv", b"text\tlabel\na\tx\nb\t\n", r"row 2 has no label in column 'label'"),
    "label is a list": ("a.jsonl", b'{"text": "a", "label": [1]}\n', r"row 1: column 'label' must be .*, got \[1\]"),
    "label is a NaN": (
        "a.jsonl",
        b'{"text": "a", "label": NaN}',
        r"row 1: column 'label' must be a name or a number, got nan",
    ),
    "label is an infinity": ("a.jsonl", b'{"text": "a", "label": 1e999}', r"row 1: column 'label' must be .*, got inf"),
    "name twice": (
        "a.jsonl",
        b'{"text": "a", "label": 1, "label": 2}',
        r"row 1 \(line 1\) has the name 'label' more than",
    ),
    "name twice inside": (
        "a.jsonl",
        b'{"text": "a", "label": 1, "x": {"b": 1, "b": 2}}',
        r"row 1 .* has the name 'b' more",
    ),
    "half a character": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n\n{"text": "b\\ud83d", "label": 1}\n',
        r"row 2: column 'text' has half a character \(the lone surrogate \\ud83d\) at position 2 \(line 3\)",
    ),
    "half a character in a label": (
        "a.jsonl",
        b'{"text": "a", "label": "\\udc00"}',
        r"row 1: column 'label' has half a",
    ),
    "digits": (
        "a.jsonl",
        b'{"text": "a", "label": ' + b"1" * 5000 + b"}",
        r"row 1 \(line 1\) has a number with thousands",
    ),
    "nesting": ("a.jsonl", b'{"text": "a", "label": ' + b"[" * 100_000, r"row 1 \(line 1\) is nested too deeply"),
    "nesting of objects": ("a.jsonl", b'{"text": ' * 100_000, r"row 1 \(line 1\) is nested too deeply"),
    "deep label": ("a.jsonl", b'{"text": "a", "label": ' + b"[" * 800 + b"]" * 800 + b"}", r"row 1: .* got \[\[\[\["),
    "UTF-16": ("a.csv", "text,label\na,x\n".encode("utf-16"), r"a\.csv is UTF-16: save it as UTF-8"),
    "a spreadsheet named CSV": ("a.csv", b"PK\x03\x04...", r"a\.csv is a spreadsheet or an archive: open it and save"),
    "Parquet named JSONL": ("a.jsonl", b"PAR1...", r"a\.jsonl is Parquet: give it the ending \.parquet"),
    "commas in a TSV": (
        "a.tsv",
        b"text,label\na,x\n",
        r"columns are text,label\. Its columns are separated by commas: give",
    ),
    "semicolons in a TSV": (
        "a.tsv",
        b"label;text\nx;a\n",
        r"separated by semicolons: give it the ending \.csv",
    ),
    "quote left open": ("a.csv", b'text,label\na,x\n"b,x\nc,y\n', r"row 2, line 4: this is not CSV"),
    "label column twice": ("a.csv", b"text,label,label\na,x,y\n", r"has the column 'label' more than once"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named_with_its_row(case, tmp_path):
    name, content, message = BAD_FILES[case]
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_examples(source, text="text", label="label")


def test_missing_file_names_those_beside_it(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\na\tx\n")
    with pytest.raises(DataError, match=r"trian\.tsv doesn't exist\. Data files in .*: train\.tsv"):
        read_examples(str(tmp_path / "trian.tsv"), text="text", label="label")


def test_other_kinds_of_files_are_refused(tmp_path):
    source = write(tmp_path / "data.pkl", b"\x80\x04")
    with pytest.raises(DataError, match=r"data\.pkl is not a data file: its name must end in \.tsv, \.csv"):
        read_examples(source, text="text", label="label")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.xlsx", r"data\.xlsx is a spreadsheet: save it as CSV \(UTF-8\) first"),
        ("somewhere/Data.XLS", r"Data\.XLS is a spreadsheet"),
        ("table.ods", r"is a spreadsheet"),
        ("report.docx", r"report\.docx is a document: save its table as CSV \(UTF-8\) first"),
        ("rows.csv.gz", r"rows\.csv\.gz is compressed: unpack it first"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_office_files_are_refused_at_once(name, message, exists, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    if exists:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"PK")
    with pytest.raises(DataError, match=message):
        read_examples(name, text="text", label="label")


@pytest.mark.parametrize("source", ["./train", "../train", "-x", "a" * 5000])
def test_what_is_no_name_on_the_hub_is_not_asked_for(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"is neither a file nor|is not a file name"):
        read_examples(source, text="text")


@pytest.mark.parametrize("suffix", data_files.READERS)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_has_no_end_is_not_read(make, suffix, tmp_path):
    make(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=r"is a (pipe|device), and a regular file is expected here"):
        read_examples(str(tmp_path / f"a{suffix}"), text="text")


# ----------------------------------------------------------------------------------------------- what doesn't matter


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b",text,label\n0,a,x\n1,b,y\n"),  # an index, as pandas writes it
        ("a.csv", b"text,label,\na,x,\nb,y,\n"),
        ("a.csv", b"text,label,,\na,x\nb,y,,\n"),
        ("a.tsv", b"\ttext\tlabel\n0\ta\tx\n1\tb\ty\n"),
        ("a.csv", b"z,text,z,label\n0,a,1,x\n0,b,1,y\n"),
        ("a.csv", b"text;label\na;x\nb;y\n"),
        ("a.csv", b'\xef\xbb\xbf"text";"label"\r\n"a";"x"\r\nb;y\r\n'),
        ("a.csv", b"text\tlabel\na\tx\nb\ty\n"),
        ("a.jsonl", b'{"text": "a", "label": "x", "z": NaN, "u": "\\ud800"}\n{"text": "b", "z": [1], "label": "y"}'),
    ],
)
def test_columns_that_nobody_asked_for_do_not_matter(name, content, tmp_path):
    examples = read_examples(write(tmp_path / name, content), text="text", label="label")
    assert (examples.texts, examples.labels) == (["a", "b"], ["x", "y"])


def test_parquet_reads_the_columns_asked_for(tmp_path):
    """Among them a categorical one; beside them what has no place in a table of texts, or a name twice."""
    folder = tmp_path / "label=3"  # no column, whatever a partitioned data set would have it mean
    folder.mkdir()
    columns = [["a", "b"], pyarrow.array(["x", "y"]).dictionary_encode(), [None, None], [1, 2], [{"z": 1}, None]]
    names = ["te.xt", "label", "z", "z", "te"]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(list(map(pyarrow.array, columns)), names), folder / "a.parquet"
    )
    examples = read_examples(str(folder / "a.parquet"), text="te.xt", label="label")
    assert (examples.texts, examples.labels) == (["a", "b"], ["x", "y"])


def test_class_names_in_parquet(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    with pyarrow.OSFile(str(tmp_path / "a.parquet"), "wb") as file:
        pyarrow.parquet.write_table(table.data.table, file)
    with pytest.raises(DataError, match=r"row 3 has no label in column 'label'"):
        read_examples(str(tmp_path / "a.parquet"), text="text", label="label")
    examples = read_examples(str(tmp_path / "a.parquet"), text="text", label="label", skip_bad_rows=True)
    assert examples.labels == ["pos", "neg"]


# ---------------------------------------------------------------------------------------------------------- bad rows

# Row by row: good, one field, good, empty text, not UTF-8, no label, good.
MESSY = {
    "a.tsv": b"text\tlabel\na\tx\nb\n\nc\ty\n \tx\n\xff\tx\nd\t\ne\tx\n",
    "a.csv": b'text,label\n"a",x\nb\n\nc,y\n" ",x\n\xff,x\nd,\ne,x\n',
    "a.jsonl": b'{"text": "a", "label": "x"}\n{"text"\n\n{"text": "c", "label": "y"}\n{"text": " ", "label": "x"}\n'
    b'{"text": "\xff"}\n{"text": "d"}\n{"text": "e", "label": "x"}\n',
}


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_labels_that_the_task_cannot_use_are_bad_rows(kind, tmp_path):
    """In training rows and in those that a task is given for; told of with other bad rows, or skipped and counted."""
    bad = "many" if kind == "regression" else 0.5
    lines = [{"text": "a", "label": label} for label in ("0", bad, "1", "0")] + [{"text": " ", "label": "0"}]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(train=source, task=kind, output=str(tmp_path / "run"))
    with pytest.raises(
        DataError, match=r"2 bad rows: row 2 has the label .* \(line 2\); row 5: column 'text' is empty"
    ):
        read_splits(config, {"train": source})
    skipping = dataclasses.replace(config, skip_bad_rows=True)
    other = write(tmp_path / "dev.jsonl", "".join(json.dumps({"text": "b", "label": x}) + "\n" for x in ("1", "2x")))
    task, splits = read_splits(skipping, {"train": source, "dev": other})
    assert (splits["train"].labels, splits["train"].skipped) == (["0", "1", "0"], 2)
    assert (splits["dev"].labels, splits["dev"].skipped) == (["1"], 1)
    assert task.encode(splits["dev"]).tolist() == [1]


@pytest.mark.parametrize("name", MESSY)
def test_all_bad_rows_are_told_of_at_once(name, tmp_path):
    # Lines count from the first of the file: a header is one.
    first = 1 if name == "a.jsonl" else 2
    told = (
        rf"{name} has 4 bad rows: row 2 \(line {first + 1}\) .*; "
        rf"row 4: column 'text' is empty \(line {first + 4}\); row 5 \(line {first + 5}\) is not UTF-8: .*; "
        rf"row 6 has no label in column 'label' \(line {first + 6}\)\. Fix or remove them, .*`skip_bad_rows=True`"
    )
    with pytest.raises(DataError, match=told):
        read_examples(write(tmp_path / name, MESSY[name]), text="text", label="label")


@pytest.mark.parametrize("name", MESSY)
def test_bad_rows_are_left_out_on_request(name, tmp_path):
    source = write(tmp_path / name, MESSY[name])
    examples = read_examples(source, text="text", label="label", skip_bad_rows=True)
    assert (examples.texts, examples.labels) == (["a", "c", "e"], ["x", "y", "x"])
    assert list(examples.numbers) == [1, 3, 7]
    assert examples.skipped == 4
    assert examples.left_out is not None
    assert examples.left_out.startswith("4 of 7 rows skipped: row 2 (line ")


def test_rows_keep_their_numbers_when_others_are_left_out(tmp_path):
    source = write(tmp_path / "a.tsv", b"text\tlabel\na\nb\tx\nc\ty\nd\tz\n")
    from lora_jax.training.task import Classification

    examples = read_examples(source, text="text", label="label", skip_bad_rows=True)
    with pytest.raises(DataError, match=r"a\.tsv, row 4 has the label 'z'"):
        Classification(labels=("x", "y")).encode(examples)


def test_nothing_is_left_of_bad_rows(tmp_path):
    source = write(tmp_path / "a.jsonl", b"[]\n3\n")
    with pytest.raises(DataError, match=r"has no usable row: row 1 \(line 1\) must be a JSON object .*; row 2"):
        read_examples(source, text="text", skip_bad_rows=True)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'text,label\n"say "hi" now",x\nb,y\n', ["b"]),  # the quotes of the line are even: there it ends
        (b'text,label\n"a"b\nc",x\nd,y\n', ["d"]),  # its second line isn't a row, though it looks like one
    ],
)
def test_wrong_quotes_do_not_make_rows(content, texts, tmp_path):
    source = write(tmp_path / "a.csv", content)
    assert read_examples(source, text="text", label="label", skip_bad_rows=True).texts == texts


def test_a_row_without_an_end_is_not_left_out(tmp_path):
    source = write(tmp_path / "a.csv", b'text,label\na,x\n"b,x\nc,y\n')
    with pytest.raises(DataError, match=r"row 2, line 4: .* can't be skipped, as its end can't be found"):
        read_examples(source, text="text", label="label", skip_bad_rows=True)


# ---------------------------------------------------------------------------------------------------------- large files


@pytest.mark.parametrize("suffix", data_files.READERS)
def test_a_long_field(suffix, tmp_path):
    long, path = "long, " * 200_000, tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [long], "label": ["x"]}), path)
    else:
        line = {".tsv": f"text\tlabel\n{long}\tx", ".csv": f'text,label\n"{long}",x'}.get(suffix)
        path.write_text(line or json.dumps({"text": long, "label": "x"}))
    before = csv.field_size_limit()
    assert read_examples(str(path), text="text", label="label").texts == [long]
    assert csv.field_size_limit() == before


def test_a_comparison_of_columns_or_rows_is_not_quadratic(tmp_path):
    names = [f"column {i}" for i in range(50_000)]
    sources = {
        "many.csv": ",".join([*names, "text"]) + "\n" + "1," * 50_000 + "a\n",
        "many.tsv": "\t".join([*names, "text"]) + "\n" + "1\t" * 50_000 + "a\n",
        "many.jsonl": json.dumps(dict.fromkeys(names, 1) | {"text": "a"}),
    }
    started = time.monotonic()
    for name, content in sources.items():
        source = write(tmp_path / name, content)
        assert read_examples(source, text="text").texts == ["a"]
        with pytest.raises(
            DataError, match=r"has no column 'other'; its columns are column 0, .* and [\d,]+ more\."
        ) as told:
            read_examples(source, text="other")
        assert len(str(told.value)) < 2000
    wide = write(tmp_path / "wide.csv", f"text,{'x' * 10**6}\n" + "a\n" * 999)
    with pytest.raises(DataError, match=r"has 999 bad rows: row 1 \(line 2\) has 1 fields") as told:
        read_examples(wide, text="text")
    assert len(str(told.value)) < 10_000
    assert time.monotonic() - started < 30


def test_a_row_of_nothing_but_lists_takes_no_memory(tmp_path):
    """63 MB of `[]` would be 1.3 GB of lists; as lines of their own, a million bad rows."""
    lists = ",".join(["[]"] * 21_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = write(tmp_path / "a.jsonl", '{"text": "a", "x": [' + lists + "]}")
    with pytest.raises(DataError, match=r"row 1 \(line 1\) has more than 5,000,000 values"):
        read_examples(source, text="text")
    source = write(tmp_path / "a.jsonl", "[]\n" * 1_000_000)
    with pytest.raises(DataError, match=r"has 1,000 bad rows or more: row 1 .* and 980 more"):
        read_examples(source, text="text")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB


def test_brackets_and_quotes_in_a_text_are_no_values(tmp_path):
    code = ',,"\\' * 3_000_000  # five million values are the most
    source = write(tmp_path / "a.jsonl", json.dumps({"text": code, "label": 1}))
    assert read_examples(source, text="text").texts == [code]


def test_bytes_that_are_no_text_in_parquet(tmp_path):
    ends = pyarrow.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, pyarrow.py_buffer(b"a\xff")])
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 2 is not UTF-8"):
        read_examples(str(tmp_path / "a.parquet"), text="text")


def test_neither_file_nor_hub_name():
    with pytest.raises(DataError, match=r"'a/b/c d' is neither a file nor the name of a data set"):
        read_examples("a/b/c d", text="text", label="label")
