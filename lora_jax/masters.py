"""Float32 copies of leaves that are trained in fewer bits, so that updates too small for the leaf add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from .errors import ArgumentError
from .types import Leaf, Mask, Params, PyTree

if TYPE_CHECKING:
    import optax


class Masters(NamedTuple):
    """The optimizer's state where some trained leaf has fewer bits than float32.

    Attributes:
        copies: A float32 copy of every such leaf; `None` for the others.
        inner: State of the wrapped transformation.
    """

    copies: Params
    inner: PyTree


def with_masters(
    tx: optax.GradientTransformationExtraArgs, moves: Callable[[Params], Mask]
) -> optax.GradientTransformationExtraArgs:
    """`tx` on float32 copies of the leaves that have fewer bits; without such leaves, `tx` and its state as they are.

    A bfloat16 number has 8 bits. An update below 1/256 of it, which is what a learning rate of 1e-4 asks for, is
    rounded away each time, and a thousand of them move nothing. Here they are added to a float32 copy, and the leaf is
    that copy rounded. The wrapped transformation sees gradients, parameters and its own state in float32.

    The update that comes out has the leaf's dtype, as Optax's other transformations give it, and leads to the rounded
    copy; where a number more than halves, doubles or changes its sign in one step, to within half a unit in the last
    place of that update. The leaf has the last word: a number that was changed elsewhere, by more than rounding, takes
    the place of its copy.

    Args:
        tx: The transformation to wrap.
        moves: Function from a tree of parameters to one of booleans, true for leaves that are updated.
    """
    import optax

    def init(params: Params) -> PyTree:
        def copy(leaf: Leaf, moved: bool) -> Leaf:
            return jnp.asarray(leaf).astype(jnp.float32) if moved and _is_narrow(leaf) else None

        copies = jax.tree.map(copy, params, moves(params))
        if not jax.tree.leaves(copies):
            return tx.init(params)
        # Copied once more for `tx`, which may keep what it is given: no buffer is in the state twice.
        return Masters(copies, tx.init(jax.tree.map(_either, params, jax.tree.map(jnp.copy, copies))))

    def update(updates: Params, state: PyTree, params: Params = None, **extra: PyTree) -> tuple[Params, PyTree]:
        if not isinstance(state, Masters):
            return tx.update(updates, state, params, **extra)
        if params is None:
            raise ArgumentError(
                "`params` is missing: some trained leaves have fewer bits than float32, and their updates depend on "
                "where they are: call `tx.update(gradients, state, params)`"
            )
        copies = jax.tree.map(_settled, params, state.copies)
        wide = jax.tree.map(_either, params, copies)
        gradients = jax.tree.map(lambda copy, leaf: _like(leaf, copy), copies, updates, is_leaf=_is_none)
        moved, inner = tx.update(gradients, state.inner, wide, **extra)
        copies = jax.tree.map(
            lambda copy, step: None if copy is None else copy + _like(step, copy), copies, moved, is_leaf=_is_none
        )
        return jax.tree.map(_step_to, params, copies, moved), Masters(copies, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def widened(tree: Params) -> Params:
    """`tree` with its floats of fewer bits in float32, for sums of many of them.

    Example:
        >>> [leaf.dtype.name for leaf in widened([jnp.ones(2, "bfloat16"), jnp.ones(2, "float32")])]
        ['float32', 'float32']
    """
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_narrow(leaf) else leaf, tree)


def _is_narrow(leaf: Leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32


def _is_none(node: object) -> bool:
    return node is None


def _either(leaf: Leaf, copy: Leaf) -> Leaf:
    return leaf if copy is None else copy


def _like(leaf: Leaf, copy: Leaf) -> Leaf:
    return leaf if copy is None or leaf is None else leaf.astype(copy.dtype)


def _settled(leaf: Leaf, copy: Leaf) -> Leaf:
    """The copy where the leaf is what it rounds to, else the leaf.

    Not asked as "does it round to the leaf": XLA may leave the rounding out, since it computes in float32 anyway.
    """
    if copy is None:
        return None
    kind, here = jnp.finfo(leaf.dtype), leaf.astype(copy.dtype)
    near = jnp.abs(copy - here) <= float(kind.eps) * jnp.abs(here) + float(kind.smallest_subnormal)
    return jnp.where(near, copy, here)


def _step_to(leaf: Leaf, copy: Leaf, step: Leaf) -> Leaf:
    return step if copy is None else copy.astype(leaf.dtype) - leaf
