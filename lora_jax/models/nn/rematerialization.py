"""What of a layer is kept for the backward pass, the rest being computed again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

# Names of `jax.checkpoint_policies`, by how much of a layer the backward pass computes again: all of it, what is no
# matmul, what is no matmul of a weight. `"products_saveable"` is ours, see `policy`.
Remat = Literal["nothing_saveable", "products_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]

_KEPT = "lora_jax_product"
# A product whose result is so many times smaller than its larger operand is kept: it costs a pass over that operand.
_THIN = 8


def kept(x: jax.Array) -> jax.Array:
    """`x`, marked as what `"products_saveable"` keeps."""
    return checkpoint_name(x, _KEPT)


def policy(remat: Remat) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` by its name.

    `"products_saveable"` keeps each sum that a weight's product with its low-rank path gives, once, where
    `"dots_with_no_batch_dims_saveable"` keeps both terms; beside it the thin products and what a fused attention gave.
    So no product is computed twice, and what is elementwise is.
    """
    return _products_saveable if remat == "products_saveable" else getattr(jax.checkpoint_policies, remat)


def _products_saveable(primitive: Any, *operands: Any, **params: Any) -> bool:
    name = primitive.name
    if name == "name":
        return params["name"] == _KEPT
    if name == "dot_general":
        (contract, _), (batch, _) = params["dimension_numbers"]
        left, right = (operand.shape for operand in operands)
        inner = math.prod(left[axis] for axis in (*contract, *batch))
        result = math.prod(left) * math.prod(right) // max(inner, 1) ** 2 * math.prod(left[axis] for axis in batch)
        return result * _THIN <= max(math.prod(left), math.prod(right))
    return "dot_product_attention_fwd" in name
