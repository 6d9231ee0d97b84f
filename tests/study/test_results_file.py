"""Rows on disk: whole or not at all."""

from __future__ import annotations

import json

import pytest

from lora_jax.study.grid.result_row import ResultRow
from lora_jax.study.runs.results import ResultsFile
from lora_jax.training.errors import RunFolderError
from tests.result_rows import result_row


def row(name: str, error: str | None = None) -> ResultRow:
    return {
        **result_row(name, candidate="c", score=None if error else 0.5, error=error),
        "content": {"text": "größer\u2028 <b>"},
    }


def test_rows_come_back(tmp_path):
    path = tmp_path / "results.jsonl"
    results = ResultsFile(path)
    assert results.rows == {}
    results.append(row("a"))
    results.append(row("b", "broke"))
    assert ResultsFile(path).rows == results.rows == {"a": row("a"), "b": row("b", "broke")}


def test_half_a_line_at_the_end_is_taken_away(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsFile(path).append(row("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-9])
    results = ResultsFile(path)
    assert path.read_bytes() == whole
    results.append(row("b"))
    assert list(ResultsFile(path).rows) == ["a", "b"]


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsFile(path).append(row("a"))
    path.write_text(path.read_text() + '{"id": "b"}\n')
    with pytest.raises(RunFolderError, match=r"results.jsonl, line 2 isn't a row of a comparison"):
        ResultsFile(path)


def test_failures_are_forgotten_on_request(tmp_path):
    path = tmp_path / "results.jsonl"
    results = ResultsFile(path)
    results.append(row("a"))
    results.append(row("b", "broke"))
    assert results.forget_failures() == 1
    assert list(results.rows) == list(ResultsFile(path).rows) == ["a"]


def test_what_cannot_be_written_is_told(tmp_path):
    with pytest.raises(RunFolderError, match=r"can't be written: .*The earlier rows are intact"):
        ResultsFile(tmp_path / "missing" / "results.jsonl").append(row("a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "its `id` is invalid"),
        ({"error": 0}, "its `error` is invalid"),
        ({"rate": "1"}, "its `rate` is invalid"),
        ({"seconds": float("nan")}, "its `seconds` is invalid"),
        ({"metric": ["a"], "metrics": {"dev": {"a": 1}}}, "its `metrics` lack its `metric`"),
        ({"metric": "a", "metrics": {"dev": {"b": 1}}}, "its `metrics` lack its `metric`"),
        ({"metric": "a", "metrics": []}, "its `metrics` lack its `metric`"),
    ],
)
def test_a_row_of_other_types_is_named(change, message, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("a") | change) + "\n")
    with pytest.raises(RunFolderError, match=rf"results.jsonl, line 1 isn't a row of a comparison: {message}"):
        ResultsFile(path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "7" * 5_000 + "}", '{"id": "a", "id": "b"}', "\x00", "3"])
def test_a_line_that_would_break_the_reader_is_named(line, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RunFolderError, match=r"results.jsonl, line 1 isn't a row of a comparison"):
        ResultsFile(path)


@pytest.mark.parametrize("change", [('"error":null', '"error":"x"'), ('"text"', '"txet"'), ("sha256:", "sha256:0")])
def test_a_row_that_was_changed_is_named(change, tmp_path):
    path = tmp_path / "results.jsonl"
    results = ResultsFile(path)
    results.append(row("a"))
    results.append(row("b"))
    first, second, _ = path.read_text(encoding="utf-8").split("\n")
    second = second.replace('": ', '":').replace(*change)
    path.write_text(f"{first}\n{second}\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"results.jsonl, line 2 isn't what its `checksum` was written for"):
        ResultsFile(path)


def test_rows_of_earlier_versions_have_no_checksum(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("a")) + "\n")
    results = ResultsFile(path)
    assert results.rows == {"a": row("a")}
    results.append(row("b", "broke"))
    results.forget_failures()
    assert ResultsFile(path).rows == {"a": row("a")}
