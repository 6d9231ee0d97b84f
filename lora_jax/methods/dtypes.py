"""Which dtypes a method takes: every leaf that is to be trained or given factors is checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp

from ..paths import shape_text
from ..selection import SelectionError
from ..types import HasShape, LeafPath, PyTree, has_shape
from ..weights import is_adapted

_COMPLEX = (
    "a gradient step on complex numbers needs their gradient's conjugate, which no optimizer of Optax takes, and "
    "factors are real: hold its real and its imaginary part as two leaves, or leave it out"
)
_EIGHT_BITS = (
    "its gradients would have 8 bits too, and most would be zero: hold it as bfloat16, give it factors (`LoRA`), or "
    "leave it out"
)


def trained(leaves: Mapping[LeafPath, PyTree], paths: Iterable[LeafPath], *, argument: str) -> list[LeafPath]:
    """`paths`, if their leaves can be trained themselves.

    Raises:
        SelectionError: One of them is complex, or a float of 8 bits. Frozen leaves may be either.
    """
    return _taken(leaves, paths, argument, why_not_trained)


def factored(
    leaves: Mapping[LeafPath, PyTree], paths: Iterable[LeafPath], *, argument: str = "targets"
) -> list[LeafPath]:
    """`paths`, if real factors can be trained beside their leaves.

    Raises:
        SelectionError: One of them is complex.
    """
    return _taken(leaves, paths, argument, lambda leaf: _COMPLEX if _is_complex(leaf) else None)


def why_not_trained(leaf: HasShape) -> str | None:
    """Why a leaf of an inexact type can't be trained; `None` if it can."""
    if _is_complex(leaf):
        return _COMPLEX
    if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 16:
        return _EIGHT_BITS
    return None


def _is_complex(leaf: HasShape) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _taken(
    leaves: Mapping[LeafPath, PyTree],
    paths: Iterable[LeafPath],
    argument: str,
    why_not: Callable[[HasShape], str | None],
) -> list[LeafPath]:
    taken = list(paths)
    for path in taken:
        leaf = leaves[path].base if is_adapted(leaves[path]) else leaves[path]
        if has_shape(leaf) and (reason := why_not(leaf)):
            raise SelectionError(f"`{argument}` selects `{path}` {shape_text(leaf)} {leaf.dtype}: {reason}")
    return taken
