"""Randomness for a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .paths import flatten_with_paths, path_key, require_key
from .types import Params
from .weights import is_adapted


def with_dropout(params: Params, key: jax.Array | None) -> Params:
    """Gives every adapted weight the key of this step's dropout; trees without one, or `key=None`, drop nothing.

    Each node's key is `fold_in(key, hash of its path)`, one per member of a stack; each use within a call folds in
    its own number (and the iteration, inside a loop). So masks differ at every call with another key, every leaf and
    every use. Under a `jax.vmap` around the adapted function, all examples share one mask unless the key is mapped
    too.

    Args:
        params: A tree from `attach`.
        key: Random key, a new one for each step.

    Returns:
        The tree with keys set. Use it for the call and drop it: keys are no parameters.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.LoRA(rank=1, alpha=1, targets=("w",), dropout=0.5)
        >>> params = lj.attach({"w": jnp.ones((4, 3))}, method, key=jax.random.key(0))
        >>> params["w"].key is None, with_dropout(params, jax.random.key(1))["w"].key is None
        (True, False)
    """
    if key is not None:
        require_key(key)
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of the older kind, `jax.random.PRNGKey`
    paths, leaves, treedef = flatten_with_paths(params)
    keyed = [
        leaf.with_key(None if key is None else path_key(key, path)) if is_adapted(leaf) else leaf
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, keyed)
