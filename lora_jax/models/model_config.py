"""`ModelConfig`, the base of all families' configurations: it reads a `config.json` and checks its values."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """A model's sizes and settings, named as in Hugging Face's `config.json`.

    A field without a default is a size: `config.json` must give it as a positive integer.

    Raises:
        ValueError: A value is out of range.
    """

    model_type: ClassVar[str]
    # Entries of `config.json` that add biases to linear layers, each with the layers it applies to.
    bias_entries: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in _sizes(type(self)):
            self._check_size(name)
        self._check_positive("initializer_range")

    @property
    @abc.abstractmethod
    def max_length(self) -> int:
        """Maximum number of tokens in a sequence."""

    @abc.abstractmethod
    def with_dropout(self, rate: float) -> Self:
        """A copy with this rate for every dropout."""

    def with_biases(self) -> Self:
        """A copy with a bias on every linear layer, for families in which some layers have none."""
        raise ArgumentError(
            f"`zero_biases` applies to models with layers that lack a bias, and every layer of a {self.model_type} has "
            "one: omit it."
        )

    def is_added_bias(self, path: str) -> bool:
        """Whether the leaf at `path` is a bias that exists only because of `with_biases`."""
        del path
        return False

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> Self:
        """Makes a configuration from the content of a `config.json`, ignoring entries that don't affect the result.

        Raises:
            ValueError: Another `model_type`, a missing size, or a variant that isn't implemented.
        """
        model_type = model_type_of(config)
        if model_type != cls.model_type:
            raise unknown_model_type(model_type, [cls.model_type])
        cls._check_variant(config)
        if missing := [name for name in _sizes(cls) if name not in config]:
            raise ArgumentError(f"the configuration lacks {', '.join(f'`{name}`' for name in missing)}.")
        values: dict[str, Any] = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**values)

    @classmethod
    def _check_variant(cls, config: Mapping[str, object]) -> None:
        """Refuses entries that would change the computation and aren't implemented; families override it."""
        del config

    def _check_size(self, name: str) -> None:
        size = getattr(self, name)
        if type(size) is not int or not 0 < size < 2**31:
            raise ArgumentError(f"`{name}` must be a positive integer, got {size!r:.50}.")

    def _check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            raise ArgumentError(
                f"`{width}` ({getattr(self, width)}) must be a multiple of `{heads}` ({getattr(self, heads)})."
            )

    def _check_choice(self, name: str, choices: Iterable[str]) -> None:
        value = getattr(self, name)
        if value not in (known := list(choices)):
            raise ArgumentError(f"`{name}` must be one of {', '.join(known)}, got {value!r:.50}.")

    def _check_rate(self, name: str) -> None:
        rate = getattr(self, name)
        if not (_is_number(rate) and 0 <= rate < 1):
            raise ArgumentError(f"`{name}` must be a number of at least 0 and below 1, got {rate!r:.50}.")

    def _check_flag(self, name: str) -> None:
        if not isinstance(value := getattr(self, name), bool):
            raise ArgumentError(f"`{name}` must be true or false, got {value!r:.50}.")

    def _check_positive(self, name: str) -> None:
        number = getattr(self, name)
        if not _is_number(number) or number <= 0:
            raise ArgumentError(f"`{name}` must be a positive number, got {number!r:.50}.")


def model_type_of(config: Mapping[str, object]) -> object:
    """The `model_type` in the content of a `config.json`.

    Raises:
        ValueError: The content isn't a JSON object.
    """
    if not isinstance(config, Mapping):
        raise ArgumentError(f"a model's configuration must be a JSON object, got {type(config).__name__}.")
    return config.get("model_type")


def label_names(config: Mapping[str, object]) -> tuple[str, ...] | None:
    """The labels of a head's outputs according to the content of a `config.json`, ordered by their ids in `id2label`.

    Returns:
        The labels, or `None` if there are none or an id is missing.

    Example:
        >>> label_names({"id2label": {"1": "pos", "0": "neg"}})
        ('neg', 'pos')
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return None
    by_id = {str(number): str(name) for number, name in names.items()}
    ids = [str(number) for number in range(len(by_id))]
    return tuple(by_id[number] for number in ids) if by_id.keys() == set(ids) else None


def unknown_model_type(model_type: object, known: Iterable[str]) -> ArgumentError:
    """The error to raise for a `model_type` that isn't among the `known`."""
    return ArgumentError(
        f"`model_type` must be one of {', '.join(map(repr, known))}, got {model_type!r:.50}. Other models aren't "
        "bundled: use `lora_jax.attach` and `lora_jax.adapt` on their own JAX functions."
    )


def _sizes(cls: type[ModelConfig]) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
