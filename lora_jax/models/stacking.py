"""Layers side by side, `layers/0/…`, `layers/1/…`, or stacked, `layers/…` with one more axis: two forms of one tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import ArgumentError
from ..weights import STACK, AdaptedWeight, is_adapted

LAYERS = "layers"


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` of a decoder holds all layers.

    Example:
        >>> is_stacked("layers/attention/query/kernel"), is_stacked("layers/0/mlp/up/kernel"), is_stacked("norm/scale")
        (True, False, False)
    """
    top, _, rest = path.partition("/")
    return top == LAYERS and not rest.split("/")[0].isdecimal()


def layer_path(path: str, layer: int) -> str:
    """The path of one layer's part of a stacked leaf.

    Example:
        >>> layer_path("layers/mlp/up/kernel", 3)
        'layers/3/mlp/up/kernel'
    """
    return f"{LAYERS}/{layer}/{path.partition('/')[2]}"


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a decoder loaded with `scan_layers=True`, from that of one loaded without.

    Adapted weights are stacked with their factors, so an adapter goes from one form to the other. Every leaf is copied
    once.

    Args:
        params: a decoder's tree, arrays or adapted weights.

    Returns:
        The same with `layers` stacked, every leaf with a leading axis of the layers.

    Raises:
        ValueError: there are no layers side by side, or they differ in structure, in shapes or in how they are
            adapted.

    Example:
        >>> tree = {"layers": {"0": {"kernel": jnp.ones((2, 3))}, "1": {"kernel": jnp.zeros((2, 3))}}}
        >>> stack_layers(tree)["layers"]["kernel"].shape
        (2, 2, 3)
    """
    layers = params.get(LAYERS)
    if not isinstance(layers, Mapping) or not layers or not all(str(number).isdecimal() for number in layers):
        raise ArgumentError(
            '`params` must have its layers side by side below "layers", as from `load(...)` of a decoder'
            + (": these are stacked already." if isinstance(layers, Mapping) and layers else ".")
        )
    members = [layers[number] for number in sorted(layers, key=int)]
    try:
        stacked = jax.tree.map(lambda *nodes: _stack(nodes), *members, is_leaf=is_adapted)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"`params` has layers that can't be stacked, as they differ: {error}") from error
    return {**params, LAYERS: stacked}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`.

    Args:
        params: the tree of a decoder loaded with `scan_layers=True`, arrays or adapted weights.

    Returns:
        The same with one subtree a layer, `layers/0`, `layers/1`, …

    Raises:
        ValueError: there are no stacked layers, or an adapted weight whose first axis is no stack axis.

    Example:
        >>> tree = {"layers": {"kernel": jnp.ones((2, 3, 4))}}
        >>> sorted(unstack_layers(tree)["layers"]), unstack_layers(tree)["layers"]["1"]["kernel"].shape
        (['0', '1'], (3, 4))
    """
    layers = params.get(LAYERS)
    if not isinstance(layers, Mapping) or not layers or any(str(name).isdecimal() for name in layers):
        raise ArgumentError(
            '`params` must have its layers stacked below "layers", as from `load(..., scan_layers=True)`'
            + (": these are side by side already." if isinstance(layers, Mapping) and layers else ".")
        )
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(layers, is_leaf=is_adapted)}
    if len(counts) != 1:
        raise ArgumentError(f"`params` has stacked leaves of different numbers of layers: {sorted(counts)}.")
    split = {
        str(layer): jax.tree.map(lambda node, layer=layer: _member(node, layer), layers, is_leaf=is_adapted)
        for layer in range(counts.pop())
    }
    return {**params, LAYERS: split}


def _stack(nodes: Sequence[Any]) -> Any:
    first = nodes[0]
    if not isinstance(first, AdaptedWeight):
        return jnp.stack(nodes)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)  # refuses nodes that differ in scale or axes
    # What has no stack axis is the same in every member: VeRA's projections.
    shared = {name: getattr(first, name) for name, axes in first.fields.items() if STACK not in axes}
    return dataclasses.replace(stacked, axes=STACK + first.axes, **shared)


def _member(node: Any, layer: int) -> Any:
    if not isinstance(node, AdaptedWeight):
        return node[layer]
    if not str(node.axes).startswith(STACK):
        raise ArgumentError(
            f"`params` has an adapted weight labelled {node.axes!r} among its stacked layers: no `s` first."
        )
    arrays, member = node.stacked()
    return member([array[layer] for array in arrays])
