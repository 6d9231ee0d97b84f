"""Reads a model's leaves from the tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..files import FileError
from .checkpoint.byte_progress import ByteCount, Progress
from .checkpoint.weight_files import Located, read_tensors
from .family import Family
from .stacking import is_stacked


def read_leaves(
    family: Family,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    held: Mapping[str, list[str]],
    tensors: Mapping[str, Located],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Reads leaves from a checkpoint. Peak memory is the result and one leaf.

    Args:
        family: The model's family, which knows which tensors are transposed.
        leaves: Shapes and dtypes of the leaves, by path.
        held: Names of the tensors that make up each leaf: one, or one per layer for a stacked leaf. Two leaves may
            share a tensor.
        tensors: Locations of the tensors, by name.
        progress: See `load`.

    Raises:
        FileError: A tensor holds NaN or an infinity, or does after the cast to the leaf's dtype.
    """
    stacks = {path: names for path, names in held.items() if is_stacked(path)}
    single: dict[str, list[str]] = {}
    for path in held.keys() - stacks.keys():
        single.setdefault(held[path][0], []).append(path)
    every = [*single, *(name for names in stacks.values() for name in names)]
    count = ByteCount(sum(tensors[name].info.nbytes for name in every), progress)

    values: dict[str, jax.Array] = {}
    for name, array in read_tensors(tensors, single):
        for path in single[name]:
            turned = array.T if family.names.is_transposed(path) else array
            # A copy, since a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
            with np.errstate(over="ignore"):  # `_check_finite` reports it
                cast = turned.astype(leaves[path].dtype, copy=False)
            _check_finite(cast, array, name, tensors[name])
            values[path] = jnp.array(cast, copy=True)
        count.add(array.nbytes)
    for path, names in stacks.items():
        stack = np.empty(leaves[path].shape, leaves[path].dtype)
        layers = {name: layer for layer, name in enumerate(names)}
        for name, array in read_tensors(tensors, names):
            with np.errstate(over="ignore"):
                stack[layers[name]] = array.T if family.names.is_transposed(path) else array
            _check_finite(stack[layers[name]], array, name, tensors[name])
            count.add(array.nbytes)
        values[path] = jnp.array(stack, copy=True)
    return values


def _check_finite(cast: np.ndarray, array: np.ndarray, name: str, located: Located) -> None:
    """A single NaN in a base makes every loss NaN, which looks as if training had diverged."""
    # If the sum is finite, so is every value. This takes half the time, and no array of flags.
    if np.isfinite(cast.sum(dtype=np.float64)) or (finite := np.isfinite(cast.astype(np.float64))).all():
        return
    count = f"{finite.size - finite.sum():,} of {finite.size:,} values"
    if np.isfinite(array.astype(np.float64)).all():
        raise FileError(
            f"{located.file}: {count} in the tensor '{name}' ({array.dtype}) are too large for {cast.dtype}: load the "
            "model with another `dtype`."
        )
    raise FileError(
        f"{located.file}: {count} in the tensor '{name}' are NaN or infinite. The file is damaged, or was saved after "
        "training had diverged: use another."
    )
