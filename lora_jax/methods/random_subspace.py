"""Random subspaces: the whole model moves, in as many directions as one small vector has entries."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from ..draws import leaf_seed
from ..errors import ArgumentError
from ..types import LeafPath, Uses
from ..weights import OUT, AdaptedWeight, MergedOnEntry, labelled, register, wider
from .base import Leaves, flag, is_trainable, require, require_positive
from .fastfood import fastfood, padded_length
from .seeded_method import SeededMethod, SeededWeight, bases


@register
@dataclasses.dataclass(frozen=True)
class SubspaceWeight(SeededWeight):
    """`θ₀ + λ · P z`, where `P` is computed from `seed` and `z` is one vector for the whole tree.

    Attributes:
        z: Shape `(d,)`, float32, in the first node of a tree; `None` in the others, which are merged with it.
        gain: `λ`, a float32 scalar; `None` without gains.
        scale: Reciprocal of the expected length of the Fastfood transform's columns.
        offset: Index of this leaf's first row in `P`, which has rows for all leaves.
    """

    saved_as: ClassVar[str] = "SubspaceWeight"
    fields: ClassVar[dict[str, str]] = {"z": "d", "gain": ""}
    saved: ClassVar[tuple[str, ...]] = ("z", "gain")
    optional: ClassVar[tuple[str, ...]] = ("z", "gain")

    z: jax.Array | None = None
    gain: jax.Array | None = None
    scale: float = dataclasses.field(kw_only=True)
    offset: int = dataclasses.field(kw_only=True)

    @classmethod
    def merge_all(cls, nodes: Sequence[MergedOnEntry]) -> list[jax.Array]:
        merged: list[jax.Array] = []
        own = [node for node in nodes if isinstance(node, cls)]
        firsts = [index for index, node in enumerate(own) if node.z is not None]
        require(
            firsts[:1] == [0],
            "this part of the tree lacks the vector that all its adapted weights share: the tree's first one holds it, "
            "so pass or merge the whole tree",
        )
        for first, end in itertools.pairwise([*firsts, len(own)]):
            merged += _merged(own[first:end])
        return merged

    def merge(self) -> jax.Array:
        return self.merge_all([self])[0]

    def label(self, method_labels: bool) -> Self:
        return labelled(self, dict.fromkeys(self.fields, "subspace") if method_labels else {})


def _merged(nodes: Sequence[SubspaceWeight]) -> list[jax.Array]:
    """Merges the nodes of one tree, the first of which holds `z`. `P z` is computed for all of them in one program."""
    first = nodes[0]
    if first.z is None:
        raise ArgumentError("the first node has no vector")
    rows: list[int] = []  # sizes of the nodes, each after that of the gap before it
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
class RandomSubspace(SeededMethod):
    """Trains a model within a random subspace of `d` dimensions: `θ = θ₀ + P z`, and the head.

    `θ` has all `D` parameters of the targets, `P (D, d)` is random and fixed, and `z (d,)`, one vector for the whole
    model, is trained; it starts at zero. The smallest `d` that reaches 90 % of full fine-tuning's quality is the
    *intrinsic dimension* of the task (Li et al.).

    `P` is a Fastfood transform, `fastfood.fastfood`, with columns of expected length 1. It is computed from the seed at
    every use, forward and backward, and never stored; `P z` is, for a moment, as large as the targets. A step costs as
    much as in full fine-tuning, and the products with `P` besides: functions get the merged weights, and the gradient
    of `z` is `Pᵀ` times that of all weights. It is an experiment, not a way to save time.

    Args:
        dimension: `d`, the number of trained parameters: the vector's, and with `structure_aware` the gains.
        structure_aware: Whether each leaf has a trained gain `λ`, `θ = θ₀ + λ · P z`, which starts at 1. Of the `d`
            parameters one per leaf is a gain; the rest are `z`.
        targets: Leaves that move: `"all"` but the head's, or those at and below what is named; see `selection.select`.
        seed: Seed of `P`. The key of `attach` isn't used.
        also_train: The head, see `Method`.

    Raises:
        ValueError: `dimension` is no positive integer, or (when used) not less than the targets' parameters, or too
            small for a gain for each leaf.
        SelectionError: (When used.) An entry matches nothing, or a target is also a head.

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
        Columns of `P` have length 1 in expectation rather than exactly. Gains belong to leaves, in Aghajanyan et al. to
        layers. See `fastfood.fastfood` for the transform's own deviations.
    """

    name: ClassVar[str] = "random-subspace"
    saved_as: ClassVar[str] = "RandomSubspace"
    title: ClassVar[str] = "random subspace"
    summary: ClassVar[str] = "a vector that moves all parameters, a baseline"
    defaults: ClassVar[Mapping[str, object]] = {"dimension": 1000}
    default_rate: ClassVar[float] = 0.1
    nodes: ClassVar[tuple[type[SeededWeight], ...]] = (SubspaceWeight,)

    dimension: int = dataclasses.field(metadata=flag("Length of the trained vector"))
    structure_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.dimension, "dimension")

    def learning_rate(self, task: str) -> float:
        """`3 / √d`, since in a subspace of `d` dimensions a weight moves `√d` times as far as one entry: dev chose as
        much for 1,000 dimensions and for 10,000 (TREC). The head has the same rate, so it is 0.1 at most."""
        rate = min(self.default_rate, float(f"{3 / math.sqrt(self.dimension):.2g}"))
        return rate / 5 if task == "causal-lm" else rate

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        del key, uses
        paths = self.selected(leaves)
        total = sum(math.prod(leaves[path].shape) for path in paths)
        require(
            self.dimension < total,
            f"`dimension` must be less than {total}, the targets' number of parameters, got {self.dimension}",
        )
        length = self.dimension - (len(paths) if self.structure_aware else 0)
        require(
            length >= 1,
            f"`dimension` {self.dimension} leaves no parameter beside a gain for each of {len(paths)} leaves: choose a "
            "larger one, or fewer `targets`",
        )
        scale = 1 / math.sqrt(padded_length(length) * total)
        nodes: dict[LeafPath, AdaptedWeight] = {}
        for path in paths:
            nodes[path] = SubspaceWeight(
                leaves[path],
                z=None if nodes else jnp.zeros(length, jnp.float32),
                gain=jnp.ones((), jnp.float32) if self.structure_aware else None,
                seed=leaf_seed(self.seed, "z"),
                scale=scale,
                offset=sum(node.size for node in nodes.values()),
                axes=OUT * len(leaves[path].shape),
            )
        return nodes

    def resolved(self, leaves: Leaves) -> Self:
        return self.with_targets(leaves, self.selected(bases(leaves)))

    def selected(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the targets, in tree order; `leaves` are those of the base."""
        return self.selected_from(leaves, eligible=is_trainable, kind="leaf of a floating type")
