"""The low-rank path beside a frozen weight: the arrays of LoRA and its relatives, and their shared arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.matmul import Strategy, choose_strategy, low_rank_matmul, low_rank_product, merged_matmul
from lora_jax.weights import (
    IN,
    OUT,
    STACK,
    ConvSpec,
    DotSpec,
    FactoredWeight,
    RaggedDotSpec,
    TakeSpec,
    Unfactorable,
    labelled,
    own_function,
    register,
    summed,
    wider,
)

from ..base import require_probability


@dataclasses.dataclass(frozen=True)
class LowRankWeight(FactoredWeight):
    """Base of the nodes with a low-rank path.

    The paper writes `h = W x + (α/r) B A x` with column vectors. Here activations are rows,
    `h = x W + scale · (x aᵀ) b`: `a` is the paper's `A`, which reduces, and `b` its `B` transposed, which expands.

    Attributes:
        base: The frozen weight, with any number of axes.
        a: Shape `(stack…, r, in…)`, float32; `in…` are the base's axes labelled `i`, in the base's order.
        b: Shape `(stack…, r, out…)`, float32.
        key: Random key of the dropout, one per member of the stack; `None` switches dropout off.
        start_a, start_b: The initial factors, in the shapes of `a` and `b` and frozen, if their product was not zero.
            With them the base stays unchanged; other implementations subtract the product from `W`.
        scale: `α/r`, or `α/√r`.
        axes: One label per base axis: `i` in, `o` out, `s` stack.
        dropout: Probability of dropping each element of the low-rank path's input.
    """

    fields: ClassVar[dict[str, str]] = {"a": "sri", "b": "sro", "key": "s", "start_a": "sri", "start_b": "sro"}
    saved: ClassVar[tuple[str, ...]] = ("a", "b", "start_a", "start_b")
    optional: ClassVar[tuple[str, ...]] = ("start_a", "start_b")
    # Those of `fields` that start from the base's values, however the factors start.
    starts_from_weight: ClassVar[tuple[str, ...]] = ()

    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    start_a: jax.Array | None = None
    start_b: jax.Array | None = None
    scale: float = dataclasses.field(kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_probability(self.dropout, "dropout")

    @property
    def rank(self) -> int:
        return self.a.shape[self.axes.count(STACK)]

    def one_pair(self) -> Self:
        """One pair of twice the rank in place of two: `B A − B₀ A₀ = [B, −B₀] [A; A₀]`."""
        if self.start_a is None or self.start_b is None:
            return self
        at = self.axes.count(STACK)
        a = jnp.concatenate([self.a, self.start_a.astype(self.a.dtype)], axis=at)
        b = jnp.concatenate([self.b, -self.start_b.astype(self.b.dtype)], axis=at)
        return dataclasses.replace(self, a=a, b=b, start_a=None, start_b=None)

    def delta(self) -> jax.Array:
        """`scale · (B A − B₀ A₀)` in the base's layout; float32, or wider where the base or the factors are."""
        stack, i, o = (self.places(label) for label in (STACK, IN, OUT))
        pair, wide = self.one_pair(), self._wide()
        product = low_rank_product(pair.a.astype(wide) * self.scale, pair.b.astype(wide), len(stack))
        order = stack + i + o
        return lax.transpose(product, [order.index(axis) for axis in range(len(order))])

    def sum(self) -> jax.Array:
        """`W + scale · (B A − B₀ A₀)`, float32 or wider."""
        return self.base.astype(self._wide()) + self.delta()

    def _wide(self) -> np.dtype:
        return wider(wider(self.base.dtype, self.a.dtype), jnp.float32)

    def label(self, method_labels: bool) -> Self:
        return labelled(self, {"a": "lora_a", "b": "lora_b"} if method_labels else {})

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        if ("start_a" in shapes) != ("start_b" in shapes):
            return "it has one of `start_a` and `start_b`, which belong together"
        return super().misfit(shapes)

    def times(self, factor: jax.Array) -> Self:
        start_b = None if self.start_b is None else multiple(self.start_b, factor)
        base = self.base * factor.astype(self.base.dtype)
        return dataclasses.replace(self, base=base, b=multiple(self.b, factor), start_b=start_b)

    def with_key(self, key: jax.Array | None) -> Self:
        if self.dropout == 0:
            key = None
        return dataclasses.replace(self, key=keys_of(key, self.a.shape[: self.axes.count(STACK)]))

    def for_use(self, number: int | jax.Array) -> Self:
        return dataclasses.replace(self, key=key_for_use(self.key, number))


