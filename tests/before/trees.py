"""The trees that the adapters in this folder belong to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

NAMES = {
    "query/kernel": "layer.query",
    "query/bias": "layer.query",
    "value/kernel": "layer.value",
    "value/bias": "layer.value",
    "classifier/kernel": "classifier",
    "classifier/bias": "classifier",
}


def filled(shape: tuple[int, ...]) -> jax.Array:
    """Values that are the same everywhere."""
    return jnp.asarray(np.sin(np.arange(int(np.prod(shape)))).reshape(shape), jnp.float32)


BASE = {
    "query": {"kernel": filled((6, 4)), "bias": filled((4,))},
    "value": {"kernel": filled((4, 6)), "bias": filled((6,))},
    "classifier": {"kernel": filled((6, 3)), "bias": filled((3,))},
}
STATE = {"count": jnp.zeros(3, jnp.int32), "mean": jnp.zeros((2, 2))}
