"""What is learnt: one of some labels, or a number; and the loss of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data import Examples
from .errors import ConfigError, DataError

Kind = Literal["classification", "regression"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification over named labels, or a regression.

    Attributes:
        kind: `"classification"` or `"regression"`.
        labels: the label names in the order of the logits; empty for a regression.
    """

    kind: Kind
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"`task` is {self.kind!r}, and one of {', '.join(KINDS)} is expected.")

    @property
    def is_regression(self) -> bool:
        return self.kind == "regression"

    @property
    def num_labels(self) -> int | None:
        """The number of logits; `None` for a regression, which has one output and no logits."""
        return None if self.is_regression else len(self.labels)

    def encode(self, examples: Examples) -> np.ndarray:
        """The targets of labelled rows: int32 places in `labels`, or float32 numbers; shape `(rows,)`.

        Raises:
            DataError: a label that training hasn't seen, or that is no number; its row is named.
        """
        if examples.labels is None:
            raise DataError(f"{examples.name} was read without a label column.")
        if self.is_regression:
            return np.array([_number(v, examples.name, row) for row, v in enumerate(examples.labels, 1)], np.float32)
        index = {label: place for place, label in enumerate(self.labels)}
        targets = np.empty(len(examples.labels), np.int32)
        for row, value in enumerate(examples.labels, start=1):
            name = _label_name(value, examples.name, row)
            if name not in index:
                near = difflib.get_close_matches(name, self.labels, n=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                raise DataError(
                    f"{examples.name}, row {row} has the label {name!r}{hint}, which the training data doesn't have: "
                    f"{_some(self.labels)}."
                )
            targets[row - 1] = index[name]
        return targets

    def losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each example, in float32: `-log softmax(outputs)[target]` or `(output - target)²`.

        Args:
            outputs: logits `(batch, labels)`, or numbers `(batch,)` for a regression.
            targets: `(batch,)` as `encode` gives them.

        Returns:
            `(batch,)`.
        """
        outputs = outputs.astype(jnp.float32)
        if self.is_regression:
            return jnp.square(outputs - targets)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    def correct(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """1.0 where the largest logit is the target's, else 0.0; all 0.0 for a regression. Shape `(batch,)`."""
        if self.is_regression:
            return jnp.zeros(targets.shape, jnp.float32)
        return (outputs.argmax(-1) == targets).astype(jnp.float32)


def make_task(kind: str, train: Examples) -> Task:
    """The task that the training rows define; labels in their natural order (2 before 10).

    Example:
        >>> make_task("classification", Examples("train.tsv", ["a", "b", "c"], None, ["10", "2", "10"])).labels
        ('2', '10')
    """
    if kind == "regression":
        return Task(kind="regression")
    if kind != "classification":
        raise ConfigError(f"`task` is {kind!r}, and one of {', '.join(KINDS)} is expected.")
    if train.labels is None:
        raise DataError(f"{train.name} was read without a label column.")
    names = {_label_name(value, train.name, row) for row, value in enumerate(train.labels, start=1)}
    if len(names) < 2:
        raise DataError(f"{train.name} has only the label {next(iter(names))!r}: two or more are needed to learn from.")
    numeric = all(_is_integer(name) for name in names)
    return Task(kind="classification", labels=tuple(sorted(names, key=int if numeric else None)))


def _label_name(value: Any, name: str, row: int) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"{name}, row {row} has the label {value}, which names no class. Choose `--task regression` to "
                "predict numbers."
            )
        return str(int(value))
    return str(value)


def _number(value: Any, name: str, row: int) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name}, row {row} has the label {value!r}, and a finite number is expected in a regression.")
    return number


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()


def _some(labels: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(label) for label in labels[:limit])
    return shown + (f" and {len(labels) - limit} more" if len(labels) > limit else "")
