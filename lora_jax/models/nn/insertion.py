"""What `BottleneckAdapter` and `PrefixTuning` insert into the layers: modules made of arrays that the parameters hold.

A layer's attention and MLP have an `adapter`, and its attention a `prefix`, that are `None` in the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import ArgumentError

from .layers import ACTIVATIONS

_ADAPTER = {"down/kernel": 2, "down/bias": 1, "up/kernel": 2, "up/bias": 1}
_PREFIX = {"key": 2, "value": 2}
# Where they may be, and the axes of each of their arrays, without that of stacked layers.
_PARTS = {"attention/adapter": _ADAPTER, "mlp/adapter": _ADAPTER, "attention/prefix": _PREFIX}


class Adapter(nnx.Module):
    """`h + gelu(h D + c) U + e`, see `lora_jax.BottleneckAdapter`."""

    def __init__(self, arrays: Mapping[str, jax.Array]) -> None:
        self.down_kernel, self.down_bias, self.up_kernel, self.up_bias = (nnx.Param(arrays[name]) for name in _ADAPTER)

    def __call__(self, h: jax.Array) -> jax.Array:
        down, c, up, e = (
            array[...].astype(h.dtype) for array in (self.down_kernel, self.down_bias, self.up_kernel, self.up_bias)
        )
        return h + ACTIVATIONS["gelu"](h @ down + c) @ up + e


class Prefix(nnx.Module):
    """Keys and values `(m, n · h)` before those of the tokens, see `lora_jax.PrefixTuning`."""

    def __init__(self, arrays: Mapping[str, jax.Array]) -> None:
        self.key, self.value = nnx.Param(arrays["key"]), nnx.Param(arrays["value"])

    def before(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(batch, n, time, h)` to `(batch, n, m + time, h)`."""

        def put(own: nnx.Param, tokens: jax.Array) -> jax.Array:
            batch, heads, _, width = tokens.shape
            own_heads = own[...].astype(tokens.dtype).reshape(-1, heads, width).transpose(1, 0, 2)
            return jnp.concatenate([jnp.broadcast_to(own_heads, (batch, *own_heads.shape)), tokens], axis=2)

        return put(self.key, key), put(self.value, value)

    @property
    def length(self) -> int:
        return self.key[...].shape[0]


def adapted(adapter: Adapter | None, h: jax.Array) -> jax.Array:
    return h if adapter is None else adapter(h)


def with_prefix(prefix: Prefix | None, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Keys and values of the prefix and the tokens, and how many are the prefix's."""
    return (key, value, 0) if prefix is None else (*prefix.before(key, value), prefix.length)


def split_inserted(
    leaves: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The model's own leaves, and those of each inserted module by its path.

    Args:
        leaves: of the parameters, by path.
        expected: the shapes of the model's own.

    Raises:
        ValueError: an inserted module lacks an array, or has one of a shape that doesn't fit the model.
    """
    own: dict[str, Any] = {}
    inserted: dict[str, dict[str, Any]] = {}
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
    """`("…/attention/adapter", "down/kernel")`; empty where it is no such path."""
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
        raise ArgumentError(f"`params` has {module}, and the model has no {layer}/{sublayer}.")
    wanted = _ADAPTER if kind == "adapter" else _PREFIX
    if missing := [name for name in wanted if name not in shapes]:
        raise ArgumentError(f"`params` has a part of {module} and lacks {', '.join(missing)}.")
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
            raise ArgumentError(f"`params` has {module}/{name} of shape {shape}, and {(*stack, *ends[name])} fits.")


def insert(model: nnx.Module, inserted: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts inserted modules into their places in a model that was just merged."""
    for path, arrays in inserted.items():
        *way, name = path.split("/")
        place: Any = model
        for step in way:
            place = place[int(step)] if step.isdecimal() else getattr(place, step)
        setattr(place, name, nnx.data((Adapter if name == "adapter" else Prefix)(arrays)))