def multiple(array: jax.Array, factor: jax.Array) -> jax.Array:
    """One of a node's own arrays times a scalar, in the wider of the two dtypes."""
    wide = wider(array.dtype, factor.dtype)
    return array.astype(wide) * factor.astype(wide)


def keys_of(key: jax.Array | None, stack: tuple[int, ...]) -> jax.Array | None:
    """A key for each member of a stack."""
    return jax.random.split(key, stack) if key is not None and stack else key


def key_for_use(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The keys for a node's `number`-th use."""
    return None if key is None else jnp.vectorize(jax.random.fold_in, excluded={1})(key, number)


@register
@dataclasses.dataclass(frozen=True)
class LoRAWeight(LowRankWeight):
    """`W + scale · (B A − B₀ A₀)` as a pytree node; without a start, `B₀ A₀` is zero. See `LowRankWeight`."""

    saved_as: ClassVar[str] = "LoRAWeight"

    def merge(self) -> jax.Array:
        return self.sum().astype(self.base.dtype)

    def prepared(self) -> FactoredWeight:
        return self.one_pair()

    @own_function
    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        self._direction(spec.weight_contract)  # refuses contractions that the factors can't follow
        if any(self.axes[axis] != STACK for axis in spec.weight_batch):
            raise Unfactorable("an axis that is not a stack axis is a batch axis of the matmul")

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return dataclasses.replace(self, a=a, b=b)._low_rank_dot(x, spec)

        def merge(base: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return dataclasses.replace(self, base=base, a=a, b=b).merge()

        if self._strategy(other, spec) == "merged_weight":
            return merged_matmul(other, self.base, self.a, self.b, run=run, merge=merge, low_rank=low_rank)
        base_out = run(self.base, other)
        return summed(base_out, low_rank(self._dropped(other), self.a, self.b))

    def _strategy(self, other: jax.Array, spec: DotSpec) -> Strategy:
        dropped = self.key is not None and self.dropout > 0
        # Below float32, or with an algorithm that rounds its operands, a small update is lost in the merged weight.
        exact = all(array.dtype == jnp.float32 for array in (self.base, other, self.a, self.b)) and not isinstance(
            spec.precision, lax.DotAlgorithm | lax.DotAlgorithmPreset
        )
        every_token_meets_every_member = len(spec.weight_batch) < self.axes.count(STACK)
        if dropped or not exact or every_token_meets_every_member:
            return "low_rank_first"
        if spec.strategy is not None:
            return spec.strategy
        tokens = [axis for axis in range(other.ndim) if axis not in spec.other_contract + spec.other_batch]
        inner = [self.shape[axis] for axis in spec.weight_contract]
        outer = [self.shape[axis] for axis in range(self.ndim) if axis not in spec.weight_contract + spec.weight_batch]
        return choose_strategy(
            math.prod(other.shape[axis] for axis in tokens),
            math.prod(inner),
            math.prod(outer),
            dtype=self.dtype,
            backend=jax.default_backend(),
        )

    def _low_rank_dot(self, other: jax.Array, spec: DotSpec) -> jax.Array:
        """The low-rank path of a `dot_general`, in its output's layout."""
        label, reduce, expand = self._direction(spec.weight_contract)
        # Every array is brought to `low_rank_matmul`'s shape: one axis of tokens and one contracted axis. Before them
        # come one batch axis for the stack axes that the matmul batches, and one for those that meet every token.
        batched = list(spec.weight_batch)
        loose = [axis for axis in self.places(STACK) if axis not in batched]
        expanded = self.places(OUT if label == IN else IN)
        contracted = self.places(label)
        pairs = dict(zip(spec.weight_contract, spec.other_contract, strict=True))
        free = [axis for axis in range(other.ndim) if axis not in spec.other_contract + spec.other_batch]

        def size(axes: Sequence[int]) -> int:
            return math.prod(self.shape[axis] for axis in axes)

        stack = [size(axes) for axes in (batched, loose) if axes]
        stack_order = [self.places(STACK).index(axis) for axis in batched + loose]
        tokens_and_k = (math.prod(other.shape[axis] for axis in free), size(contracted))
        compute = wider(other.dtype, self.dtype)
        x = _arranged(other, [*spec.other_batch, *free, *(pairs[axis] for axis in contracted)])
        x = x.reshape(*([size(batched)] if batched else []), *([1] if loose else []), *tokens_and_k)
        x = jnp.broadcast_to(x.astype(compute), (*stack, *tokens_and_k))

        def factor(array: jax.Array, axes: Sequence[int]) -> jax.Array:
            array = _arranged(array, stack_order + list(range(len(stack_order), array.ndim)))
            return array.reshape(*stack, self.rank, size(axes)).astype(compute)

        reduce, expand = factor(reduce, contracted), factor(expand, expanded)
        y = low_rank_matmul(x, reduce, expand, scale=self.scale, precision=spec.precision)

        # Back to the order of `dot_general`: batch axes, free axes of the left operand, free axes of the right one.
        shape = [self.shape[axis] for axis in batched + loose] + [other.shape[axis] for axis in free]
        y = y.reshape(shape + [self.shape[axis] for axis in expanded])
        place = {axis: index + len(batched) for index, axis in enumerate(loose)}
        place |= {axis: index + len(shape) for index, axis in enumerate(expanded)}
        tokens = list(range(len(batched) + len(loose), len(shape)))
        weight = [place[axis] for axis in sorted(place)]
        return _arranged(y, [*range(len(batched)), *(weight + tokens if spec.weight_is_lhs else tokens + weight)])

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        if self.places(STACK):
            raise Unfactorable("a lookup in a stacked weight")
        _, reduce, expand = self._direction((spec.axis,))
        # The same lookup in the factor's columns gives (…, r), which is expanded along the weight's other axes. What an
        # index out of bounds is filled with comes from the base's lookup; here its row adds zero.
        dimensions = lax.GatherDimensionNumbers(
            offset_dims=(indices.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        rows = lax.gather(reduce.T, indices, dimensions, (1, self.rank), mode=spec.mode, fill_value=0)
        base_out = run(self.base)
        compute = wider(base_out.dtype, base_out.dtype)
        rows = rows.astype(wider(rows.dtype, compute)) * self.scale
        y = rows.astype(compute).reshape(-1, self.rank) @ expand.reshape(self.rank, -1).astype(compute)
        y = y.reshape(indices.shape[:-1] + expand.shape[1:])
        lookup = indices.ndim - 1
        return summed(base_out, jnp.moveaxis(y, range(lookup, y.ndim), spec.offset_dims))

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        if self.places(OUT) != [spec.kernel_out] or self.places(STACK):
            raise Unfactorable(f"the labels {self.axes!r} do not fit a kernel whose output axis is {spec.kernel_out}")
        base_out = run(self.base)
        compute = wider(other.dtype, self.dtype)
        kernel = jnp.moveaxis(self.a, 0, spec.kernel_out).astype(compute)
        hidden = lax.conv_general_dilated_p.bind(self._dropped(other).astype(compute), kernel, **spec.params)
        # As in `low_rank_matmul`: positions flattened into one axis, the rank before it.
        hidden = jnp.moveaxis(hidden * self.scale, spec.output_feature, 0)
        positions, hidden = hidden.shape[1:], hidden.reshape(self.rank, -1).astype(compute)
        y = lax.dot_general(hidden, self.b.astype(compute), (((0,), (0,)), ((), ())), spec.params["precision"])
        y = y.reshape(*positions, y.shape[-1])
        return summed(base_out, jnp.moveaxis(y, -1, spec.output_feature))

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        _, reduce, expand = self._direction((spec.weight_contract,))
        if self.places(STACK) != [spec.weight_group] or self.ndim != 3:
            raise Unfactorable(f"the labels {self.axes!r} do not fit a ragged matmul over axis {spec.weight_group}")
        base_out = run(self.base, other)
        compute = wider(other.dtype, self.dtype)
        x, reduce, expand = self._dropped(other).astype(compute), reduce.astype(compute), expand.astype(compute)
        hidden = lax.ragged_dot(x, reduce.swapaxes(1, 2), sizes, precision=spec.precision)
        y = lax.ragged_dot(hidden * self.scale, expand, sizes, precision=spec.precision)
        return summed(base_out, y)

    def _direction(self, contracted: Sequence[int]) -> tuple[str, jax.Array, jax.Array]:
        """The label whose axes are contracted, the factor that carries them, and the other one."""
        for label, reduce, expand in ((IN, self.a, self.b), (OUT, self.b, self.a)):
            if sorted(contracted) == self.places(label):
                return label, reduce, expand
        raise Unfactorable(f"axes {tuple(sorted(contracted))} of a weight labelled {self.axes!r} are contracted")

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or self.dropout == 0:
            return x
        key = self.key.reshape(-1)[0] if self.key.ndim else self.key
        # Under `shard_map` shards hold different rows, so each draws its own mask.
        for name in sorted(jax.typeof(x).manual_axis_type.varying):
            key = jax.random.fold_in(key, lax.axis_index(name))
        kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros((), x.dtype))


def _arranged(array: jax.Array, order: list[int]) -> jax.Array:
    return array if order == list(range(array.ndim)) else lax.transpose(array, order)
