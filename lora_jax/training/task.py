"""What is learnt: one of some labels, a number, or the next token; and the loss and measures of each."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.losses import token_scores
from lora_jax.text import listed, nearest_name

from .data.table import BadRows, short_repr
from .errors import ConfigError, DataError
from .examples import Examples
from .metrics import classification_metrics, language_metrics, regression_metrics
from .options import TASKS, TaskKind

# Tokens whose logits are there at once: the head is read once a chunk, and fewer keep a GPU waiting for it.
_CHUNK = 512
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """What a model learns.

    Attributes:
        kind: Name of the task.
        metrics: Names of the metrics that `measure` computes, beginning with the one that chooses checkpoints.
        has_accuracy: Whether outputs are right or wrong.
        labels: Label names in the order of the logits; empty where there are none.
    """

    kind: ClassVar[TaskKind]
    metrics: ClassVar[tuple[str, ...]]
    has_accuracy: ClassVar[bool] = True
    labels: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int | None:
        """The number of logits, where the task decides it."""
        return None

    @abc.abstractmethod
    def losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each target, in float32; the targets' shape."""

    @abc.abstractmethod
    def correct(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """1.0 where the output is right, else 0.0; the targets' shape."""

    def summarize(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """What `measure` needs of a batch, `(batch, …)`: the outputs themselves, unless they are large."""
        del targets, weights
        return outputs

    def score(self, model: Callable[..., Any], targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`losses` and `correct` of a model that is given its inputs: `model()` gives its outputs."""
        outputs = model()
        return self.losses(outputs, targets), self.correct(outputs, targets)

    def summarize_model(self, model: Callable[..., Any], targets: jax.Array, weights: jax.Array) -> jax.Array:
        """`summarize` of a model that is given its inputs: `model()` gives its outputs."""
        return self.summarize(model(), targets, weights)

    @abc.abstractmethod
    def measure(self, summaries: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        """The metrics of a data set, from the summaries of its rows and their targets; `None` for what is undefined."""

    def check_metric(self, name: str | None) -> str:
        """`name`, if the task has such a metric; its first for `None`."""
        if name is not None and name not in self.metrics:
            raise ConfigError(f"`metric` is {name!r}, and a {self.kind} has {', '.join(self.metrics)}.")
        return name or self.metrics[0]


class LabelledTask(Task):
    """A task whose rows have a target each."""

    @abc.abstractmethod
    def target(self, label: object) -> float:
        """The target that a label stands for.

        Raises:
            DataError: The task has no such label; the message goes on after "row 3".
        """

    @abc.abstractmethod
    def encode(self, examples: Examples) -> np.ndarray:
        """The targets of examples, `(examples,)`.

        Raises:
            DataError: Some labels aren't the task's; all of them are reported.
        """

    @abc.abstractmethod
    def prior(self, targets: np.ndarray) -> np.ndarray:
        """All that is known of an answer without its text, from training targets: float64 `(1,)` or `(labels,)`."""

    @abc.abstractmethod
    def answer(self, prior: np.ndarray) -> str:
        """The one answer that `prior` leads to, in words."""

    @abc.abstractmethod
    def measure_prior(self, prior: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The metrics where every row gets that answer."""


@dataclass(frozen=True, kw_only=True)
class Classification(LabelledTask):
    """One of the `labels`."""

    kind: ClassVar[TaskKind] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "matthews", "loss")

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def target(self, label: object) -> int:
        """The label's index in `labels`."""
        name = _label_name(label)
        if (index := self._index.get(name)) is not None:
            return index
        near = nearest_name(name, self.labels)
        hint = f"nearest: {near!r:.200}" if near else f"it has {listed(self.labels, 5, form='{!r}')}"
        raise DataError(f"has the label {name!r:.200}, which the training data lacks ({hint})")

    def encode(self, examples: Examples) -> np.ndarray:
        """int32 indices into `labels`."""
        return np.array(_converted(examples, self.target), np.int32)

    def prior(self, targets: np.ndarray) -> np.ndarray:
        """The share of each label."""
        return np.bincount(targets, minlength=self.num_labels) / len(targets)

    def answer(self, prior: np.ndarray) -> str:
        """The most frequent label."""
        return repr(self.labels[int(prior.argmax())])

    def measure_prior(self, prior: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The loss is that of the shares as probabilities: on the training rows, their entropy."""
        logits = np.log(np.maximum(prior, 1e-12))
        found = classification_metrics(np.broadcast_to(logits, (len(targets), len(prior))), targets)
        return {name: 0.0 if value is None else value for name, value in found.items()}

    def losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """`-log softmax(outputs)[target]`, of logits `(batch, labels)`."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)

    def correct(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return (outputs.argmax(-1) == targets).astype(jnp.float32)

    def measure(self, summaries: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        return classification_metrics(summaries, targets)


@dataclass(frozen=True, kw_only=True)
class Regression(LabelledTask):
    """A number."""

    kind: ClassVar[TaskKind] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "loss")
    has_accuracy: ClassVar[bool] = False

    def target(self, label: object) -> float:
        """The label as a number that float32 can hold."""
        return _number(label)

    def encode(self, examples: Examples) -> np.ndarray:
        """float32 numbers."""
        return np.array(_converted(examples, self.target), np.float32)

    def prior(self, targets: np.ndarray) -> np.ndarray:
        """The mean."""
        return targets.mean(keepdims=True, dtype=np.float64)

    def answer(self, prior: np.ndarray) -> str:
        return f"the mean, {prior[0]:.3g}"

    def measure_prior(self, prior: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """One number for all tells no row from another: its correlations, undefined in themselves, are 0."""
        found = regression_metrics(np.broadcast_to(prior, targets.shape), targets)
        return {name: 0.0 if value is None else value for name, value in found.items()}

    def losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """`(output - target)²`, of `(batch,)`."""
        return jnp.square(outputs.astype(jnp.float32) - targets)

    def correct(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        del outputs
        return jnp.zeros(targets.shape, jnp.float32)

    def measure(self, summaries: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        return regression_metrics(summaries, targets)


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """The next token, of logits `(batch, time, vocabulary)` and targets `(batch, time)`.

    Attributes:
        label_smoothing: `ε` of the training loss `(1 - ε)(-log p[target]) + ε · mean(-log p)`, the mean over the
            vocabulary, as PyTorch's cross entropy has it. Metrics are without.
    """

    kind: ClassVar[TaskKind] = "causal-lm"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "loss")
    label_smoothing: float = 0.0

    def losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        losses = _token_losses(outputs, targets)
        if not self.label_smoothing:
            return losses
        outputs = outputs.astype(jnp.float32)
        everywhere = jax.nn.logsumexp(outputs, axis=-1) - outputs.mean(axis=-1)
        return (1 - self.label_smoothing) * losses + self.label_smoothing * everywhere

    def correct(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return (outputs.argmax(-1) == targets).astype(jnp.float32)

    def summarize(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Sums over the target tokens of each row, `(batch, 3)`; see `language_metrics`."""
        parts = (_token_losses(outputs, targets), self.correct(outputs, targets), jnp.ones_like(weights))
        return jnp.stack([(weights * part).sum(axis=1) for part in parts], axis=1)

    def score(self, model: Callable[..., Any], targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `losses` and `correct`, chunk by chunk: no logits of all tokens are formed."""
        return model(with_head=self._with_head(targets, self.label_smoothing))

    def summarize_model(self, model: Callable[..., Any], targets: jax.Array, weights: jax.Array) -> jax.Array:
        """As `summarize`, chunk by chunk."""
        losses, correct = model(with_head=self._with_head(targets, 0.0))
        return jnp.stack([(weights * part).sum(axis=1) for part in (losses, correct, jnp.ones_like(weights))], axis=1)

    @staticmethod
    def _with_head(targets: jax.Array, label_smoothing: float) -> Callable[[jax.Array, jax.Array, bool], Any]:
        def score(hidden: jax.Array, head: jax.Array, tied: bool) -> tuple[jax.Array, jax.Array]:
            return token_scores(hidden, head, targets, tied=tied, chunk=_CHUNK, label_smoothing=label_smoothing)

        return score

    def measure(self, summaries: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        del targets  # the sums know them
        return language_metrics(summaries)


def _token_losses(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)


def make_task(kind: str, train: Examples) -> LabelledTask:
    """The task that labelled training rows define; labels in their natural order (2 before 10).

    Example:
        >>> make_task("classification", Examples("train.tsv", ["a", "b", "c"], None, ["10", "2", "10"])).labels
        ('2', '10')
    """
    if kind == "regression":
        return Regression()
    if kind != "classification":
        raise ConfigError(f"`task` must be one of {', '.join(TASKS)}, got {kind!r}.")
    names = set(_converted(train, _label_name))
    if len(names) < 2:
        raise DataError(f"{train.name} has only the label {next(iter(names))!r}: two or more are needed to learn from.")
    return Classification(labels=sorted_labels(names))


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Labels in their natural order, as a new head has them.

    Example:
        >>> sorted_labels(["10", "2"]), sorted_labels(["b", "10", "2"])
        (('2', '10'), ('10', '2', 'b'))
    """
    names = list(names)
    numeric = all(_is_integer(name) for name in names)
    return tuple(sorted(names, key=int if numeric else None))


def restore_task(kind: str, labels: Sequence[str]) -> Task:
    """The task of a saved adapter."""
    tasks = {"classification": Classification, "regression": Regression, "causal-lm": CausalLM}
    if kind not in tasks:
        raise ConfigError(f"`task` must be one of {', '.join(TASKS)}, got {kind!r}.")
    return tasks[kind](labels=tuple(labels))


def training_label_check(kind: str) -> Callable[[object], object]:
    """Raises `DataError` for a label that no task of this kind can learn; see `LabelledTask.target`."""
    return _number if kind == "regression" else _label_name


_T = TypeVar("_T")


def _converted(examples: Examples, convert: Callable[[object], _T]) -> list[_T]:
    """Each label converted; all that can't be are reported at once."""
    if examples.labels is None:
        raise DataError(f"{examples.name} was read without a label column.")
    bad = BadRows(examples.name)
    results: list[_T] = []
    for row, label in zip(examples.numbers, examples.labels, strict=True):
        try:
            results.append(convert(label))
        except DataError as error:
            bad.add(row, f"row {row} {error}")
    bad.check(len(examples))
    return results


def _label_name(label: object) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):
        if not label.is_integer():
            raise DataError(f"has the label {label}, which is no class (`task='regression'` predicts numbers)")
        return str(int(label))
    return str(label)


def _number(label: object) -> float:
    try:
        number = float(label) if isinstance(label, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise DataError(
            f"has the label {short_repr(label)}, but a regression needs a finite number, at most {_LARGEST:.3g}"
        )
    return number


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()
