"""The modules that `BottleneckAdapter` and `PrefixTuning` insert into layers, made of arrays among the parameters.

A layer's attention and MLP have an attribute `adapter`, and its attention one named `prefix`; in the base all are
`None`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from lora_jax.errors import ArgumentError

from .layers import ACTIVATIONS

_ADAPTER = {"down/kernel": 2, "down/bias": 1, "up/kernel": 2, "up/bias": 1}
_PREFIX = {"key": 2, "value": 2}
# The paths of inserted modules in a layer, and the number of axes of each array without the axis of stacked layers.
_PARTS = {"attention/adapter": _ADAPTER, "mlp/adapter": _ADAPTER, "attention/prefix": _PREFIX}

_Leaf = TypeVar("_Leaf", bound=jax.Array | np.ndarray)


class InsertedAdapter(nnx.Module):
    """`h + gelu(h D + c) U + e`, see `lora_jax.BottleneckAdapter`."""

    def __init__(self, arrays: Mapping[str, jax.Array]) -> None:
        self.down_kernel, self.down_bias, self.up_kernel, self.up_bias = (nnx.Param(arrays[name]) for name in _ADAPTER)

    def __call__(self, h: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        down, c, up, e = (
            array[...].astype(h.dtype) for array in (self.down_kernel, self.down_bias, self.up_kernel, self.up_bias)
        )
        return h + ACTIVATIONS["gelu"](h @ down + c[None, None]) @ up + e[None, None]


class InsertedPrefix(nnx.Module):
    """Keys and values `(m, n · h)` that precede those of the tokens, see `lora_jax.PrefixTuning`."""

    def __init__(self, arrays: Mapping[str, jax.Array]) -> None:
        self.key, self.value = nnx.Param(arrays["key"]), nnx.Param(arrays["value"])

    def before(
        self, key: Float[Array, "batch n time h"], value: Float[Array, "batch n time h"]
    ) -> tuple[Float[Array, "batch n m_and_time h"], Float[Array, "batch n m_and_time h"]]:
        """Puts the prefix before the keys and values of the tokens."""

        def put(own: nnx.Param, tokens: jax.Array) -> jax.Array:
            batch, heads, _, width = tokens.shape
            own_heads = own[...].astype(tokens.dtype).reshape(-1, heads, width).transpose(1, 0, 2)
            return jnp.concatenate([jnp.broadcast_to(own_heads, (batch, *own_heads.shape)), tokens], axis=2)

        return put(self.key, key), put(self.value, value)

    @property
    def length(self) -> int:
        return self.key[...].shape[0]


def adapted(adapter: InsertedAdapter | None, h: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    return h if adapter is None else adapter(h)


def with_prefix(prefix: InsertedPrefix | None, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Keys and values with the prefix if there is one, and its length."""
    return (key, value, 0) if prefix is None else (*prefix.before(key, value), prefix.length)


def split_inserted(
    leaves: Mapping[str, _Leaf], expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Leaf], dict[str, dict[str, _Leaf]]]:
    """Separates the model's own leaves from those of inserted modules, which are grouped by the module's path.

    Args:
        leaves: Leaves of the parameters, by path.
        expected: Shapes of the model's own leaves, by path.

    Raises:
        ValueError: An inserted module lacks an array, or has one with a shape that doesn't fit the model.
    """
    own: dict[str, _Leaf] = {}
    inserted: dict[str, dict[str, _Leaf]] = {}
    for path, leaf in leaves.items():
        module, name = _part(path) if path not in expected else ("", "")
        if module:
            inserted.setdefault(module, {})[name] = leaf
        else:
            own[path] = leaf
    for module, arrays in inserted.items():
        _check_module(module, {name: tuple(array.shape) for name, array in arrays.items()}, expected)
    return own, inserted


def _part(path: str) -> tuple[str, str]:
    """`("…/attention/adapter", "down/kernel")`; empty strings for any other path."""
    for part, arrays in _PARTS.items():
        before, found, name = path.rpartition(f"/{part}/")
        if found and name in arrays:
            return f"{before}/{part}", name
    return "", ""


def _check_module(module: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    parent, kind = module.rsplit("/", 1)
    layer, sublayer = parent.rsplit("/", 1)
    end = expected.get(f"{parent}/output/kernel" if sublayer == "attention" else f"{parent}/down/kernel")
    if end is None:
        raise ArgumentError(f"`params` has {module}, but the model has no {layer}/{sublayer}.")
    wanted = _ADAPTER if kind == "adapter" else _PREFIX
    if missing := [name for name in wanted if name not in shapes]:
        raise ArgumentError(f"`params` has an incomplete {module}: it lacks {', '.join(missing)}.")
    stack, width = end[:-2], end[-1]
    if kind == "adapter":
        size = shapes["down/bias"][-1] if shapes["down/bias"] else 0
        ends: dict[str, tuple[int, ...]] = {
            "down/kernel": (width, size),
            "down/bias": (size,),
            "up/kernel": (size, width),
            "up/bias": (width,),
        }
    else:
        length = shapes["key"][-2] if len(shapes["key"]) > 1 else 0
        key = expected.get(f"{parent}/key/kernel", end)[-1]
        ends = dict.fromkeys(("key", "value"), (length, key))
    for name, shape in shapes.items():
        if shape != (*stack, *ends[name]):
            raise ArgumentError(f"`params` at {module}/{name} must have shape {(*stack, *ends[name])}, got {shape}.")


def insert(model: object, inserted: Mapping[str, Mapping[str, Shaped[Array, "*shape"]]]) -> None:
    """Sets the inserted modules as attributes in a newly merged model."""
    for path, arrays in inserted.items():
        *parents, name = path.split("/")
        module = model
        for parent in parents:
            module = module[int(parent)] if isinstance(module, nnx.List) else getattr(module, parent)
        setattr(module, name, nnx.data((InsertedAdapter if name == "adapter" else InsertedPrefix)(arrays)))
