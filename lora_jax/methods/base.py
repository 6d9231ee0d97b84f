"""What every method is: a frozen dataclass that says which leaves of a parameter tree are trained, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..paths import is_weight_name
from ..selection import SelectionError, Selector, select
from ..state import StateLeaf
from ..weights import is_adapted
from . import dtypes

FROZEN, HEAD = "frozen", "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods.

    Attributes:
        also_train: leaves trained in full beside what the method itself trains, the task's head as a rule: every leaf
            at or below what the selector names.
    """

    also_train: Selector = ()

    # Whether it puts arrays where the base has none, so that no tree of the base's structure computes the same.
    inserts: ClassVar[bool] = False
    # Every method by the name under which an adapter file knows it.
    registry: ClassVar[dict[str, type[Method]]] = {}

    def __post_init__(self) -> None:
        require_selector(self.also_train, "also_train")

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        if not abstract:
            Method.registry[cls.__name__] = cls

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        """The leaves that the method replaces or inserts, by path; none unless it changes weights."""
        del key, uses
        self.own_labels(leaves)  # what it can't train is refused now, rather than at the first step
        return {}

    def folded(self, params: Any) -> tuple[Any, Self]:
        """A trained tree without what only its training needs, and the method that it is then of; the same function."""
        return params, self

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Labels of what the method itself trains, by path."""
        raise NotImplementedError

    def head(self, leaves: Mapping[str, Any]) -> list[str]:
        """Paths that `also_train` selects."""
        found = select(
            leaves, self.also_train, argument="also_train", eligible=is_trainable, kind="trainable leaf", below=True
        )
        return dtypes.trained(leaves, found, argument="also_train")

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        """This method with its selectors written out as rooted leaf paths, so that it means the same on disk."""
        return dataclasses.replace(self, also_train=rooted(self.head(leaves)))


def rooted(paths: list[str]) -> tuple[str, ...]:
    return tuple("/" + path for path in paths)


def is_trainable(path: str, leaf: Any) -> bool:
    """Plain leaves of a floating type that are no state: integers, keys and adapted weights have no gradient.

    Complex ones and those of 8 bits may be named too; `dtypes` then says why they aren't trained.
    """
    del path
    if is_adapted(leaf) or isinstance(leaf, StateLeaf):
        return False
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_weight(path: str, leaf: Any) -> bool:
    """Whether a leaf is a weight that factors can stand beside: floating, two axes or more, not named like a bias."""
    return is_trainable(path, leaf) and len(leaf.shape) >= 2 and is_weight_name(path)


def require_selector(value: Any, argument: str) -> None:
    """Refuses what is no selector, when it is given rather than when it is used."""
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


def is_number(value: Any, kind: type) -> bool:
    """Whether `value` is a plain int or float, not a bool; NumPy scalars count."""
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)
