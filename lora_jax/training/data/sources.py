"""Columns of a file (CSV, TSV, JSONL, Parquet) or of a data set on the Hugging Face hub.

Files are read by `formats`; data sets of the hub through `datasets`, and nothing that one brings along is ever run:
`trust_remote_code` is not passed, so a data set that needs a script is refused.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..examples import Examples
from .formats import READERS, read_file
from .table import BadRows, Table, require_columns, shown

# Which split of a hub data set a run's own is, where the name says none.
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
SUFFIXES = tuple(READERS)
# Endings of files that are never names on the hub, and what to do with them.
_OTHERS = {
    **dict.fromkeys(
        (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers"), "is a spreadsheet: save it as CSV (UTF-8)"
    ),
    **dict.fromkeys(
        (".docx", ".doc", ".odt", ".rtf", ".pages", ".pdf"), "is a document: save its table as CSV (UTF-8)"
    ),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar"), "is compressed: unpack it first"),
}
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.-]+(\[[^\]]*\])?))?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_examples(
    source: str,
    *,
    text: str,
    text_pair: str | None = None,
    label: str | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
) -> Examples:
    """Reads the named columns of a data file or of a hub data set.

    Args:
        source: a path ending in `.tsv` (header, no quoting), `.csv`, `.jsonl` or `.parquet`; else a hub name
            `owner/name`, with `:subset` and `@split` where wanted (`nyu-mll/glue:rte@train[:1000]`).
        text, text_pair, label: column names.
        split: of a hub data set, where `source` names none.
        skip_bad_rows: whether rows that can't be used are left out, and counted.

    Returns:
        The rows, in their order.

    Raises:
        DataError: a missing or empty file, a missing column (those present are listed), or rows that are not UTF-8,
            have the wrong number of fields, or have no text or no label (named by their numbers, all at once).
    """
    table = read_table(
        source, {"--text": text, "--text-pair": text_pair, "--label": label}, split=split, skip_bad_rows=skip_bad_rows
    )
    for column in (text, text_pair):
        if column is not None:
            check_texts(table, column)
    if label is not None:
        table.convert(label, lambda value, where: _label(value, where, label))
    table = table.good()
    return Examples(
        name=source,
        texts=table.columns[text],
        pairs=table.columns[text_pair] if text_pair is not None else None,
        labels=table.columns[label] if label is not None else None,
        rows=table.rows if table.bad else None,
        left_out=table.left_out,
        skipped=len(table.bad),
    )


def read_table(
    source: str, wanted: Mapping[str, str | None], *, split: str = "train", skip_bad_rows: bool = False
) -> Table:
    """The rows of a data file or a hub data set in the columns wanted; see `read_examples`.

    Args:
        source: see `read_examples`.
        wanted: `{flag: column}`; those that are `None` aren't.
        split: of a hub data set, where `source` names none.
        skip_bad_rows: whether rows that can't be parsed are left out.
    """
    if (path := _file(source)) is not None:
        return read_file(path, wanted, skip_bad_rows=skip_bad_rows)
    return _read_hub(source, wanted, split, skip_bad_rows=skip_bad_rows)


def _file(source: str) -> Path | None:
    """The data file that is meant; `None` for a name on the hub."""
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise DataError(f"{source} {_OTHERS[suffix]} first, and pass that file.")
    try:
        exists = path.exists()
    except OSError as error:
        raise DataError(f"{source!r:.200} is no name of a file: {error.strerror}.") from None
    if not exists:
        if suffix not in SUFFIXES:
            return None
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in SUFFIXES)[:8]
        beside = f" Data files in {path.parent}: {', '.join(near)}." if near else ""
        raise DataError(f"{path} doesn't exist.{beside}")
    if path.is_dir() or suffix not in SUFFIXES:
        raise DataError(f"{path} is no data file: one that ends in {', '.join(SUFFIXES)} is expected.")
    return path


def _read_hub(source: str, wanted: Mapping[str, str | None], split: str, *, skip_bad_rows: bool) -> Table:
    import datasets

    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source!r} is neither a file nor the name of a data set: a path that ends in {', '.join(SUFFIXES)} or "
            "`owner/name`, with `:subset` and `@split` where wanted, is expected."
        )
    with _quiet():
        try:
            held: Any = datasets.load_dataset(match["name"], match["subset"], split=match["split"] or split)
        except Exception as error:  # of many kinds: no network, no such name, split or subset, a script
            raise DataError(
                f"There is no file {source}, and the data set '{match['name']}' can't be read from the hub: "
                f"{_first_line(error)}"
            ) from error
    require_columns(source, wanted, held.column_names)
    if not len(held):
        raise DataError(f"{source} has no rows: at least one is expected.")
    columns: dict[str, list[Any]] = {}
    for column in wanted.values():
        if column is not None:
            columns[column] = list(held[column])
            if isinstance(feature := held.features[column], datasets.ClassLabel):
                # -1 is the hub's mark in hidden test sets.
                columns[column] = [feature.int2str(v) if v is not None and v >= 0 else None for v in columns[column]]
    return Table(source, columns, rows=range(1, len(held) + 1), bad=BadRows(source, skip=skip_bad_rows))


def check_texts(table: Table, column: str) -> None:
    """Notes the rows without a text in a column."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{where}: column '{column}' holds {shown(value)}, and a text is expected")
        if not value.strip():
            raise DataError(f"{where}: column '{column}' is empty")
        _check_characters(value, where, column)
        return value

    table.convert(column, check)


def _label(value: Any, where: str, column: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where} has no label in column '{column}'")
    if not isinstance(value, (str, int, float, bool)) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{where}: column '{column}' holds {shown(value)}, and a name or a number is expected")
    if isinstance(value, str):
        _check_characters(value, where, column)
    return value


def _check_characters(text: str, where: str, column: str) -> None:
    """JSON can write half a character, which no tokenizer and no file can take."""
    if not text.isascii() and (half := _LONE_SURROGATE.search(text)) is not None:
        raise DataError(
            f"{where}: column '{column}' has half a character (the lone surrogate \\u{ord(half.group()):04x}) at "
            f"place {half.start() + 1:,}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` draws progress bars, which would break the live line."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
