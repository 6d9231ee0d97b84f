"""Rotary positions: queries and keys are rotated by angles proportional to the position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864. The scaling of Llama
3 follows its released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_jax.errors import ArgumentError

from .layers import wide

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of a model's rotary positions.

    Attributes:
        theta: Base `θ`: pair `j` of the `h / 2` feature pairs rotates by `θ^(-2j / h)` radians per position.
        kind: `"default"`; `"linear"`, with all frequencies divided by `factor`; or `"llama3"`, with low frequencies
            divided, high frequencies kept, and a ramp in between.
        factor: Factor by which the context was extended.
        low_freq_factor, high_freq_factor: Start and end of the ramp of `"llama3"`, in turns per original context.
        original_length: Length of the original context, in tokens.

    Raises:
        ValueError: The kind is unknown, or a number is out of range.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"`rope_type` must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r:.50}.")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_length"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise ArgumentError(f"`{_THEIRS.get(name, name)}` must be a positive number, got {number!r:.50}.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ArgumentError(
                f"`high_freq_factor` must be more than `low_freq_factor` ({self.low_freq_factor}), got "
                f"{self.high_freq_factor}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a `config.json`: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` before it.

        Raises:
            ValueError: An entry is missing or of the wrong type, or a variant isn't implemented.

        Example:
            >>> Rope.from_config({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}).factor
            2.0
            >>> Rope.from_config({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).theta
            500000.0
        """
        name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        entries = config.get(name) or {}
        if not isinstance(entries, Mapping) or any(isinstance(value, Mapping) for value in entries.values()):
            raise ArgumentError(f"`{name}` must be one object of numbers for all layers, got {entries!r:.80}.")
        partial = entries.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ArgumentError(f"`partial_rotary_factor` must be 1, got {partial!r:.50}.")
        theta = entries.get("rope_theta", config.get("rope_theta"))
        kind = entries.get("rope_type", entries.get("type", "default"))
        fields: dict[str, Any] = {"kind": kind} if theta is None else {"kind": kind, "theta": theta}
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for entry in needed.get(kind, ()) if isinstance(kind, str) else ():
            if entry not in entries:
                raise ArgumentError(f"`{name}` of type {kind!r} lacks `{entry}`.")
            fields[entry] = entries[entry]
        if kind == "llama3":
            length = "original_max_position_embeddings"
            fields["original_length"] = config.get(length, entries.get(length, config.get("max_position_embeddings")))
        return cls(**fields)

    def frequencies(self, width: int) -> Float[np.ndarray, " pairs"]:
        """The `width / 2` frequencies in radians per position, computed in float32 as when the models were trained.

        Example:
            >>> Rope(theta=100.0).frequencies(4).round(3).tolist()
            [1.0, 0.10000000149011612]
        """
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        plain = np.float32(1) / np.float32(self.theta) ** exponents
        if self.kind == "default":
            return plain
        stretched = plain / np.float32(self.factor)
        if self.kind == "linear":
            return stretched
        turns = np.float32(self.original_length) * plain / np.float32(2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0, 1).astype(np.float32)
        return (1 - kept) * stretched + kept * plain


# Names of the entries in `config.json`, if they differ.
_THEIRS = {"theta": "rope_theta", "original_length": "original_max_position_embeddings"}


class Rotation(NamedTuple):
    """Cosines and sines of the angles in float32, shared by all heads; the leading axis is the batch, or 1."""

    cos: Float[Array, "batch_or_1 1 time pairs"]
    sin: Float[Array, "batch_or_1 1 time pairs"]


def rotation(positions: Int[Array, "batch_or_1 time"], frequencies: Float[np.ndarray, " pairs"]) -> Rotation:
    """The rotation at each position."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "batch heads time h"], turn: Rotation) -> Float[Array, "batch heads time h"]:
    """Rotates the feature pairs `(j, j + h / 2)`, in float32 or wider."""
    dtype = wide(x.dtype)
    cos, sin = turn.cos.astype(dtype), turn.sin.astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
