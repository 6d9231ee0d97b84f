"""What every method is: a frozen dataclass that says which leaves of a parameter tree are trained, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from ..class_registry import Registry
from ..errors import ArgumentError
from ..paths import is_weight_name
from ..selection import SelectionError, Selector, select
from ..state import StateLeaf
from ..types import LeafPath, Params, PyTree, Uses
from ..weights import AdaptedWeight, is_adapted
from . import dtypes

FROZEN, HEAD = "frozen", "head"

# A tree's leaves by path: arrays, adapted weights, marks in place of state, and what else a model's tree holds.
Leaves: TypeAlias = Mapping[LeafPath, PyTree]
# One label for a leaf, or a node of labels for an adapted weight.
LeafLabels: TypeAlias = dict[LeafPath, PyTree]


def flag(help: str, *, name: str | None = None) -> dict[str, object]:
    """Metadata of a dataclass field by which the method's option has a flag on the command line.

    Args:
        help: Text of the flag, without its default.
        name: Name of the flag; by default the field's.
    """
    return {"help": help, "flag": name}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods.

    A method is one class, and the class says everything about it. One with a `name` is registered when it is defined:
    `lora-jax train --method NAME`, config files, `compare`, reports and adapter files know it from then on. A subclass
    without a `name` of its own, a base of several methods for example, is not registered.

    Attributes:
        also_train: Leaves trained in full beside what the method itself trains, usually the task's head: every leaf
            at or below what the selector names.
    """

    # Name on the command line, in config files and in `compare`.
    name: ClassVar[str] = ""
    # Name in adapter files; by default `name`.
    saved_as: ClassVar[str] = ""
    # Name in reports, and what is trained in a few words; by default `name`, and nothing.
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    # Options of a run that names none, beside `also_train`.
    defaults: ClassVar[Mapping[str, object]] = {}
    # Peak learning rate of AdamW for classification and regression; see `learning_rate`.
    default_rate: ClassVar[float] = 1e-3
    # Words that `targets` takes for a group of leaves, with the names of modules that each stands for.
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Every method by its name in adapter files.
    registry: ClassVar[Registry[type[Method]]] = Registry("saved_as", r"[A-Za-z][A-Za-z0-9_-]*")
    # Every method by its name on the command line.
    by_name: ClassVar[Registry[type[Method]]] = Registry("name", r"[a-z][a-z0-9-]*")

    also_train: Selector = dataclasses.field(default=(), metadata=flag("Modules that are trained in full, too"))

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        cls.name = own.get("name", "")
        cls.saved_as, cls.title = own.get("saved_as", cls.name), own.get("title", cls.name)
        cls.summary = own.get("summary", "")
        if cls.name:
            Method.by_name.check(cls.name, cls)
            Method.registry.add(cls.saved_as, cls)
            Method.by_name.add(cls.name, cls)

    def __post_init__(self) -> None:
        require_selector(self.also_train, "also_train")

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        """The leaves that the method replaces or inserts, by path; none unless it changes weights."""
        del key, uses
        self.own_labels(leaves)  # what it can't train is refused now, rather than at the first step
        return {}

    def folded(self, params: Params) -> tuple[Params, Self]:
        """A trained tree without what only training needs, computing the same, and the method that fits it."""
        return params, self

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        """Labels of what the method itself trains, by path."""
        raise NotImplementedError

    def head(self, leaves: Leaves) -> list[LeafPath]:
        """Paths that `also_train` selects."""
        found = select(
            leaves, self.also_train, argument="also_train", eligible=is_trainable, kind="trainable leaf", below=True
        )
        return dtypes.trained(leaves, found, argument="also_train")

    def resolved(self, leaves: Leaves) -> Self:
        """This method with its selectors written out as rooted leaf paths, so that it means the same on disk."""
        return dataclasses.replace(self, also_train=rooted(self.head(leaves)))

    # What runs and comparisons take where nothing is said.

    @classmethod
    def for_task(cls, task: str, options: Mapping[str, object]) -> Self:
        """The method with these options, and for the others the defaults of a task's runs."""
        arguments: dict[str, Any] = {**cls.task_defaults(task), **options}
        return cls(**arguments)

    @classmethod
    def task_defaults(cls, task: str) -> dict[str, object]:
        """Options of a task's runs; a language model has its head already, so nothing is trained beside."""
        return {**cls.defaults, "also_train": () if task == "causal-lm" else ("classifier",)}

    @classmethod
    def comparison_defaults(cls, options: Mapping[str, object]) -> Mapping[str, object]:
        """Options in a comparison that differ from those of a single run, given the options that are said."""
        del options
        return {}

    def learning_rate(self, task: str) -> float:
        """Default peak learning rate of AdamW, as measured in `docs/results.md`.

        For language models LoRA's is that of its paper for GPT-2 (arXiv:2106.09685, Table 11), a fifth of the one for
        classification; the other methods keep the proportion.
        """
        return self.default_rate / 5 if task == "causal-lm" else self.default_rate


def rooted(paths: list[LeafPath]) -> tuple[str, ...]:
    return tuple("/" + path for path in paths)


def is_trainable(path: LeafPath, leaf: PyTree) -> bool:
    """Whether a leaf is plain, of a floating type and no state; integers, keys and adapted weights have no gradient.

    Complex leaves and those of 8 bits may be named too; `dtypes` then says why they aren't trained.
    """
    del path
    if is_adapted(leaf) or isinstance(leaf, StateLeaf):
        return False
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_weight(path: LeafPath, leaf: PyTree) -> bool:
    """Whether factors can stand beside a leaf: it is floating, has two axes or more, and isn't named like a bias."""
    return is_trainable(path, leaf) and len(leaf.shape) >= 2 and is_weight_name(path)


def require_selector(value: object, argument: str) -> None:
    """Refuses what is no selector when it is given, rather than when it is used."""
    if callable(value) or isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise SelectionError(
            f"`{argument}` must be a regular expression, a sequence of names or a callable `(path, leaf) -> bool`, "
            f"got {value!r}"
        )
    if argument == "targets" and not value:
        raise SelectionError("`targets` is empty: name what to train, or use `Frozen` to train the head alone")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


def require_made(method: Method, labels: LeafLabels) -> LeafLabels:
    """`labels`, if the tree has something of the method."""
    require(
        bool(labels),
        f"the tree has nothing that {type(method).__name__} trains: make it with `lj.attach(params, method, key=...)` "
        "and label its result",
    )
    return labels


def require_positive(value: object, argument: str, suffix: str = "") -> None:
    require(is_number(value, int) and value >= 1, f"`{argument}` must be a positive integer, got {value!r}{suffix}")


def require_probability(value: object, argument: str) -> None:
    require(is_number(value, float) and 0 <= value < 1, f"`{argument}` must be in [0, 1), got {value!r}")


def require_seed(value: object, argument: str = "seed") -> None:
    """Refuses what isn't a seed of 32 bits."""
    require(
        is_number(value, int) and 0 <= value < 2**32,
        f"`{argument}` must be an integer from 0 to 2³² - 1, got {value!r}",
    )


def is_number(value: object, kind: type[int] | type[float]) -> TypeGuard[float]:
    """Whether `value` is a plain int or float, not a bool; NumPy scalars count."""
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)
