"""Reads the columns of a data file or of a data set on the Hugging Face hub.

Files are read by `file_formats`. Data sets on the hub are read through `datasets`, and no code that comes with one is
ever run: `trust_remote_code` is not passed, so a data set that needs a script is refused.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import DataError
from ..examples import Examples
from .file_formats import READERS, read_file
from .table import BadRows, Column, Table, require_columns, short_repr

# The split of a hub data set that each split of a run is read from, unless the name says otherwise.
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
SUFFIXES = tuple(READERS)
# File endings that are never part of a name on the hub, and what to do with such files.
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
    check_label: Callable[[object], object] | None = None,
) -> Examples:
    """Reads labelled texts from a data file or a hub data set.

    Args:
        source: Path of a file that ends in `.tsv` (with a header, without quoting), `.csv`, `.jsonl` or `.parquet`; or
            a name on the hub, `owner/name`, optionally with `:subset` and `@split` (`nyu-mll/glue:rte@train[:1000]`).
        text, text_pair, label: Column names.
        split: Split of a hub data set, if `source` names none.
        skip_bad_rows: Whether rows that can't be used are skipped and counted.
        check_label: Raises `DataError` for a label that the task can't use, such as `LabelledTask.target`.

    Returns:
        The examples, in the order of the source.

    Raises:
        DataError: The file is missing or empty, a column is missing (the others are listed), or rows are not UTF-8,
            have the wrong number of fields, or have no text or no usable label (all are reported, by number).
    """
    table = read_table(
        source, {"text": text, "text_pair": text_pair, "label": label}, split=split, skip_bad_rows=skip_bad_rows
    )
    for column in (text, text_pair):
        if column is not None:
            check_texts(table, column)
    if label is not None:
        table.convert(label, lambda value, where: _checked_label(value, where, label, check_label))
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
    """Reads columns of a data file or a hub data set.

    Args:
        source, split: See `read_examples`.
        wanted: `{flag: column}`; `None` for a column that isn't requested.
        skip_bad_rows: Whether rows that can't be parsed are skipped.
    """
    if (path := _file(source)) is not None:
        return read_file(path, wanted, skip_bad_rows=skip_bad_rows)
    return _read_hub(source, wanted, split, skip_bad_rows=skip_bad_rows)


def _file(source: str) -> Path | None:
    """The path of a data file; `None` for a name on the hub."""
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise DataError(f"{source} {_OTHERS[suffix]} first, and pass that file.")
    try:
        exists = path.exists()
    except OSError as error:
        raise DataError(f"{source!r:.200} is not a file name: {error.strerror}.") from None
    if not exists:
        if suffix not in SUFFIXES:
            return None
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in SUFFIXES)[:8]
        beside = f" Data files in {path.parent}: {', '.join(near)}." if near else ""
        raise DataError(f"{path} doesn't exist.{beside}")
    if path.is_dir() or suffix not in SUFFIXES:
        raise DataError(f"{path} is not a data file: its name must end in {', '.join(SUFFIXES)}.")
    return path


def _read_hub(source: str, wanted: Mapping[str, str | None], split: str, *, skip_bad_rows: bool) -> Table:
    import datasets

    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source!r} is neither a file nor the name of a data set: give a path that ends in {', '.join(SUFFIXES)}, "
            "or `owner/name`, optionally with `:subset` and `@split`."
        )
    with _quiet():
        try:
            held = datasets.load_dataset(match["name"], match["subset"], split=match["split"] or split)
        except Exception as error:  # no network, no such name, split or subset, a script, and more
            raise DataError(
                f"There is no file {source}, and the data set '{match['name']}' can't be read from the hub: "
                f"{_first_line(error)}"
            ) from error
    require_columns(source, wanted, held.column_names)
    if not len(held):
        raise DataError(f"{source} has no rows.")
    columns: dict[str, Column] = {}
    for column in wanted.values():
        if column is not None:
            columns[column] = list(held[column])
            if isinstance(feature := held.features[column], datasets.ClassLabel):
                # -1 marks hidden labels of test sets.
                columns[column] = [feature.int2str(v) if v is not None and v >= 0 else None for v in columns[column]]
    return Table(source, columns, rows=range(1, len(held) + 1), bad=BadRows(source, skip=skip_bad_rows))


def check_texts(table: Table, column: str) -> None:
    """Marks rows as bad that have no text in a column."""

    def check(value: object, where: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{where}: column '{column}' must be a text, got {short_repr(value)}")
        if not value.strip():
            raise DataError(f"{where}: column '{column}' is empty")
        _check_characters(value, where, column)
        return value

    table.convert(column, check)


def _checked_label(
    value: object, where: str, column: str, check: Callable[[object], object] | None
) -> str | int | float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where} has no label in column '{column}'")
    if not isinstance(value, (str, int, float, bool)) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{where}: column '{column}' must be a name or a number, got {short_repr(value)}")
    if isinstance(value, str):
        _check_characters(value, where, column)
    if check is not None:
        try:
            check(value)
        except DataError as error:
            raise DataError(f"{where} {error}") from None
    return value


def _check_characters(text: str, where: str, column: str) -> None:
    """JSON can spell half a character, which no tokenizer accepts and no file can hold."""
    if not text.isascii() and (half := _LONE_SURROGATE.search(text)) is not None:
        raise DataError(
            f"{where}: column '{column}' has half a character (the lone surrogate \\u{ord(half.group()):04x}) at "
            f"position {half.start() + 1:,}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of `datasets`, which would break the live line."""
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
