"""VeRA: random projections that all weights share, and two trained vectors for each weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import LeafPath
from ..weights import (
    ABSENT,
    IN,
    OUT,
    STACK,
    AdaptedWeight,
    ConvSpec,
    DotSpec,
    FactoredWeight,
    RaggedDotSpec,
    TakeSpec,
    labelled,
    own_function,
    register,
    wider,
)
from .base import flag, is_number, require, require_probability, require_seed
from .lora.weight import LoRAWeight, key_for_use, keys_of, multiple
from .weight_method import TargetWeight, WeightMethod

# More than any weight can use, and small enough that a file can't ask for much memory.
_MOST_RANK = 2**14


@register
@dataclasses.dataclass(frozen=True)
class VeRAWeight(FactoredWeight):
    """`W + Λ_b B Λ_d A` as a pytree node, with diagonal `Λ`.

    Attributes:
        base: The frozen weight, with any number of axes.
        a: The projection `A (r, in…)`, float32, frozen. Weights of equal `in` axes hold the same array, and the members
            of a stack share it.
        b: The projection `B (r, out…)`, transposed like LoRA's; shared likewise.
        lambda_d: `(stack…, r)`, float32.
        lambda_b: `(stack…, out…)`, float32.
        key: Random key of the dropout, one per member of the stack; `None` switches dropout off.
        seed: Seed of the projections, which no file holds.
        axes: One label per base axis: `i` in, `o` out, `s` stack.
        dropout: Probability of dropping each element of the low-rank path's input.
    """

    saved_as: ClassVar[str] = "VeRAWeight"
    fields: ClassVar[dict[str, str]] = {"a": "ri", "b": "ro", "lambda_d": "sr", "lambda_b": "so", "key": "s"}
    saved: ClassVar[tuple[str, ...]] = ("lambda_d", "lambda_b")

    a: jax.Array = ABSENT
    b: jax.Array = ABSENT
    lambda_d: jax.Array = ABSENT
    lambda_b: jax.Array = ABSENT
    key: jax.Array | None = None
    seed: int = dataclasses.field(kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_probability(self.dropout, "dropout")
        require_seed(self.seed)

    def low_rank(self) -> LoRAWeight:
        """The same weight as a `LoRAWeight`, with both vectors on the side of `b`: no gradient has `a`'s shape."""
        stack, outer = self.places(STACK), self.places(OUT)
        wide = wider(self.base.dtype, jnp.float32)
        lambda_d, lambda_b = self.lambda_d.astype(wide), self.lambda_b.astype(wide)
        scales = jnp.expand_dims(lambda_d, [len(stack) + 1 + axis for axis in range(len(outer))])
        b = scales * jnp.expand_dims(self.b.astype(wide), range(len(stack))) * jnp.expand_dims(lambda_b, len(stack))
        a = jnp.broadcast_to(self.a, (*(self.shape[axis] for axis in stack), *self.a.shape))
        return LoRAWeight(self.base, a, b, self.key, scale=1.0, axes=self.axes, dropout=self.dropout)

    def merge(self) -> jax.Array:
        return self.low_rank().merge()

    def label(self, method_labels: bool) -> Self:
        return labelled(self, {"lambda_d": "vera_d", "lambda_b": "vera_b"} if method_labels else {})

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        rank = shapes["lambda_d"][-1:]
        if rank and not 1 <= rank[0] <= _MOST_RANK:
            return f"`lambda_d` has the shape {shapes['lambda_d']}, and a rank of 1 to {_MOST_RANK} is expected"
        return super().misfit(shapes)

    def regrown(self, shared: dict[Hashable, jax.Array]) -> Self:
        rank, shardings = self.lambda_d.shape[-1], self.placements()

        def drawn(name: str, label: str, projection: Callable[[int, int, int], jax.Array]) -> jax.Array:
            sizes, sharding = tuple(self.shape[axis] for axis in self.places(label)), shardings.get(name)
            which = (name, self.seed, rank, sizes, sharding)
            if which not in shared:
                array = projection(self.seed, rank, math.prod(sizes)).reshape(rank, *sizes)
                shared[which] = array if sharding is None else jax.device_put(array, sharding)
            return shared[which]

        return dataclasses.replace(self, a=drawn("a", IN, projection_a), b=drawn("b", OUT, projection_b))

    def times(self, factor: jax.Array) -> Self:
        base = self.base * factor.astype(self.base.dtype)
        return dataclasses.replace(self, base=base, lambda_d=multiple(self.lambda_d, factor))

    def with_key(self, key: jax.Array | None) -> Self:
        key = None if self.dropout == 0 else key
        return dataclasses.replace(self, key=keys_of(key, self.lambda_d.shape[:-1]))

    def for_use(self, number: int | jax.Array) -> Self:
        return dataclasses.replace(self, key=key_for_use(self.key, number))

    @own_function
    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        return self.low_rank().dot_general(other, spec, run)

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.low_rank().take(indices, spec, run)

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.low_rank().conv(other, spec, run)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        return self.low_rank().ragged_dot(other, sizes, spec, run)


def projection_a(seed: int, rank: int, size: int) -> Float[Array, "rank size"]:
    """The first `size` columns of `A`, uniform in `±√(6/size)`: Kaiming's start for the weight.

    Every column has a key of its own, so that up to the bound a wider weight's projection begins with a narrower one's.
    """
    return _uniform(seed, 0, rank, size) * math.sqrt(6 / size)


