"""Prefix tuning: keys and values that every token attends to, in every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from ..errors import ArgumentError
from ..paths import flatten_with_paths, path_key
from ..weights import register
from .base import is_number, require
from .inserted_arrays import InsertedArray, InsertingMethod, Insertion, Sublayer, sublayers

_DEVIATION = 0.02
_SHARED = ("table", "hidden_kernel", "hidden_bias")


@register
@dataclasses.dataclass(frozen=True)
class ReparametrizedPrefix(Insertion):
    """The keys or values of a prefix in one layer, `(m, w)`, or in all that are stacked, `(layers, m, w)`.

    They are `tanh(P' W₁ + c₁) W₂ + c₂`. What the layers share is in the tree's first node of this class.

    Attributes:
        table: `P' (m, d)`; `None` in all nodes but the first, as `hidden_kernel` and `hidden_bias`.
        hidden_kernel, hidden_bias: `W₁ (d, k)` and `c₁ (k,)`.
        kernel, bias: `W₂ (k, w)` and `c₂ (w,)` of this layer, its keys or its values.
    """

    fields: ClassVar[dict[str, str]] = {
        "table": "md",
        "hidden_kernel": "dk",
        "hidden_bias": "k",
        "kernel": "sko",
        "bias": "so",
    }
    saved: ClassVar[tuple[str, ...]] = tuple(fields)
    optional: ClassVar[tuple[str, ...]] = _SHARED

    table: Any = None
    hidden_kernel: Any = None
    hidden_bias: Any = None
    kernel: Any = None
    bias: Any = None
    length: int = dataclasses.field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.bias.shape[:-1], self.length, self.bias.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.bias.dtype

    @classmethod
    def merge_all(cls, nodes: Sequence[Self]) -> list[jax.Array]:
        first = nodes[0]
        require(
            first.table is not None,
            "this part of the tree lacks what the prefixes of all layers share: the tree's first one holds it, so pass "
            "or merge the whole tree",
        )
        merged: list[jax.Array] = []
        for node in nodes:
            if node.table is not None:  # of this tree, where several are given
                first = node
            hidden = jnp.tanh(first.table @ first.hidden_kernel + first.hidden_bias)
            merged.append(hidden @ node.kernel + node.bias[..., None, :])
        return merged

    def merge(self) -> jax.Array:
        return self.merge_all([self])[0]

    def stacked(self) -> Any:
        raise ArgumentError(
            "a prefix that is still reparametrized can't be taken apart: fold it first, `method.folded`"
        )

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        sizes = {"m": self.length}
        letters = {"table": "md", "hidden_kernel": "dk", "hidden_bias": "k", "kernel": "k", "bias": ""}
        for name, shape in shapes.items():
            stack = len(self.axes) - 1 if name in ("kernel", "bias") else 0
            expected = stack + len(letters[name]) + (name in ("kernel", "bias"))
            found = dict(zip(letters[name], shape[stack:], strict=False))
            if len(shape) != expected or any(sizes.setdefault(letter, size) != size for letter, size in found.items()):
                return f"`{name}` has the shape {shape}, which doesn't fit the others"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(InsertingMethod):
    """Gives every layer's attention `m` keys and values that no token has, and trains them and the head.

    `softmax(q [P_K; K]ᵀ / √h) [P_V; V]` in place of `softmax(q Kᵀ / √h) V`, with `P_K` and `P_V (m, w)` a layer, `w`
    the features of its keys: `2 · L · m · w` parameters. They are trained as the output of a small network that all
    layers share,

        P = tanh(P' W₁ + c₁) W₂ + c₂,    P' (m, d), W₁ (d, k), W₂ (k, 2 · L · w),

    which is folded away after training: an adapter that `lora-jax train` saves holds `P` alone, and so does what
    `lj.merge_params` or `method.folded(params)` gives. Every token sees the whole prefix, also where a window hides
    what is far. Prefix keys have no position: they aren't rotated, and the tokens' own positions stay as they were.

    A prefix takes attention away from the tokens, so that at the start the function **isn't** the base's, and there is
    nothing that it could be merged into: it stays beside the model and makes every attention longer.

    Only the functions of `lora_jax.models` read what is inserted. `lj.detach` takes it out.

    Args:
        length: `m`.
        hidden: `k`; `None` trains `P` directly, from small random numbers.
        also_train: the head, see `Method`.

    Raises:
        ValueError: a number is no positive integer; (when used) the tree isn't that of a bundled model.

    Example:
        >>> import lora_jax as lj
        >>> linear = {"kernel": jnp.ones((4, 4))}
        >>> attention = {"key": linear, "value": linear, "output": linear}
        >>> params = {"layers": {"0": {"attention": attention, "mlp": {"down": linear}}}}
        >>> method = lj.PrefixTuning(length=3, hidden=5)
        >>> tree = lj.attach(params, method, key=jax.random.key(0))
        >>> lj.count_params(tree, lj.label_params(tree, method)).trainable  # 3 · 4 + 4 · 5 + 5 + 2 · (5 · 4 + 4)
        85
        >>> plain, direct = method.folded(tree)
        >>> lj.count_params(plain, lj.label_params(plain, direct)).trainable  # 2 · 3 · 4
        24

    Reference:
        Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv:2101.00190,
        sections 4.2 and 4.3; the network is that of the authors' code.

    Deviations:
        The authors' code gives GPT-2 the prefix as a cache of earlier tokens, which moves the positions of the tokens
        by `m`; here they begin at zero. There is no dropout of the prefix.
    """

    length: int = 20
    hidden: int | None = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("length", self.length), ("hidden", 1 if self.hidden is None else self.hidden)):
            require(is_number(value, int) and value >= 1, f"`{name}` must be an integer of at least 1, got {value!r}")

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        del uses
        nodes: dict[str, Any] = {}
        for place in sublayers(leaves, self)[0]:
            for name in ("key", "value"):
                nodes |= self._prefix(place, name, leaves, key, first=not nodes)
        return nodes

    def _prefix(
        self, place: Sublayer, name: str, leaves: Mapping[str, Any], key: jax.Array, *, first: bool
    ) -> dict[str, Insertion]:
        path, axes = f"{place.path}/prefix/{name}", place.stack_axes
        width = self._key_width(place, leaves)

        def draw(what: str, *shape: int, deviation: float) -> jax.Array:
            return deviation * jax.random.normal(path_key(key, what), shape, jnp.float32)

        if self.hidden is None:
            value = draw(path, *place.stack, self.length, width, deviation=_DEVIATION)
            return {path: InsertedArray(None, value, axes=axes + "io")}
        shared: dict[str, Any] = {}
        if first:
            # The names of what all layers share, in place of a path: they have none of their own.
            shared = {
                "table": draw("prefix/table", self.length, place.width, deviation=1.0),
                "hidden_kernel": draw("prefix/hidden", place.width, self.hidden, deviation=1 / math.sqrt(place.width)),
                "hidden_bias": jnp.zeros(self.hidden, jnp.float32),
            }
        kernel = draw(path, *place.stack, self.hidden, width, deviation=1 / math.sqrt(self.hidden))
        bias = jnp.zeros((*place.stack, width), jnp.float32)
        return {
            path: ReparametrizedPrefix(None, **shared, kernel=kernel, bias=bias, length=self.length, axes=axes + "o")
        }

    def _key_width(self, place: Sublayer, leaves: Mapping[str, Any]) -> int:
        """Features of the keys, fewer than `d` where query heads share them; GPT-2's are a third of a fused weight."""
        kernel = leaves.get(f"{place.path}/key/kernel")
        return place.width if kernel is None else kernel.shape[-1]

    def folded(self, params: Any) -> tuple[Any, Self]:
        _, leaves, treedef = flatten_with_paths(params)
        nodes = [leaf for leaf in leaves if isinstance(leaf, ReparametrizedPrefix)]
        if not nodes:
            return params, dataclasses.replace(self, hidden=None)
        merged = iter(ReparametrizedPrefix.merge_all(nodes))
        plain = [
            InsertedArray(None, next(merged), axes=leaf.axes[:-1] + "io")
            if isinstance(leaf, ReparametrizedPrefix)
            else leaf
            for leaf in leaves
        ]
        return jax.tree.unflatten(treedef, plain), dataclasses.replace(self, hidden=None)
