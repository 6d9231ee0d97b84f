"""Texts of others are shown and not obeyed: by a terminal, a spreadsheet, JSON, a page."""

from __future__ import annotations

import csv
import io
import json

import pytest

from lora_jax.text import clipped, csv_text, json_line, nearest_name, printable

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2069\u2028\r\n\t\x00\ud800\ufeff\x7f"


def is_plain(text: str) -> bool:
    return text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größer 大きい العربية 👩\u200d👩\u200d👧", "größer 大きい العربية 👩\u200d👩\u200d👧"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", r"\x1b]8;;http://x\x07link\x1b]8;;\x07"),
        ("a\x9b2Jb", r"a\x9b2Jb"),
        ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
        ("safe\u202egpj.exe", r"safe\u202egpj.exe"),
        ("half \ud800", r"half \ud800"),
        (3, "3"),
    ],
)
def test_control_characters_are_written_out(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_nothing_that_moves_a_cursor_is_left() -> None:
    assert is_plain(printable(HOSTILE))
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"
    every = "".join(map(chr, range(0x3000)))
    assert not [character for character in printable(every) if ord(character) < 32 or 127 <= ord(character) < 160]


def test_json_is_the_same_and_obeyed_by_no_terminal() -> None:
    value = {HOSTILE: [HOSTILE, 1.5, None], "größer": "大きい"}
    line = json_line(value)
    assert json.loads(line) == value
    assert is_plain(line)
    line.encode()
    assert "größer" in line


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        (" =1+1", "' =1+1"),
        ("\t=1+1", r"\t=1+1"),  # the tab isn't one any more
        ("\uff1d1+1", "'\uff1d1+1"),
        ("\x1b[2J", r"\x1b[2J"),
        ("two\nlines", r"two\nlines"),
        ('a "quoted", text', 'a "quoted", text'),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("-inf", "-inf"),
        ("r=2", "r=2"),
        (-0.5, "-0.5"),
        (3, "3"),
        (None, ""),
    ],
)
def test_a_cell_is_text_or_a_number_and_no_formula(cell: object, written: str) -> None:
    rows = list(csv.reader(io.StringIO(csv_text(("=name", "value"), [(cell, 1.5)]))))
    assert rows == [["'=name", "value"], [written, "1.5"]]


def test_long_names_lose_their_middle() -> None:
    assert clipped("short") == "short"
    assert clipped("a" * 50 + "b" * 50, 21) == "a" * 9 + " … " + "b" * 9
    assert len(clipped("x" * 1_000_000)) == 200


def test_the_nearest_name_is_found_among_any() -> None:
    assert nearest_name("learning_rat", ["rank", "learning_rate"]) == "learning_rate"
    assert nearest_name("zzz", ["rank"]) is None
    assert nearest_name("x" * 1_000_000, ["y" * 1_000_000] * 100_000) is None
    assert nearest_name(3, ["3"]) == "3"
