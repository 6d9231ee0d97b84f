"""What lora_jax raises on purpose: `LoraJaxError` and its kinds; anything else that comes out of it is a defect."""

from __future__ import annotations

from .text import clipped

_LONGEST = 4000


class LoraJaxError(ValueError):
    """The base of every error that tells a caller what to fix; its message stays readable, whatever it quotes."""

    def __init__(self, message: object = "") -> None:
        super().__init__(clipped(message, _LONGEST))


class ArgumentError(LoraJaxError):
    """An argument out of range, or one that doesn't fit the others."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a type that can't be used."""
