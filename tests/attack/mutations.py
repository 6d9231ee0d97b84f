"""Damage: a good file changed byte by byte, or as what it is (JSON, YAML, a table, tensors, a text).

Every function takes the bytes and a random generator and gives other bytes, the same for the same generator.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]

# What `json.dumps` can't write stands in a text under such a name until the end.
_RAW = {
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits": "7" * 5_000,
    "@exponent": "1e999999",
    "@many": "[" + "[]," * 100_000 + "[]]",
    "@long": '"' + "x" * 1_000_000 + '"',
    "@surrogate": '"\\ud800"',
    "@twice": '{"a": 1, "a": 2}',
}
CONTROLS = "\x1b[2J\x1b]0;title\x07\u202e\u2028\x00\x9b31m"


def choice(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def mutate(path: Path, rng: Rng) -> str:
    """Damages a file in one of the ways that there are for its kind, and says in which."""
    if rng.integers(25) == 0:
        return f"{_no_file(path, rng)} in place of {path.name}"
    structural = _STRUCTURAL.get(path.suffix, {"snippets": _text})
    ways: dict[str, Mutation] = {"bytes": _bytes, "length": _length, **structural}
    # Bytes alone are mostly caught by a parser; what parses gets further.
    way = choice(rng, ["bytes", "length", *list(structural) * 2])
    data = path.read_bytes()
    try:
        path.write_bytes(ways[way](data, rng))
    except Exception:  # damaged before, beyond parsing, for which PyYAML has errors of many kinds
        path.write_bytes(_bytes(data, rng))
    return f"{way} of {path.name}"


# ---------------------------------------------------------------------------------------------------------------- bytes


def _bytes(data: bytes, rng: Rng) -> bytes:
    """A few bytes, most of them near the beginning, changed, taken out, doubled or exchanged."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        header = 8 + int.from_bytes(mutated[:8], "little")
        end = (min(len(mutated), header) if rng.integers(4) else len(mutated)) or 1
        place = int(rng.integers(0, end))
        match int(rng.integers(0, 6)):
            case 0:
                mutated[place : place + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                del mutated[place : place + int(rng.integers(1, 9))]
            case 2:
                mutated[place:place] = mutated[place : place + int(rng.integers(1, 30))]
            case 3 if place < len(mutated):
                mutated[place] ^= 1 << int(rng.integers(8))
            case 4:
                mutated[place:place] = choice(
                    rng, (b"\0", b"\xff", b"\r", b"\x1b[2J", b"\xef\xbb\xbf", b"\xe2\x80\xa8")
                )
            case _:
                mutated[place : place + 1] = b"9" * int(rng.integers(1, 40))
    return bytes(mutated)


def _length(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(0, len(data) + 1))] if rng.integers(2) else data + bytes(int(rng.integers(1, 99)))


def _no_file(path: Path, rng: Rng) -> str:
    """Something else where a file was: nothing here may be waited for, or read without end."""
    path.unlink()
    sort = choice(rng, ("a pipe", "/dev/zero", "a folder", "a dead link", "a circle of links", "nothing"))
    if sort == "a pipe":
        os.mkfifo(path)
    elif sort == "a folder":
        path.mkdir()
    elif sort != "nothing":
        path.symlink_to({"/dev/zero": "/dev/zero", "a dead link": "there-is-none"}.get(sort, path.name))
    return sort


# ----------------------------------------------------------------------------------------------------------------- JSON


def _json(data: bytes, rng: Rng) -> bytes:
    content = json.loads(data.decode())
    for _ in range(int(rng.integers(1, 3))):
        content = strange(content, rng)
    return _raw(json.dumps(content, ensure_ascii=bool(rng.integers(2))), rng).encode("utf-8", "surrogatepass")


def _raw(text: str, rng: Rng) -> str:
    for name, written in _RAW.items():
        text = text.replace(f'"{name}"', written, 1)
    if rng.integers(10) == 0:  # a name twice: what is first and what is last differ
        place = text.find("{")
        first = text.find(":", place)
        if 0 <= place < first:
            text = (
                f"{text[: place + 1]}{text[place + 1 : first]}: {json.dumps(strange_value(rng))}, {text[place + 1 :]}"
            )
    return text


def strange_value(rng: Rng) -> Any:
    return choice(
        rng,
        (
            *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e300, math.nan, math.inf),
            *("", "all", "none", "lora_only", "query", "lm_head", "F32", "BF16", "I8", "../x", "\0", "é", "x" * 300),
            *(
                "(a+)+$",
                ".*",
                "^model",
                "all-linear",
                "gaussian",
                "pissa",
                "LORA",
                "float32",
                "[/x]",
                "[red]",
                CONTROLS,
            ),
            *("=1+1", "-inf", "1e5", "<script>alert(1)</script>", "/etc/passwd", "/dev/zero"),
            *([], ["query"], [[]], [None], [0, 10**12], {}, {"a": {}}, {"query": 3}, {"(x+x+)+y": 4}, *_RAW),
        ),
    )


