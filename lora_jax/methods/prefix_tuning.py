"""Prefix tuning: keys and values that every token attends to, in every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..paths import flatten_with_paths, path_key
from ..types import LeafPath, Params, Uses
from ..weights import ABSENT, AdaptedWeight, InsertedNode, MergedOnEntry, register
from .base import Leaves, flag, require_positive
from .inserting_method import InsertedArray, InsertingMethod, Sublayer, sublayers

_DEVIATION = 0.02
_SHARED = ("table", "hidden_kernel", "hidden_bias")


@register
@dataclasses.dataclass(frozen=True)
class ReparametrizedPrefix(InsertedNode):
    """The keys or values of a prefix in one layer, `(m, w)`, or in all that are stacked, `(layers, m, w)`.

    They are `tanh(P' W₁ + c₁) W₂ + c₂`. The tree's first node of this class holds what the layers share.

    Attributes:
        table: `P' (m, d)`; `None` in all nodes but the first, like `hidden_kernel` and `hidden_bias`.
        hidden_kernel: `W₁ (d, k)`.
        hidden_bias: `c₁ (k,)`.
        kernel: `W₂ (k, w)` for this layer's keys or values.
        bias: `c₂ (w,)`, likewise.
        length: `m`.
    """

    saved_as: ClassVar[str] = "ReparametrizedPrefix"
    fields: ClassVar[dict[str, str]] = {
        "table": "md",
        "hidden_kernel": "dk",
        "hidden_bias": "k",
        "kernel": "sko",
        "bias": "so",
    }
    saved: ClassVar[tuple[str, ...]] = tuple(fields)
    optional: ClassVar[tuple[str, ...]] = _SHARED

    table: jax.Array | None = None
    hidden_kernel: jax.Array = ABSENT
    hidden_bias: jax.Array = ABSENT
    kernel: jax.Array = ABSENT
    bias: jax.Array = ABSENT
    length: int = dataclasses.field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.bias.shape[:-1], self.length, self.bias.shape[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.bias.dtype

    @classmethod
    def merge_all(cls, nodes: Sequence[MergedOnEntry]) -> list[jax.Array]:
        merged: list[jax.Array] = []
        hidden = None
        for node in nodes:
            assert isinstance(node, cls)
            if node.table is not None:  # the first of its tree; several trees may be given
                hidden = jnp.tanh(node.table @ node.hidden_kernel + node.hidden_bias[None])
            if hidden is None:
                raise ArgumentError(
                    "this part of the tree lacks what the prefixes of all layers share: the tree's first one holds it, "
                    "so pass or merge the whole tree"
                )
            merged.append(hidden @ node.kernel + node.bias[..., None, :])
        return merged

    def merge(self) -> jax.Array:
        return self.merge_all([self])[0]

    def stacked(self) -> NoReturn:
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
    """Gives every layer's attention `m` keys and values that belong to no token, and trains them and the head.

    `softmax(q [P_K; K]ᵀ / √h) [P_V; V]` in place of `softmax(q Kᵀ / √h) V`, with `P_K` and `P_V (m, w)` in each of
    `L` layers and `w` features in its keys: `2 · L · m · w` parameters. They are trained as the output of a small
    network that all layers share,

        P = tanh(P' W₁ + c₁) W₂ + c₂,    P' (m, d), W₁ (d, k), W₂ (k, 2 · L · w),

    which is folded away after training: an adapter that `lora-jax train` saves holds `P` alone, as do the results of
    `lj.merge_params` and `method.folded(params)`. Every token sees the whole prefix, even where a sliding window hides
    distant tokens. Prefix keys have no position: they aren't rotated, and the tokens' own positions don't change.

    A prefix takes attention away from the tokens, so that at the start the function **isn't** the base's. It can't be
    merged into anything: it stays beside the model and makes every attention longer.

    Only the functions of `lora_jax.models` read what is inserted. `lj.detach` takes it out.

    Args:
        length: `m`, the number of keys and values.
        hidden: `k`, the width of the network; `None` trains `P` directly, from small random numbers.
        also_train: The head, see `Method`.

    Raises:
        ValueError: A number is no positive integer; (when used) the tree isn't that of a bundled model.

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
        The authors' code gives GPT-2 the prefix as a cache of earlier tokens, which shifts the tokens' positions by
        `m`; here they begin at zero. The prefix has no dropout.
    """

    name: ClassVar[str] = "prefix"
    saved_as: ClassVar[str] = "PrefixTuning"
    title: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "keys and values before the tokens'"
    defaults: ClassVar[Mapping[str, object]] = {"length": 16, "hidden": 512}
    default_rate: ClassVar[float] = 3e-4

    length: int = dataclasses.field(default=20, metadata=flag("Number of keys and values in each layer"))
    hidden: int | None = dataclasses.field(
        default=512, metadata=flag("Width of the network through which the prefix is trained, or none")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.length, "length")
        if self.hidden is not None:
            require_positive(self.hidden, "hidden")

    def learning_rate(self, task: str) -> float:
        """Without its network the prefix takes a higher rate; with it, training has diverged at 1e-3 (TREC)."""
        direct = 1e-2 if task != "causal-lm" else 2e-3
        return direct if self.hidden is None else super().learning_rate(task)

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        del uses
        nodes: dict[LeafPath, AdaptedWeight] = {}
        for attention in sublayers(leaves, self)[0]:
            for name in ("key", "value"):
                nodes |= self._prefix(attention, name, leaves, key, first=not nodes)
        return nodes

    def _prefix(
        self, attention: Sublayer, name: str, leaves: Leaves, key: jax.Array, *, first: bool
    ) -> dict[LeafPath, InsertedNode]:
        path, stack, axes = f"{attention.path}/prefix/{name}", attention.stack, attention.stack_axes
        inner, width = attention.width, self._key_width(attention, leaves)

        def draw(what: str, *shape: int, deviation: float) -> jax.Array:
            return deviation * jax.random.normal(path_key(key, what), shape, jnp.float32)

        if self.hidden is None:
            value = draw(path, *stack, self.length, width, deviation=_DEVIATION)
            return {path: InsertedArray(None, value, axes=axes + "io")}
        shared: dict[str, jax.Array | None] = dict.fromkeys(_SHARED)
        if first:
            # What all layers share has no path of its own: names take the place of paths.
            shared = {
                "table": draw("prefix/table", self.length, inner, deviation=1.0),
                "hidden_kernel": draw(
                    "prefix/hidden", attention.width, self.hidden, deviation=1 / math.sqrt(attention.width)
                ),
                "hidden_bias": jnp.zeros(self.hidden, jnp.float32),
            }
        kernel = draw(path, *stack, self.hidden, width, deviation=1 / math.sqrt(self.hidden))
        bias = jnp.zeros((*stack, width), jnp.float32)
        return {
            path: ReparametrizedPrefix(None, **shared, kernel=kernel, bias=bias, length=self.length, axes=axes + "o")
        }

    def _key_width(self, attention: Sublayer, leaves: Leaves) -> int:
        """Features of the keys: fewer than `d` where query heads share them, `d` in GPT-2's fused weight."""
        kernel = leaves.get(f"{attention.path}/key/kernel")
        return attention.width if kernel is None else kernel.shape[-1]

    def folded(self, params: Params) -> tuple[Params, Self]:
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
