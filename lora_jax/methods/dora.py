"""DoRA: magnitude and direction of each frozen weight, with the direction moved by a low-rank path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ..weights import (
    ABSENT,
    IN,
    OUT,
    STACK,
    ConvSpec,
    DotSpec,
    FactoredWeight,
    RaggedDotSpec,
    TakeSpec,
    own_function,
    register,
    wider,
)
from .lora.method import LoRA
from .lora.weight import LoRAWeight, LowRankWeight, multiple
from .scaling import scaled, scaled_conv, scaled_dot, scaled_ragged_dot, scaled_take, vector_axes
from .weight_method import TargetWeight

# Axes of two operands, in corresponding order.
_AxisPairs: TypeAlias = tuple[Sequence[int], Sequence[int]]


@register
@dataclasses.dataclass(frozen=True)
class DoRAWeight(LowRankWeight):
    """`m ⊙ V / ‖V‖` with `V = W + scale · (B A − B₀ A₀)` as a pytree node; the norm of each output is over the in axes.

    Attributes:
        magnitude: `m`, shape `(stack…, out…)`, float32. The other fields are those of `LowRankWeight`.
    """

    saved_as: ClassVar[str] = "DoRAWeight"
    fields: ClassVar[dict[str, str]] = {**LowRankWeight.fields, "magnitude": "so"}
    saved: ClassVar[tuple[str, ...]] = (*LowRankWeight.saved, "magnitude")
    starts_from_weight: ClassVar[tuple[str, ...]] = ("magnitude",)

    magnitude: jax.Array = ABSENT

    def merge(self) -> jax.Array:
        whole = self.sum()
        norms = jnp.sqrt(_squares(whole, self))
        return scaled(whole, self._ratio(norms), vector_axes(self, OUT)).astype(self.base.dtype)

    def prepared(self) -> FactoredWeight:
        """`V` with the factor of each output, `m / ‖V‖`, which stays right under slices and transposes."""
        pair = self.one_pair()
        return _ScaledWeight(
            pair.base,
            pair.a,
            pair.b,
            self.key,
            ratio=self._ratio(pair.column_norms()),
            scale=self.scale,
            axes=self.axes,
            dropout=self.dropout,
        )

    def label(self, method_labels: bool) -> Self:
        labels = super().label(method_labels)
        return dataclasses.replace(labels, magnitude="magnitude") if method_labels else labels

    def times(self, factor: jax.Array) -> Self:
        return dataclasses.replace(super().times(factor), magnitude=multiple(self.magnitude, jnp.abs(factor)))

    def column_norms(self) -> jax.Array:
        """`‖V‖` of each output, `(stack…, out…)`, without `V`.

            ‖V‖² = ‖W‖² + 2 · scale · ⟨W, B A⟩ + scale² · ‖B A‖²,    column by column

        where `⟨W, B A⟩ = Σₖ bₖ ⊙ (a W)ₖ` and `‖B A‖² = Σₖ bₖ ⊙ ((a aᵀ) b)ₖ`: products with a thin or tiny result.
        Where `V` is much smaller than `W`, the terms cancel and the norm is that much less exact.
        """
        pair = self.one_pair()
        count = self.axes.count(STACK)
        stack, inside = list(range(count)), list(range(count + 1, pair.a.ndim))
        wide = self._wide()
        a, b = pair.a.astype(wide) * self.scale, pair.b.astype(wide)
        of_weight = _thin_product(a, self.base, (inside, self.places(IN)), (stack, self.places(STACK)))
        gram = lax.dot_general(a, a, ((inside, inside), (stack, stack)), precision=lax.Precision.HIGHEST)
        of_path = lax.dot_general(gram, b, (([count + 1], [count]), (stack, stack)), precision=lax.Precision.HIGHEST)
        moved = jnp.sum(b * (2 * of_weight + of_path), axis=count)
        return jnp.sqrt(jnp.maximum(_squares(self.base, self) + moved, 0))

    def _ratio(self, norms: jax.Array) -> jax.Array:
        # A column of zeros has no direction; it stays one, rather than become NaN.
        wide = wider(self.magnitude.dtype, norms.dtype)
        return self.magnitude.astype(wide) / lax.stop_gradient(jnp.where(norms > 0, norms, 1).astype(wide))


def _squares(array: jax.Array, node: DoRAWeight) -> jax.Array:
    """The squared norm of each output, `(stack…, out…)`."""
    wide = array.astype(wider(array.dtype, jnp.float32))
    kept = [axis for axis, label in enumerate(node.axes) if label != IN]
    squares = jnp.sum(wide * wide, axis=tuple(node.places(IN)))
    return lax.transpose(squares, [kept.index(axis) for axis in vector_axes(node, OUT)])


def _thin_product(a: jax.Array, base: jax.Array, contract: _AxisPairs, batch: _AxisPairs) -> jax.Array:
    """The product of `a`, float32 or wider, with the weight, in `a`'s dtype.

    For a weight of 16 bits `a` is taken as the sum of two such arrays, so that the weight needn't be widened.
    """
    if jnp.finfo(base.dtype).bits < 16:
        base = base.astype(jnp.bfloat16)  # it holds every float of 8 bits
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(contract, batch),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=a.dtype,
    )
    if jnp.finfo(base.dtype).bits >= 32:
        return product(a, base.astype(a.dtype))
    info = jnp.finfo(base.dtype)
    high = lax.reduce_precision(a, info.nexp, info.nmant)
    return product(high.astype(base.dtype), base) + product((a - high).astype(base.dtype), base)


@register
@dataclasses.dataclass(frozen=True)
class _ScaledWeight(LowRankWeight):
    """`ratio ⊙ (W + scale · B A)`: a `DoRAWeight` at work. `ratio (stack…, out…)`."""

    fields: ClassVar[dict[str, str]] = {**LowRankWeight.fields, "ratio": "so"}
    saved: ClassVar[tuple[str, ...]] = ()

    ratio: jax.Array = dataclasses.field(kw_only=True)

    def merge(self) -> jax.Array:
        return scaled(self.sum(), self.ratio, vector_axes(self, OUT)).astype(self.base.dtype)

    @own_function
    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        return scaled_dot(self, self.ratio, OUT, other, spec, lambda x: self._plain().dot_general(x, spec, run))

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return scaled_take(self, self.ratio, OUT, indices, spec, lambda: self._plain().take(indices, spec, run))

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return scaled_conv(self, self.ratio, OUT, spec, lambda: self._plain().conv(other, spec, run))

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        def product(x: jax.Array) -> jax.Array:
            return self._plain().ragged_dot(x, sizes, spec, run)

        return scaled_ragged_dot(self, self.ratio, OUT, other, sizes, spec, product)

    def _plain(self) -> LoRAWeight:
        return LoRAWeight(self.base, self.a, self.b, self.key, scale=self.scale, axes=self.axes, dropout=self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: `h = (m / ‖V‖) ⊙ (x W + (α/r) · (x Aᵀ) B)` with `V = W + (α/r) · Aᵀ B`.

    For a weight of shape `(in, out)` it trains LoRA's `a (r, in)` and `b (r, out)`, and the magnitude `m (out)`, which
    starts as `‖W‖`: `r · (in + out) + out` parameters. The gradient takes the norm `‖V‖` of each output's column for a
    constant. At each call the norm and the output are computed from `W` and the factors, without forming `V`.

    Args:
        rank, alpha, targets, also_train, dropout, scaling, init, freeze_a, rank_overrides, alpha_overrides: See
            `LoRA`.

    Raises:
        ValueError, SelectionError: See `LoRA`.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.DoRA(rank=2, alpha=4, targets=("query",))
        >>> params = lj.attach({"query": {"kernel": jnp.ones((9, 4))}}, method, key=jax.random.key(0))
        >>> params["query"]["kernel"].magnitude.tolist()
        [3.0, 3.0, 3.0, 3.0]
        >>> print(lj.count_params(params, lj.label_params(params, method)))
        30 of 66 parameters are trained (45.5 %)

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, equation 5, with the
        norm taken out of the gradient as section 4.3 proposes.

    Deviations:
        Under dropout PEFT also drops the input of `(m/‖V‖ − 1) ⊙ x W`, a second full product; here, as in LoRA, only
        the low-rank path's input is dropped. The expectation is the same. A column of zeros stays zero here, where the
        quotient would be NaN. Beside a float64 base the magnitude is float32, as all factors are, so that the start is
        the base's function to 6e-8.
    """

    name: ClassVar[str] = "dora"
    saved_as: ClassVar[str] = "DoRA"
    title: ClassVar[str] = "DoRA"
    summary: ClassVar[str] = "low-rank factors, and magnitudes"
    defaults: ClassVar[Mapping[str, object]] = LoRA.defaults
    node: ClassVar[type[LowRankWeight]] = DoRAWeight

    def _node(self, target: TargetWeight, rank: int, alpha: float, key: jax.Array) -> LowRankWeight:
        node = super()._node(target, rank, alpha, key)
        assert isinstance(node, DoRAWeight)
        magnitude = jnp.sqrt(_squares(jnp.asarray(node.base), node)).astype(jnp.float32)
        if place := node.placements().get("magnitude"):
            magnitude = jax.device_put(magnitude, place)
        return dataclasses.replace(node, magnitude=magnitude)