def strange(value: Any, rng: Rng) -> Any:
    """The same JSON with one thing in it changed, taken out, added, renamed or exchanged."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or rng.integers(8) == 0:
        return strange_value(rng) if rng.integers(4) or not isinstance(value, int) else value + int(rng.integers(-8, 9))
    key = choice(rng, children)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    match int(rng.integers(0, 7)):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            renamed = (f"{key}x", str(key)[1:], str(strange_value(rng)), str(key).replace("A", "B"))
            copy[choice(rng, renamed)] = copy.pop(key)
        case 2:
            other = choice(rng, children)
            copy[key], copy[other] = copy[other], copy[key]
        case 3 if isinstance(copy, dict):
            copy[str(strange_value(rng))] = strange_value(rng)
        case 4:
            copy[key] = strange_value(rng)
        case _:
            copy[key] = strange(copy[key], rng)
    return copy


def _json_lines(data: bytes, rng: Rng) -> bytes:
    """One line changed as JSON, doubled, taken out, or put elsewhere."""
    lines = data.split(b"\n")
    place = int(rng.integers(max(1, len(lines) - 1)))
    match int(rng.integers(0, 6)):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[place])
        case 2:
            lines.append(lines.pop(place))
        case _:
            lines[place] = _json(lines[place], rng)
    return b"\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- YAML

_YAML = (
    "[" * 3_000 + "]" * 3_000,
    "- " * 3_000 + "x",
    "{a: " * 3_000 + "1" + "}" * 3_000,
    "2001-99-99",
    "2001-01-01",
    "!!int abc",
    "!!float x",
    "!!timestamp no",
    "!!binary '%'",
    "!!python/object/apply:os.system [true]",
    "!unknown x",
    "7" * 5_000,
    "0x" + "f" * 5_000,
    "1:" * 3_000 + "1",
    "*nothing",
    "&a [*a]",
    "{<<: {a: 1}}",
    "{? [1, 2] : 3}",
    "{1: 2}",
    "{null: 2}",
    "~",
    "yes",
    "1e5",
    ".inf",
    ".nan",
    "|\n  text\n",
    '"\\e[2J\\0"',
    "!!set {a, b}",
    "!!omap [a: 1]",
)


def _alias_bomb() -> str:
    """A billion of one thing, in nine lines."""
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines) + "\n"


def _yaml(data: bytes, rng: Rng) -> bytes:
    text = data.decode()
    lines = text.splitlines()
    place = int(rng.integers(max(1, len(lines))))
    match int(rng.integers(0, 6)):
        case 0:
            content = strange(yaml.safe_load(text), rng)
            return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
        case 1:
            lines.insert(int(rng.integers(len(lines) + 1)), lines[place])  # a name twice
        case 2:
            return (_alias_bomb() + text).encode()
        case 3:
            bomb = _alias_bomb().rstrip()
            return f"{bomb}\n{lines[place].partition(':')[0].lstrip('- ')}: *b8\n".encode()
        case 4:
            lines[place] = f"{choice(rng, ('1', '~', '? [a]', '2001-99-99', '!!int z', 'train'))}: {choice(rng, _YAML)}"
        case _:
            head, colon, _ = lines[place].partition(":")
            lines[place] = f"{head}{colon or ':'} {choice(rng, _YAML)}"
    return ("\n".join(lines) + "\n").encode()


# ------------------------------------------------------------------------------------------------------ tables and text


def _table(data: bytes, rng: Rng) -> bytes:
    """Cells and rows of CSV or TSV changed, doubled, moved or taken out."""
    text = data.decode()
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = [line.split(separator) for line in text.splitlines()]
    for _ in range(int(rng.integers(1, 4))):
        row = choice(rng, rows)
        place = int(rng.integers(len(row)))
        match int(rng.integers(0, 8)):
            case 0:
                del row[place]
            case 1:
                row.insert(place, row[place])
            case 2:
                rows.insert(int(rng.integers(len(rows) + 1)), row)
            case 3:
                rows.remove(row)
            case 4:
                row[place] = '"' + row[place]
            case 5:
                row.extend(["x"] * int(rng.integers(1, 2_000)))
            case _:
                row[place] = choice(
                    rng,
                    ("", "NA", "null", "nan", "=1+1", "@x", CONTROLS, '"a""b"', "1e39", "x" * 200_000, "01", " pos "),
                )
        rows = [row for row in rows if row] or [["text"]]
    return ("\n".join(separator.join(row) for row in rows) + "\n").encode()


_SNIPPETS = (
    "{{ 9**(9**9) }}",
    "{{ 'x' * 1000000000 }}",
    "{{ 'x' * 5000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{% for m in messages %}",
    "{{ raise_exception('no') }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ messages | tojson(indent=1000000) }}",
    "{% set x = [] %}",
    "{% import 'os' %}",
    "{{ " + "(" * 500 + ")" * 500 + " }}",
    CONTROLS,
    "\ud800",
    "a" * 100_000,
)


def _text(data: bytes, rng: Rng) -> bytes:
    """A text with something in it that its reader may run, or choke on."""
    text = data.decode()
    place = int(rng.integers(len(text) + 1))
    return (text[:place] + choice(rng, _SNIPPETS) + text[place:]).encode("utf-8", "surrogatepass")


# -------------------------------------------------------------------------------------------------------------- tensors


def _values(data: bytes, rng: Rng) -> bytes:
    """Numbers that are none, after the header."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin + 4 > len(data):
        return data
    place = begin + 4 * int(rng.integers(0, (len(data) - begin) // 4))
    number = choice(rng, (math.nan, math.inf, -math.inf, 3e38, -0.0, 1e-45))
    return data[:place] + np.float32(number).tobytes() + data[place + 4 :]


def _header(data: bytes, rng: Rng) -> bytes:
    """Another header that is JSON, with the right length before it."""
    length = int.from_bytes(data[:8], "little")
    text = _json(data[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


_STRUCTURAL: dict[str, dict[str, Mutation]] = {
    ".safetensors": {"entries": _header, "values": _values},
    ".json": {"entries": _json},
    ".jsonl": {"entries": _json_lines},
    ".yaml": {"entries": _yaml},
    ".csv": {"cells": _table},
    ".tsv": {"cells": _table},
}
