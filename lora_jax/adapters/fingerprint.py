"""Telling a wrong base from the right one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_SAMPLES = 64


def fingerprint(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{path: {"shape", "sample"}}`: for each leaf its shape and a hash of values at evenly spaced places.

    Values are rounded to bfloat16 first, so a base loaded in bfloat16 has the fingerprint of its float32 form. It
    tells a wrong base from the right one; values that are not sampled may differ.
    """
    return {
        path: {"shape": list(leaf.shape), "sample": _sample(leaf)}
        for path, leaf in leaves.items()
        if hasattr(leaf, "shape")
    }


def _sample(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or math.prod(leaf.shape) == 0:
        return ""
    size = math.prod(leaf.shape)
    places = np.unique(np.linspace(0, size - 1, _SAMPLES).astype(np.int64))
    values = _values(leaf, np.unravel_index(places, leaf.shape) if leaf.shape else ())
    if np.issubdtype(values.dtype, np.floating) or values.dtype == ml_dtypes.bfloat16:
        with np.errstate(over="ignore"):  # a float64 beyond float32
            values = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    return hashlib.blake2s(values.tobytes(), digest_size=8).hexdigest()


def _values(leaf: Any, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """`leaf[index]` on the host, taken from each shard on its own device: a sharded array is not put together."""
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


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = [f"`{path}` is missing here" for path in saved if path not in here]
    found += [f"`{path}` was not in it" for path in here if path not in saved]
    for path in saved:
        if path in here and saved[path] != here[path]:
            shapes = [tuple(side[path].get("shape", ())) for side in (saved, here)]
            found.append(
                f"`{path}` has other values"
                if shapes[0] == shapes[1]
                else f"`{path}` had the shape {shapes[0]}, not {shapes[1]}"
            )
    return found