def projection_b(seed: int, rank: int, size: int) -> Float[Array, "rank size"]:
    """The first `size` columns of `Bᵀ`, uniform in `±√(6/rank)`."""
    return _uniform(seed, 1, rank, size) * math.sqrt(6 / rank)


@functools.partial(jax.jit, static_argnames=("seed", "which", "rank", "size"))
def _uniform(seed: int, which: int, rank: int, size: int) -> Float[Array, "rank size"]:
    """Numbers in `[-1, 1)` that depend on seed, row and column, and not on JAX's settings for random numbers."""
    start = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), which)

    def word(column: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(start, column), row))[0]

    words = jax.vmap(jax.vmap(word, (0, None)), (None, 0))(jnp.arange(size), jnp.arange(rank))
    return (words >> 8).astype(jnp.float32) * 2.0**-23 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(WeightMethod):
    """Vector-based random matrix adaptation: `h = x W + ((x Aᵀ) ⊙ d) B ⊙ b` with random `A` and `B` that all share.

    For a weight of shape `(in, out)` it trains `d (r)` and `b (out)`, `r + out` parameters, where LoRA has
    `r · (in + out)`; so `r` is usually large, 256 to 1024. `b` starts at zero. The projections follow from
    `projection_seed`: they are frozen, in no file, and in memory once for all weights of one size. A weight uses as
    many of their columns as it has inputs and outputs.

    Args:
        rank: `r`, at least 1; it may be larger than the weight's sizes.
        targets: Weights to adapt; see `LoRA`, which has the same presets.
        also_train: The head, see `Method`.
        dropout: Probability of dropping each element of the low-rank path's input, in `[0, 1)`; acts after
            `with_dropout`. The inputs of lookups are not dropped.
        d_initial: Initial value of `d`.
        projection_seed: Seed of `A` and `B`.

    Raises:
        ValueError: A value is out of range, or (when used) the axes of a weight of more than two are unknown.
        SelectionError: (When used.) An entry matches no weight, or a target is also a head.

    Example:
        >>> import lora_jax as lj
        >>> params = {"query": jnp.ones((8, 4)), "value": jnp.ones((8, 4))}
        >>> method = lj.VeRA(rank=16, targets=("query", "value"))
        >>> tree = lj.attach(params, method, key=jax.random.key(0))
        >>> tree["query"].a is tree["value"].a, tree["query"].a.shape
        (True, (16, 8))
        >>> lj.count_params(tree, lj.label_params(tree, method)).trainable
        40

    Reference:
        Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv:2310.11454,
        equation 2, with Kaiming's uniform projections and `d` of 0.1 as in section 3.3.

    Deviations:
        Where sizes differ, PEFT draws the projections for the largest and slices. Here the bound of `A` is that of each
        weight's own size, so that a weight's projections don't depend on what else is adapted.
    """

    name: ClassVar[str] = "vera"
    saved_as: ClassVar[str] = "VeRA"
    title: ClassVar[str] = "VeRA"
    summary: ClassVar[str] = "vectors between shared random factors"
    defaults: ClassVar[Mapping[str, object]] = {"rank": 256, "targets": "all-linear"}
    # Few parameters move a whole layer little; the paper's rate is some ten times LoRA's.
    default_rate: ClassVar[float] = 1e-2
    node: ClassVar[type[AdaptedWeight]] = VeRAWeight

    rank: int = dataclasses.field(metadata=flag("Rank of the shared factors"))
    dropout: float = dataclasses.field(
        default=0.0, metadata=flag("Dropout probability of the factors' input", name="lora-dropout")
    )
    d_initial: float = dataclasses.field(default=0.1, metadata=flag("Initial value of the vector between the factors"))
    projection_seed: int = dataclasses.field(default=0, metadata=flag("Seed of the shared factors"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.rank, int) and 1 <= self.rank <= _MOST_RANK,
            f"`rank` must be an integer from 1 to {_MOST_RANK}, got {self.rank!r}",
        )
        require_probability(self.dropout, "dropout")
        usable = is_number(self.d_initial, float) and math.isfinite(self.d_initial) and self.d_initial != 0
        require(usable, f"`d_initial` must be a number other than 0, got {self.d_initial!r}")
        require_seed(self.projection_seed, "projection_seed")

    def nodes(self, targets: list[TargetWeight], *, key: jax.Array) -> dict[LeafPath, AdaptedWeight]:
        del key  # the projections have a seed of their own
        shared: dict[Hashable, jax.Array] = {}
        return {target.path: self._node(target).regrown(shared) for target in targets}

    def _node(self, target: TargetWeight) -> VeRAWeight:
        node = VeRAWeight.bare(
            target.base, seed=int(self.projection_seed), axes=target.axes, dropout=float(self.dropout)
        )
        stack, shardings = target.sizes(STACK), node.placements()
        arrays = {
            "lambda_d": jnp.full((*stack, self.rank), self.d_initial, jnp.float32),
            "lambda_b": jnp.zeros((*stack, *target.sizes(OUT)), jnp.float32),
        }
        placed = {name: jax.device_put(a, shardings[name]) if shardings else a for name, a in arrays.items()}
        return dataclasses.replace(node, **placed)
