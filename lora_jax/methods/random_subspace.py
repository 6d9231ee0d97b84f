"""A random subspace: the whole model moves, in as many directions as one small vector has numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from ..draws import leaf_seed
from ..weights import OUT, register, wider
from .base import is_number, is_trainable, require
from .fastfood import fastfood, padded_length
from .whole import WholeMethod, WholeWeight, bases


@register
@dataclasses.dataclass(frozen=True)
class SubspaceWeight(WholeWeight):
    """`θ₀ + λ · P z`, where `P` is computed from `seed` and `z` is one vector for the whole tree.

    Attributes:
        z: shape `(d,)`, float32, in the first node of a tree; `None` in the others, which are merged with it.
        gain: `λ`, a float32 scalar; `None` where there is none.
        scale: 1 over the expected length of the columns of the Fastfood transform.
        offset: the first of this leaf's rows of `P`, which has those of all leaves.
    """

    fields: ClassVar[dict[str, str]] = {"z": "d", "gain": ""}
    saved: ClassVar[tuple[str, ...]] = ("z", "gain")
    optional: ClassVar[tuple[str, ...]] = ("z", "gain")

    z: Any = None
    gain: Any = None
    scale: float = dataclasses.field(kw_only=True)
    offset: int = dataclasses.field(kw_only=True)

    @classmethod
    def merge_all(cls, nodes: Sequence[Self]) -> list[jax.Array]:
        merged: list[jax.Array] = []
        firsts = [place for place, node in enumerate(nodes) if node.z is not None]
        require(
            firsts[:1] == [0],
            "this part of the tree lacks the vector that all its adapted weights share: the tree's first one holds it, "
            "so pass or merge the whole tree",
        )
        for first, end in itertools.pairwise([*firsts, len(nodes)]):
            merged += _merged(nodes[first:end])
        return merged

    def merge(self) -> jax.Array:
        return self.merge_all([self])[0]

    def label(self, method_labels: bool) -> Self:
        word = "subspace" if method_labels else "frozen"
        own = {name: None if getattr(self, name) is None else word for name in self.fields}
        return dataclasses.replace(self, base="frozen", **own)


def _merged(nodes: Sequence[SubspaceWeight]) -> list[jax.Array]:
    """Of one tree, the first holding `z`. `P z` is computed for all of them at once: one program, whatever the tree."""
    first = nodes[0]
    rows: list[int] = []  # of each node, and before it of those that aren't there
    for node in nodes:
        gap = node.offset - sum(rows)
        require(gap >= 0, "the adapted weights are in another order than when they were made: keep the tree's keys")
        rows += [gap, node.size]
    step = first.scale * fastfood(first.z, jnp.uint32(first.seed), count=sum(rows))
    merged = []
    for node, own in zip(nodes, lax.split(step, rows)[1::2], strict=True):
        own = own.reshape(node.shape) if node.gain is None else node.gain * own.reshape(node.shape)
        wide = wider(node.dtype, jnp.float32)
        merged.append((node.base.astype(wide) + own.astype(wide)).astype(node.dtype))
    return merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSubspace(WholeMethod):
    """Trains a model within a random subspace of `d` dimensions: `θ = θ₀ + P z`, and the head.

    `θ` has all `D` numbers of the targets, `P (D, d)` is random and fixed, and `z (d,)`, one vector for the whole
    model, is what learns; it starts at zero. The smallest `d` that reaches 90 % of full fine-tuning's quality is the
    *intrinsic dimension* of the task (Li et al.).

    `P` is a Fastfood transform, `fastfood.fastfood`, with columns of length 1 in expectation. It is computed from the
    seed at every use, forward and backward, and never stored; `P z` is, for a moment, as large as the targets. The cost
    of a step is that of full fine-tuning and of `P` besides: functions get the merged weights, and the gradient of `z`
    is `Pᵀ` times that of all weights. It is an experiment, not a way to save time.

    Args:
        dimension: `d`, the vector's numbers, and with `structure_aware` the gains' too.
        structure_aware: `θ = θ₀ + λ · P z` with a `λ` for each leaf that learns too and starts at 1. Of the `d` numbers
            as many as there are leaves are these; the rest are `z`.
        targets: what moves: `"all"` leaves but the head's, or those at and below what is named; see `selection.select`.
        seed: of `P`. The key of `attach` isn't used.
        also_train: the head, see `Method`.

    Raises:
        ValueError: `dimension` is no positive integer, or (when used) not less than the targets' numbers, or too small
            for a gain for each leaf.
        SelectionError: (when used) an entry matches nothing, or a target is also a head.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.RandomSubspace(dimension=10)
        >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
        >>> tree = lj.attach(params, method, key=jax.random.key(0))
        >>> print(lj.count_params(tree, lj.label_params(tree, method)))
        10 of 46 parameters are trained (21.7 %)

    Reference:
        Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018,
        arXiv:1804.08838, equation 2. Aghajanyan, Gupta, Zettlemoyer, "Intrinsic Dimensionality Explains the
        Effectiveness of Language Model Fine-Tuning", ACL 2021, arXiv:2012.13255, equation 4 for `structure_aware`.

    Deviations:
        Columns of `P` have length 1 in expectation rather than exactly. The gains belong to leaves, those of Aghajanyan
        et al. to layers. See `fastfood.fastfood` for those of the transform.
    """

    nodes: ClassVar[tuple[type[WholeWeight], ...]] = (SubspaceWeight,)

    dimension: int
    structure_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.dimension, int) and self.dimension >= 1,
            f"`dimension` must be an integer of at least 1, got {self.dimension!r}",
        )

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        del key, uses
        paths = self._targets(leaves)
        total = sum(math.prod(leaves[path].shape) for path in paths)
        require(self.dimension < total, f"`dimension` {self.dimension} must be less than the targets' {total} numbers")
        numbers = self.dimension - (len(paths) if self.structure_aware else 0)
        require(
            numbers >= 1,
            f"`dimension` {self.dimension} leaves no numbers beside a gain for each of {len(paths)} leaves: choose a "
            "larger one, or fewer `targets`",
        )
        scale = 1 / math.sqrt(padded_length(numbers) * total)
        nodes: dict[str, SubspaceWeight] = {}
        for path in paths:
            nodes[path] = SubspaceWeight(
                leaves[path],
                z=None if nodes else jnp.zeros(numbers, jnp.float32),
                gain=jnp.ones((), jnp.float32) if self.structure_aware else None,
                seed=leaf_seed(self.seed, "z"),
                scale=scale,
                offset=sum(node.size for node in nodes.values()),
                axes=OUT * len(leaves[path].shape),
            )
        return nodes

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return self.with_targets(leaves, self._targets(bases(leaves)))

    def _targets(self, leaves: Mapping[str, Any]) -> list[str]:
        return self.chosen(leaves, eligible=is_trainable, kind="leaf of a floating type")
