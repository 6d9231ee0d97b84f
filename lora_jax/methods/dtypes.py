"""Which dtypes a method takes: everything that would be trained or given factors passes here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from ..paths import shape_text
from ..selection import SelectionError
from ..weights import is_adapted

_COMPLEX = (
    "a gradient step on complex numbers needs their gradient's conjugate, which no optimizer of Optax takes, and "
    "factors are real: hold its real and its imaginary part as two leaves, or leave it out"
)
_EIGHT_BITS = (
    "its gradients would have 8 bits too, and most would be zero: hold it as bfloat16, give it factors (`LoRA`), or "
    "leave it out"
)


def trained(leaves: Mapping[str, Any], paths: Iterable[str], *, argument: str) -> list[str]:
    """`paths`, whose leaves are to be trained themselves.

    Raises:
        SelectionError: one of them is complex, or a float of 8 bits. What stays frozen may be either.
    """
    return _taken(leaves, paths, argument, why_not_trained)


def factored(leaves: Mapping[str, Any], paths: Iterable[str], *, argument: str = "targets") -> list[str]:
    """`paths`, beside whose leaves real factors are to be trained.

    Raises:
        SelectionError: one of them is complex.
    """
    return _taken(leaves, paths, argument, lambda leaf: _COMPLEX if _is_complex(leaf) else None)


def why_not_trained(leaf: Any) -> str | None:
    """Why a leaf of an inexact type can't be trained; `None` if it can."""
    if _is_complex(leaf):
        return _COMPLEX
    if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 16:
        return _EIGHT_BITS
    return None


def _is_complex(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _taken(leaves: Mapping[str, Any], paths: Iterable[str], argument: str, why_not: Any) -> list[str]:
    taken = list(paths)
    for path in taken:
        leaf = leaves[path].base if is_adapted(leaves[path]) else leaves[path]
        if hasattr(leaf, "dtype") and (reason := why_not(leaf)):
            raise SelectionError(f"`{argument}` selects `{path}` {shape_text(leaf)} {leaf.dtype}: {reason}")
    return taken
