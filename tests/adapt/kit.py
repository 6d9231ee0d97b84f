"""What the tests of `adapt` share: a case, factors on each of its weights, and the comparison with the merged one."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.paths import flatten_with_paths
from lora_jax.weights import is_adapted

# Float32, matmul precision "highest", relative to the largest value of the tree: sums in another order, no more.
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A function of parameters, and the labels that `trace_weights` must find for each of its weights."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    labels: dict[str, str]
    tolerance: float = TOLERANCE


def normal(name: str, *shape: int) -> jax.Array:
    """Draws that depend on a name, so that no two arrays of a case are alike; by NumPy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32))


def attach_everywhere(fn: Callable[..., Any], params: Any, *args: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    """What `attach` gives for every weight that `fn` uses, with random factors: B = 0 would pass any test."""
    uses = lj.trace_weights(fn, params, *args, **kwargs)
    method = lj.LoRA(rank=2, alpha=3, targets=lambda path, _: path in uses, dropout=dropout)
    shapes = jax.eval_shape(lambda key: lj.attach(params, method, key=key, uses=uses), jax.random.key(0))
    paths, nodes, treedef = flatten_with_paths(shapes)

    def filled(path: str, node: Any, leaf: Any) -> Any:
        if not isinstance(node, lj.LoRAWeight):
            return leaf
        a, b = normal(f"{path}/a", *node.a.shape), 0.3 * normal(f"{path}/b", *node.b.shape)
        return dataclasses.replace(node, base=leaf, a=a, b=b)

    leaves = jax.tree.leaves(params)
    return jax.tree.unflatten(treedef, [filled(*each) for each in zip(paths, nodes, leaves, strict=True)])


def node(name: str, *shape: int, axes: str = "io", rank: int = 2, scale: float = 1.5, dtype: Any = None) -> Any:
    """A `LoRAWeight` with a random base and random factors."""
    sizes = {role: [n for n, own in zip(shape, axes, strict=True) if own == role] for role in "sio"}
    return lj.LoRAWeight(
        normal(f"{name}/base", *shape).astype(dtype or jnp.float32),
        normal(f"{name}/a", *sizes["s"], rank, *sizes["i"]),
        0.3 * normal(f"{name}/b", *sizes["s"], rank, *sizes["o"]),
        scale=scale,
        axes=axes,
    )


def merge_nodes(tree: Any) -> Any:
    """`merge_params` in the test's own words: one NumPy einsum a node, so that a mistake in `merge` shows."""

    def fold(leaf: Any) -> Any:
        if not isinstance(leaf, lj.LoRAWeight):
            return leaf
        letters = "abcdefghijklm"[: leaf.ndim]
        stack, inner, outer = ("".join(x for x, own in zip(letters, leaf.axes, strict=True) if own == s) for s in "sio")
        delta = jnp.einsum(f"{stack}r{inner},{stack}r{outer}->{letters}", leaf.a, leaf.b, precision="highest")
        return (leaf.base.astype(jnp.float32) + leaf.scale * delta).astype(leaf.dtype)

    return jax.tree.map(fold, tree, is_leaf=is_adapted)


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Equal structures and dtypes; values to `tolerance` of the tree's largest."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(e, np.float64))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    assert [a.shape for a, _ in pairs] == [e.shape for _, e in pairs]
    largest = max(np.abs(e).max(initial=0) for _, e in pairs)
    assert largest > 0, "nothing to compare: every expected value is 0"
    for a, e in pairs:
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest)


def project(tree: Any) -> jax.Array:
    """A scalar that every output takes part in, each with a weight of its own."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.cos(jnp.arange(leaf.size)) @ leaf.ravel() for leaf in leaves]).sum()


def value_and_gradients(fn: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A function for `fn`'s outputs, and the gradients of a scalar of them with respect to every leaf of `params`."""

    def loss(params: Any, *args: Any) -> tuple[jax.Array, Any]:
        outputs = fn(params, *args)
        return project(outputs), outputs

    return jax.grad(loss, has_aux=True)


def assert_as_merged(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    on_materialize: Any = "error",
    tolerance: float = TOLERANCE,
) -> None:
    """`adapt(fn)` gives the merged function's values, and its gradients for every leaf, base weights included."""
    adapted = value_and_gradients(lj.adapt(fn, on_materialize=on_materialize))
    merged = value_and_gradients(lambda params, *args: fn(merge_nodes(params), *args))
    # In one program: compilation is most of what these tests cost.
    both = jax.jit(lambda params: (adapted(params, *args), merged(params, *args)))(params)
    for actual, expected in zip(*both, strict=True):
        assert_close(actual, expected, tolerance)
