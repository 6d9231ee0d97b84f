"""What the configurations of all families share: reading a `config.json`, and checking its values."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """The sizes and settings of a model, under their names in Hugging Face's `config.json`.

    A field without a default is a size: `config.json` must have it, as a positive integer.

    Raises:
        ValueError: a value out of its range.
    """

    model_type: ClassVar[str]
    # Entries of Hugging Face's `config.json` that give linear layers biases, and which layers those are.
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in _sizes(type(self)):
            self._check_size(name)
        self._check_positive("initializer_range")

    @property
    @abc.abstractmethod
    def max_length(self) -> int:
        """The most tokens of a row."""

    @abc.abstractmethod
    def with_dropout(self, rate: float) -> Self:
        """The same with one rate for all dropout."""

    def with_biases(self) -> Self:
        """The same with a bias on every linear layer, for families that have layers without."""
        raise ArgumentError(
            f"`zero_biases` is for models whose layers lack biases, and those of a {self.model_type} have them all: "
            "leave it out."
        )

    def is_added_bias(self, path: str) -> bool:
        """Whether the leaf at `path` is a bias that only `with_biases` has put there."""
        del path
        return False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Takes the content of a `config.json`; entries that change nothing computed here are left aside.

        Raises:
            ValueError: another kind of model, a missing size, or a variant that isn't implemented.
        """
        model_type = model_type_of(config)
        if model_type != cls.model_type:
            raise unknown_model_type(model_type, [cls.model_type])
        cls._check_variant(config)
        if missing := [name for name in _sizes(cls) if name not in config]:
            raise ArgumentError(f"the configuration lacks {', '.join(f'`{name}`' for name in missing)}.")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    @classmethod
    def _check_variant(cls, config: Mapping[str, Any]) -> None:
        """Refuses what would change the computation and isn't implemented; a family overrides it."""
        del config

    def _check_size(self, name: str) -> None:
        size = getattr(self, name)
        if type(size) is not int or not 0 < size < 2**31:
            raise ArgumentError(f"`{name}` must be a positive integer, not {size!r:.50}.")

    def _check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            raise ArgumentError(
                f"`{width}` ({getattr(self, width)}) must be a multiple of `{heads}` ({getattr(self, heads)})."
            )

    def _check_choice(self, name: str, choices: Iterable[str]) -> None:
        value = getattr(self, name)
        if value not in (known := list(choices)):
            raise ArgumentError(f"`{name}` {value!r:.50} is unknown; known are {', '.join(known)}.")

    def _check_rate(self, name: str) -> None:
        rate = getattr(self, name)
        if not (_is_number(rate) and 0 <= rate < 1):
            raise ArgumentError(f"`{name}` must be a number from 0 to below 1, not {rate!r:.50}.")

    def _check_flag(self, name: str) -> None:
        if not isinstance(value := getattr(self, name), bool):
            raise ArgumentError(f"`{name}` must be true or false, not {value!r:.50}.")

    def _check_positive(self, name: str) -> None:
        number = getattr(self, name)
        if not _is_number(number) or number <= 0:
            raise ArgumentError(f"`{name}` must be a positive number, not {number!r:.50}.")


def model_type_of(config: Mapping[str, Any]) -> object:
    """The `model_type` that the content of a `config.json` names.

    Raises:
        ValueError: it is no JSON object.
    """
    if not isinstance(config, Mapping):
        raise ArgumentError(f"a model's configuration must be a JSON object, not {type(config).__name__}.")
    return config.get("model_type")


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names that the content of a `config.json` gives to the outputs of a head, in the outputs' order.

    The order is that of the numbers in `id2label`, whatever order they are written in.

    Returns:
        `None` where there are none, or a number is missing.

    Example:
        >>> label_names({"id2label": {"1": "pos", "0": "neg"}})
        ('neg', 'pos')
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return None
    by_place = {str(place): str(name) for place, name in names.items()}
    places = [str(place) for place in range(len(by_place))]
    return tuple(by_place[place] for place in places) if by_place.keys() == set(places) else None


def unknown_model_type(model_type: object, known: Iterable[str]) -> ValueError:
    """The error to raise for a `model_type` that isn't among the `known`."""
    return ValueError(
        f"`model_type` is {model_type!r:.50}, and only {', '.join(map(repr, known))} can be loaded. Another model's "
        "own JAX function works with `lora_jax.attach` and `lora_jax.adapt` as it is."
    )


def _sizes(cls: type[ModelConfig]) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
