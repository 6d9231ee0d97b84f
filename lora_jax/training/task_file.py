"""`task.json`, beside an adapter: what prediction needs beyond the adapter's own files."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_jax import files
from lora_jax.adapters import save_with
from lora_jax.methods import Method
from lora_jax.types import Params

from .errors import ConfigError, TrainingError
from .examples import Columns
from .task import Task, restore_task

TASK_FILE = "task.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The task and settings that an adapter was trained with.

    Attributes:
        base: Name or folder of the base.
        task: Task with its labels.
        pooling, max_length, dtype: Values in training.
        columns: Columns of the training data, the defaults for other files.
        escape_special_tokens: Whether special tokens that a text spells out were plain text in training.
        new_head: Whether the base's own head was replaced by a new one.
        prior: Prior of the training examples, see `LabelledTask.prior`; empty if unknown.
    """

    base: str
    task: Task
    pooling: Literal["first", "mean"]
    max_length: int
    dtype: str
    columns: Columns
    escape_special_tokens: bool = False
    new_head: bool = False
    prior: tuple[float, ...] = ()


def save_task_adapter(folder: Path, params: Params, method: Method, saved: TaskFile) -> None:
    """`lj.save_adapter`, with `task.json` beside the adapter; one doesn't take its place without the other."""
    save_with(folder, params, method, {TASK_FILE: task_content(saved)})


def task_content(saved: TaskFile) -> dict[str, object]:
    """The content of `task.json`."""
    fields = {name: getattr(saved, name) for name in (*_PLAIN, *_FLAGS)} | {"prior": list(saved.prior)}
    content = {"format": _FORMAT, "task": saved.task.kind, "labels": list(saved.task.labels), **fields}
    return content | dataclasses.asdict(saved.columns)


def read_task(folder: Path) -> TaskFile:
    """Reads `task.json`, and checks it: it may come from elsewhere."""
    files.settle(folder)
    path = folder / TASK_FILE
    content: Any = files.read_json(path)
    if not isinstance(content, dict):
        raise TrainingError(f"{path} must hold an object, and holds a {type(content).__name__}.")
    if content.get("format") != _FORMAT:
        raise TrainingError(f"{path} has format {content.get('format')!r}, and this version reads {_FORMAT}.")
    whole = content
    # A file of an earlier version lacks columns of tasks that there weren't, and what wasn't kept.
    content = dataclasses.asdict(Columns()) | dict.fromkeys(_FLAGS, False) | {"prior": []} | content
    kinds: dict[str, type | tuple[type, ...]] = {"task": str, "labels": list, "prior": list}
    kinds.update(dict.fromkeys(_PLAIN, str))
    kinds["max_length"] = int
    kinds |= {name: (str, type(None)) if default is None else str for name, default in vars(Columns()).items()}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind) or isinstance(content.get(name), bool):
            raise TrainingError(f"{path}: `{name}` can't be {content.get(name)!r:.80}. Save the adapter again.")
    labels = content["labels"]
    if not all(isinstance(label, str) for label in labels) or (content["task"] == "classification" and len(labels) < 2):
        raise TrainingError(f"{path}: `labels` is {labels!r:.80}, and two names or more are expected.")
    if len(set(labels)) < len(labels):
        twice = next(label for label, count in Counter(labels).items() if count > 1)
        raise TrainingError(f"{path}: `labels` has {twice!r:.80} twice, and each is expected once.")
    if content["pooling"] not in ("first", "mean"):
        raise TrainingError(f"{path}: `pooling` can't be {content['pooling']!r:.80}.")
    if not 1 <= content["max_length"] <= 1_000_000:
        raise TrainingError(f"{path}: `max_length` can't be {content['max_length']}.")
    for name in _FLAGS:
        if not isinstance(content[name], bool):
            raise TrainingError(f"{path}: `{name}` can't be {content[name]!r:.80}.")
    columns = Columns(**{name: content[name] for name in vars(Columns())})
    try:
        task = restore_task(content["task"], labels)
    except ConfigError as error:
        raise TrainingError(f"{path}: {error}") from None
    prior, expected = content["prior"], 1 if task.kind == "regression" else len(labels)
    are_numbers = all(isinstance(number, float) and math.isfinite(number) for number in prior)
    if prior and (len(prior) != expected or not are_numbers):
        raise TrainingError(f"{path}: `prior` can't be {prior!r:.80}.")
    files.without_checksum(whole, path)  # after all that can say more of what is wrong
    plain = {name: content[name] for name in (*_PLAIN, *_FLAGS)}
    return TaskFile(task=task, columns=columns, prior=tuple(prior), **plain)


_PLAIN = ("base", "pooling", "max_length", "dtype")
_FLAGS = ("escape_special_tokens", "new_head")
