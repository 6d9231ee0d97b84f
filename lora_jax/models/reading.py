"""The leaves of a tree from the tensors of a checkpoint, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoint import Located, read_tensors
from .family import Family
from .progress import ByteCount, Progress
from .stacking import is_stacked


def read_leaves(
    family: Family,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    held: Mapping[str, list[str]],
    tensors: Mapping[str, Located],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Reads what a checkpoint holds. Beside the result, memory is taken for one leaf.

    Args:
        family: says which tensors are transposed.
        leaves: shapes and dtypes by path.
        held: the tensors that each leaf is made of: one, or those of the layers of a stacked one. A tensor may be that
            of two leaves.
        tensors: where they are.
        progress: see `load`.
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
            # A copy: a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
            values[path] = jnp.array(turned.astype(leaves[path].dtype, copy=False), copy=True)
        count.add(array.nbytes)
    for path, names in stacks.items():
        stack = np.empty(leaves[path].shape, leaves[path].dtype)
        layers = {name: layer for layer, name in enumerate(names)}
        for name, array in read_tensors(tensors, names):
            stack[layers[name]] = array.T if family.names.is_transposed(path) else array
            count.add(array.nbytes)
        values[path] = jnp.array(stack, copy=True)
    return values
