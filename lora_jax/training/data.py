"""Columns of a file (CSV, TSV, JSONL, Parquet) or of a data set on the Hugging Face hub; labelled texts.

Everything is read through `datasets`, and nothing that a data set brings along is ever run: `trust_remote_code` is not
passed, so a data set that needs a script is refused.
"""

from __future__ import annotations

import contextlib
import csv
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax import files

from .errors import DataError
from .file_checks import check_csv, check_jsonl, check_tsv

if TYPE_CHECKING:
    import datasets

# Which split of a hub data set a run's own is, where the name says none.
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.-]+(\[[^\]]*\])?))?")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a data set are read; each task has its own.

    Attributes:
        text, text_pair, label: of labelled texts; `text` of plain texts too.
        prompt, completion: a text, and what is to follow it.
        separator: what stands between the two.
        messages: of conversations.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    separator: str = "\n"
    messages: str | None = None


class Examples(NamedTuple):
    """Rows of a data set: texts, and labels as the source holds them (class names where it knows them).

    Attributes:
        name: the file or data set, for messages.
        texts, pairs: the texts of every row; `pairs` is `None` without a second column.
        labels: `None` where no label column was asked for.
    """

    name: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.texts)


def read_examples(
    source: str,
    *,
    text: str,
    text_pair: str | None = None,
    label: str | None = None,
    split: str = "train",
) -> Examples:
    """Reads the named columns of a data file or of a hub data set.

    Args:
        source: a path ending in `.tsv` (header, no quoting), `.csv`, `.jsonl` or `.parquet`; else a hub name
            `owner/name`, with `:subset` and `@split` where wanted (`nyu-mll/glue:rte@train[:1000]`).
        text, text_pair, label: column names.
        split: of a hub data set, where `source` names none.

    Returns:
        The rows, in their order.

    Raises:
        DataError: a missing or empty file, a missing column (those present are listed), a row that is not UTF-8, has
            the wrong number of fields, or has no text or no label (named by its number).
    """
    table = read_table(source, {"--text": text, "--text-pair": text_pair, "--label": label}, split=split)
    return Examples(
        name=source,
        texts=texts_of(table, text, source),
        pairs=texts_of(table, text_pair, source) if text_pair is not None else None,
        labels=_labels(table, label, source) if label is not None else None,
    )


def read_table(source: str, wanted: Mapping[str, str | None], *, split: str = "train") -> datasets.Dataset:
    """A data file or a hub data set that has rows and the columns wanted; see `read_examples`.

    Args:
        source: see `read_examples`.
        wanted: `{flag: column}`; those that are `None` aren't.
        split: of a hub data set, where `source` names none.
    """
    table = _read_file(Path(source)) if _is_file(source) else _read_hub(source, split)
    if missing := [name for name in wanted.values() if name is not None and name not in table.column_names]:
        *flags, last = (f"`{flag}`" for flag in wanted)
        raise DataError(
            f"{source} has no column '{missing[0]}'; its columns are {', '.join(table.column_names)}. Choose with "
            f"{', '.join(flags)}{' and ' if flags else ''}{last}."
        )
    if not len(table):
        raise DataError(f"{source} has no rows: at least one is expected.")
    return table


def _is_file(source: str) -> bool:
    return Path(source).exists() or source.lower().endswith(SUFFIXES)


def _read_file(path: Path) -> datasets.Dataset:
    import datasets

    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in SUFFIXES)[:8]
        beside = f" Data files in {path.parent}: {', '.join(near)}." if near else ""
        raise DataError(f"{path} doesn't exist.{beside}")
    if path.is_dir() or path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is no data file: one that ends in {', '.join(SUFFIXES)} is expected.")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: a file with at least one row is expected.")

    # A cache of one's own file would outlive the file; it is as quickly read again.
    with tempfile.TemporaryDirectory() as cache, _quiet(), files.plainly_named(path) as plain:
        options: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
        kind = path.suffix.lower()
        if kind == ".parquet":
            return _loaded(path, lambda: datasets.Dataset.from_parquet(str(plain), **options))
        if kind == ".jsonl":
            check_jsonl(path)
            return _loaded(path, lambda: datasets.Dataset.from_json(str(plain), **options))
        columns = check_tsv(path) if kind == ".tsv" else check_csv(path)
        # Strings as they stand: left to itself the parser turns "NA" and "null" into nothing and "01" into 1.
        options["features"] = datasets.Features({name: datasets.Value("string") for name in columns})
        options |= {"na_filter": False, "encoding": "utf-8-sig"}
        if kind == ".tsv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
        return _loaded(path, lambda: datasets.Dataset.from_csv(str(plain), **options))


def _loaded(path: Path, load: Callable[[], Any]) -> datasets.Dataset:
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{path} can't be read as {path.suffix}: {error.__cause__ or error}") from error


def _read_hub(source: str, split: str) -> datasets.Dataset:
    import datasets

    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source!r} is neither a file nor the name of a data set: a path that ends in {', '.join(SUFFIXES)} or "
            "`owner/name`, with `:subset` and `@split` where wanted, is expected."
        )
    with _quiet():
        try:
            return datasets.load_dataset(match["name"], match["subset"], split=match["split"] or split)  # pyright: ignore[reportReturnType]
        except Exception as error:  # of many kinds: no network, no such name, split or subset, a script
            raise DataError(
                f"There is no file {source}, and the data set '{match['name']}' can't be read from the hub: "
                f"{_first_line(error)}"
            ) from error


def texts_of(table: datasets.Dataset, column: str, source: str) -> list[str]:
    """The texts of a column; a row without one is named."""
    values = list(table[column])
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise DataError(
                f"{source}, row {row}: column '{column}' holds {value!r:.80}, and a text is expected. Mend or remove "
                "the row."
            )
        if not value.strip():
            raise DataError(f"{source}, row {row}: column '{column}' is empty. Fill in or remove the row.")
    return values


def _labels(table: datasets.Dataset, column: str, source: str) -> list[Any]:
    import datasets

    values = list(table[column])
    feature = table.features[column]
    for row, value in enumerate(values, start=1):
        unlabelled = isinstance(feature, datasets.ClassLabel) and value == -1  # the hub's mark in hidden test sets
        if value is None or unlabelled or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{source}, row {row} has no label in column '{column}'. Fill in or remove the row.")
        if not isinstance(value, (str, int, float, bool)):
            raise DataError(
                f"{source}, row {row}: column '{column}' holds {value!r:.80}, and a name or a number is expected."
            )
    return [feature.int2str(value) for value in values] if isinstance(feature, datasets.ClassLabel) else values


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
