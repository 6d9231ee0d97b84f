"""The two forms of a decoder's tree: one subtree per layer (`layers/0/…`), or stacked layers (`layers/…`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..errors import ArgumentError
from ..weights import STACK, AdaptedWeight, is_adapted

LAYERS = "layers"


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` in a decoder's tree holds all layers.

    Example:
        >>> is_stacked("layers/attention/query/kernel"), is_stacked("layers/0/mlp/up/kernel"), is_stacked("norm/scale")
        (True, False, False)
    """
    top, _, rest = path.partition("/")
    return top == LAYERS and not rest.split("/")[0].isdecimal()


def layer_path(path: str, layer: int) -> str:
    """The path of a stacked leaf's slice for one layer.

    Example:
        >>> layer_path("layers/mlp/up/kernel", 3)
        'layers/3/mlp/up/kernel'
    """
    return f"{LAYERS}/{layer}/{path.partition('/')[2]}"


def stack_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Converts a decoder's tree to the form that `load(..., scan_layers=True)` gives.

    Adapted weights are stacked together with their factors, so an adapter can move between the two forms. Every leaf
    is copied once.

    Args:
        params: A decoder's tree of arrays or adapted weights.

    Returns:
        The tree with `layers` stacked: each of its leaves has a leading axis over the layers.

    Raises:
        ValueError: There are no unstacked layers, or they differ in structure, in shapes or in how they are adapted.

    Example:
        >>> tree = {"layers": {"0": {"kernel": jnp.ones((2, 3))}, "1": {"kernel": jnp.zeros((2, 3))}}}
        >>> stack_layers(tree)["layers"]["kernel"].shape
        (2, 2, 3)
    """
    layers = params.get(LAYERS)
    if not isinstance(layers, Mapping) or not layers or not all(str(number).isdecimal() for number in layers):
        raise ArgumentError(
            '`params` must have one subtree per layer below "layers", as from `load(...)` of a decoder'
            + (", got stacked layers." if isinstance(layers, Mapping) and layers else ".")
        )
    members = [layers[number] for number in sorted(layers, key=int)]
    try:
        stacked = jax.tree.map(lambda *nodes: _stack(nodes), *members, is_leaf=is_adapted)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"`params` has layers that can't be stacked, as they differ: {error}") from error
    return {**params, LAYERS: stacked}


def unstack_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The inverse of `stack_layers`.

    Args:
        params: A tree of arrays or adapted weights, of a decoder loaded with `scan_layers=True`.

    Returns:
        The tree with one subtree per layer: `layers/0`, `layers/1`, …

    Raises:
        ValueError: There are no stacked layers, or the first axis of an adapted weight isn't a stack axis.

    Example:
        >>> tree = {"layers": {"kernel": jnp.ones((2, 3, 4))}}
        >>> sorted(unstack_layers(tree)["layers"]), unstack_layers(tree)["layers"]["1"]["kernel"].shape
        (['0', '1'], (3, 4))
    """
    layers = params.get(LAYERS)
    if not isinstance(layers, Mapping) or not layers or any(str(name).isdecimal() for name in layers):
        raise ArgumentError(
            '`params` must have its layers stacked below "layers", as from `load(..., scan_layers=True)`'
            + (", got one subtree per layer." if isinstance(layers, Mapping) and layers else ".")
        )
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(layers, is_leaf=is_adapted)}
    if len(counts) != 1:
        raise ArgumentError(f"`params` must have the same number of layers in each stacked leaf, got {sorted(counts)}.")
    split = {
        str(layer): jax.tree.map(lambda node, layer=layer: _member(node, layer), layers, is_leaf=is_adapted)
        for layer in range(counts.pop())
    }
    return {**params, LAYERS: split}


def _stack(nodes: Sequence[PyTree]) -> PyTree:
    first = nodes[0]
    if not isinstance(first, AdaptedWeight):
        return jnp.stack(nodes)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)  # raises if nodes differ in scale or axes
    # Arrays without a stack axis, VeRA's projections, are the same in every layer.
    shared = {name: getattr(first, name) for name, axes in first.fields.items() if STACK not in axes}
    return dataclasses.replace(stacked, axes=STACK + first.axes, **shared)


def _member(node: PyTree, layer: int) -> PyTree:
    if not isinstance(node, AdaptedWeight):
        return node[layer]
    if not str(node.axes).startswith(STACK):
        raise ArgumentError(
            f"`params` must have adapted weights whose axes begin with `s` among its stacked layers, got {node.axes!r}."
        )
    arrays, member = node.stacked()
    return member([array[layer] for array in arrays])
