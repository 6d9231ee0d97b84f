"""Telling a wrong base from the right one: a fingerprint of its leaves."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ..errors import ArgumentError
from ..types import HasShape, Leaf, has_shape
from .description import AdapterError

CheckBase = Literal["error", "warn", "ignore"]
# `{leaf path: {"shape": [...], "sample": "..."}}`; that of a file has been checked for its shapes only.
Fingerprint = Mapping[str, Mapping[str, Any]]

_SAMPLES = 64
_SHOWN = 8  # leaves that a message names


def fingerprint(leaves: Mapping[str, Leaf]) -> dict[str, dict[str, object]]:
    """`{path: {"shape", "sample"}}`: for each leaf its shape and a hash of values at evenly spaced places.

    Values are rounded to bfloat16 first, so a base loaded in bfloat16 has the fingerprint of its float32 form. It
    tells a wrong base from the right one; values that are not sampled may differ.
    """
    return {
        path: {"shape": list(leaf.shape), "sample": _sample(leaf)} for path, leaf in leaves.items() if has_shape(leaf)
    }


def _sample(leaf: HasShape) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or math.prod(leaf.shape) == 0:
        return ""
    size = math.prod(leaf.shape)
    places = np.unique(np.linspace(0, size - 1, _SAMPLES).astype(np.int64))
    values = _values(leaf, np.unravel_index(places, leaf.shape) if leaf.shape else ())
    if np.issubdtype(values.dtype, np.floating) or values.dtype == ml_dtypes.bfloat16:
        with np.errstate(over="ignore"):  # a float64 beyond float32
            values = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    return hashlib.blake2s(values.tobytes(), digest_size=8).hexdigest()


def _values(leaf: HasShape, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """`leaf[index]` on the host, taken from each shard on its own device: a sharded array is not gathered."""
    if not isinstance(leaf, jax.Array) or not index:
        return np.asarray(leaf)[index]
    values = np.zeros(index[0].shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        starts = [cut.start or 0 for cut in shard.index]
        inside = np.logical_and.reduce(
            [(start <= i) & (i < start + size) for i, start, size in zip(index, starts, shard.data.shape, strict=True)]
        )
        values[inside] = shard.data[tuple(i[inside] - start for i, start in zip(index, starts, strict=True))]
    return values


def require_check_base(check: str) -> None:
    if check not in get_args(CheckBase):
        raise ArgumentError(f'`check_base` must be "error", "warn" or "ignore", got {check!r}.')


def check_fingerprint(folder: Path, saved: Fingerprint, here: Fingerprint, check: CheckBase) -> None:
    """Compares a base with the one that was saved, and refuses or warns on behalf of the caller's caller.

    Args:
        folder: Folder of the saved one, for the message.
        saved, here: Fingerprints.
        check: Reaction to a difference.

    Raises:
        AdapterError: They differ, and `check` is `"error"`; the leaves are named.
    """
    found = [f"`{path}` is missing here" for path in saved if path not in here]
    found += [f"`{path}` was not in it" for path in here if path not in saved]
    found += [
        _difference(path, saved[path], here[path]) for path in saved if here.get(path, saved[path]) != saved[path]
    ]
    if not found:
        return
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    message = f"{folder} was trained on another base: {'; '.join(found[:_SHOWN])}{more}."
    if check == "error":
        raise AdapterError(f'{message} Load the base that it was trained on, or pass `check_base="warn"`.')
    warnings.warn(message, stacklevel=3)


def _difference(path: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    shapes = [tuple(side.get("shape", ())) for side in (saved, here)]
    if shapes[0] == shapes[1]:
        return f"`{path}` has other values"
    return f"`{path}` had the shape {shapes[0]}, not {shapes[1]}"
