"""A weight with a factor for each of its outputs, or inputs: the uses of `v ⊙ W`, with `v` applied to activations.

The vector has the stack axes of the weight and those of one label, `(stack…, out…)` or `(stack…, in…)`. Each function
takes that label, and a `product` that computes the use without the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import STACK, AdaptedWeight, ConvSpec, DotSpec, RaggedDotSpec, TakeSpec, Unfactorable, wider


def vector_axes(weight: AdaptedWeight, label: str) -> list[int]:
    """The axes of a weight that a vector `(stack…, label…)` has, in its order."""
    return weight.places(STACK) + weight.places(label)


def scaled(array: jax.Array, vector: jax.Array, places: Sequence[int], *, where: jax.Array | None = None) -> jax.Array:
    """`array` times `vector`, whose axes lie at `places` of it; in float32 or wider, in the array's dtype at the end.

    Where `where` is false, of a shape that broadcasts to the array's, the array stays as it is, NaN too.

    Example:
        >>> scaled(jnp.ones((2, 3)), jnp.array([1.0, 2.0]), [0]).tolist()
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    order = np.argsort(places)
    sizes = [array.shape[axis] if axis in places else 1 for axis in range(array.ndim)]
    wide = wider(array.dtype, vector.dtype)
    spread = lax.transpose(vector, order).reshape(sizes).astype(wide)
    if where is not None:
        spread = jnp.where(where, spread, jnp.ones((), wide))
    return (array.astype(wide) * spread).astype(array.dtype)


def scaled_dot(
    weight: AdaptedWeight,
    vector: jax.Array,
    label: str,
    other: jax.Array,
    spec: DotSpec,
    product: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """A `dot_general`: the vector meets the output where its axes are kept, the other operand where contracted."""
    axes = vector_axes(weight, label)
    if not set(axes) & set(spec.weight_contract):
        free = [axis for axis in range(weight.ndim) if axis not in spec.weight_contract + spec.weight_batch]
        before = len(spec.weight_batch)
        if not spec.weight_is_lhs:
            before += other.ndim - len(spec.other_contract) - len(spec.other_batch)
        place = {axis: index for index, axis in enumerate(spec.weight_batch)}
        place |= {axis: before + index for index, axis in enumerate(free)}
        return scaled(product(other), vector, [place[axis] for axis in axes])
    mine, theirs = (spec.weight_contract + spec.weight_batch, spec.other_contract + spec.other_batch)
    if not set(axes) <= set(mine):
        raise Unfactorable("some of the axes that it scales are contracted, and some are kept")
    partner = dict(zip(mine, theirs, strict=True))
    return product(scaled(other, vector, [partner[axis] for axis in axes]))


def scaled_take(
    weight: AdaptedWeight,
    vector: jax.Array,
    label: str,
    indices: jax.Array,
    spec: TakeSpec,
    product: Callable[[], jax.Array],
) -> jax.Array:
    """A lookup along an axis that the vector doesn't have; what an index out of bounds is filled with stays."""
    axes = vector_axes(weight, label)
    if spec.axis in axes:
        raise Unfactorable("a lookup along an axis that it scales")
    kept = [axis for axis in range(weight.ndim) if axis != spec.axis]
    found = product()
    inside = None
    if spec.mode == lax.GatherScatterMode.FILL_OR_DROP:
        sizes = [1 if dim in spec.offset_dims else size for dim, size in enumerate(found.shape)]
        inside = ((indices[..., 0] >= 0) & (indices[..., 0] < weight.shape[spec.axis])).reshape(sizes)
    return scaled(found, vector, [spec.offset_dims[kept.index(axis)] for axis in axes], where=inside)


def scaled_conv(
    weight: AdaptedWeight, vector: jax.Array, label: str, spec: ConvSpec, product: Callable[[], jax.Array]
) -> jax.Array:
    """A convolution whose output features the vector scales."""
    if vector_axes(weight, label) != [spec.kernel_out]:
        raise Unfactorable("a convolution, and it scales more than the output features")
    return scaled(product(), vector, [spec.output_feature])


def scaled_ragged_dot(
    weight: AdaptedWeight,
    vector: jax.Array,
    label: str,
    other: jax.Array,
    sizes: jax.Array,
    spec: RaggedDotSpec,
    product: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Tokens by groups: each token meets the vector of its group."""
    axes = vector_axes(weight, label)
    if len(axes) != 2 or axes[0] != spec.weight_group:
        raise Unfactorable(f"a ragged matmul over axis {spec.weight_group}, and it scales the axes {tuple(axes)}")
    group = jnp.repeat(jnp.arange(weight.shape[spec.weight_group]), sizes, total_repeat_length=other.shape[0])
    rows = vector[group]
    if axes[1] == spec.weight_contract:
        return product(scaled(other, rows, [0, 1]))
    return scaled(product(other), rows, [0, 1])
