"""Reading labelled texts: what comes back, and what each bad file is told."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from lora_jax.training.data import read_examples
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
    "empty": ("a.tsv", b"", r"a\.tsv is empty: a file with at least one row"),
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
    "no object": ("a.jsonl", b"[1, 2]\n", r"row 1 \(line 1\) is a JSON list, and an object is expected"),
    "not Parquet": ("a.parquet", b"text,label\n", r"a\.parquet can't be read as \.parquet"),
    "empty text": ("a.tsv", b"text\tlabel\na\tx\n \ty\n", r"row 2: column 'text' is empty"),
    "no text": ("a.jsonl", b'{"text": "a", "label": 1}\n{"label": 1}\n', r"row 2: column 'text' holds None"),
    "text is a number": ("a.jsonl", b'{"text": 3, "label": 1}\n', r"row 1: column 'text' holds 3, and a text"),
    "no label": ("a.tsv", b"text\tlabel\na\tx\nb\t\n", r"row 2 has no label in column 'label'"),
    "label is a list": ("a.jsonl", b'{"text": "a", "label": [1]}\n', r"row 1: column 'label' holds \[1\]"),
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
    with pytest.raises(DataError, match=r"data\.pkl is no data file: one that ends in \.tsv, \.csv"):
        read_examples(source, text="text", label="label")


def test_neither_file_nor_hub_name():
    with pytest.raises(DataError, match=r"'a/b/c d' is neither a file nor the name of a data set"):
        read_examples("a/b/c d", text="text", label="label")
