"""Measures what training changed in a model: pure functions of its parameters before and after.

`base_params` is the base's tree and `params` the trained one, with adapted weights or merged. Everything is computed on
the host in float64: factors are thin, and other methods are processed one weight at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.truncate import svd_of_product
from lora_jax.depth import Place, layer_places, layer_sizes
from lora_jax.errors import ArgumentError
from lora_jax.methods import LoRAWeight
from lora_jax.methods.base import is_trainable
from lora_jax.paths import is_bias_name, leaves_by_path, listed
from lora_jax.types import ArrayLike, Leaf, Params
from lora_jax.weights import IN, OUT, STACK, AdaptedWeight, InsertedNode, is_adapted, merge_on_entry, wider


class LeafChange(NamedTuple):
    """How far one leaf moved.

    Attributes:
        path: Path of the leaf.
        change: `‖ΔW‖_F`.
        base: `‖W‖_F` before training.
    """

    path: str
    change: float
    base: float

    @property
    def relative(self) -> float:
        """`‖ΔW‖_F / ‖W‖_F`; infinite if only the base is zero."""
        return _ratio(self.change, self.base)


class LayerChange(NamedTuple):
    """How far layer `layer` of `stack` moved; norms over all of its leaves, trained or not."""

    stack: str
    layer: int
    change: float
    base: float

    @property
    def relative(self) -> float:
        return _ratio(self.change, self.base)


class BiasChanges(NamedTuple):
    """The mean change of each bias.

    Attributes:
        stack: Path of the layers.
        layers: Numbers of the layers.
        terms: Modules of a layer that have a bias, such as `attention/query`.
        values: `(layers, terms)`; NaN if a layer has no such bias.
        elsewhere: `{path: value}` for the biases outside these layers.
    """

    stack: str
    layers: tuple[int, ...]
    terms: tuple[str, ...]
    values: np.ndarray
    elsewhere: dict[str, float]


class ChangeSVD(NamedTuple):
    """`ΔW = left · diag(values) · right` for each member of a stack: `(m, in, k)`, `(m, k)`, `(m, k, out)`."""

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


class Amplification(NamedTuple):
    """Table 7 of the LoRA paper for one weight: how much of `W` lies in the directions of `ΔW`.

    Attributes:
        rank: Number of directions, `r`.
        weight: `‖W‖_F`.
        change: `‖ΔW‖_F`.
        in_change: `‖Uᵀ W V‖_F` with `U`, `V` the first `r` left and right singular vectors of `ΔW`.
        in_weight: The same with those of `W` itself, the most that `r` directions can hold.
        in_random: The same with random orthonormal directions.
        factor: `‖ΔW‖_F / ‖Uᵀ W V‖_F`, by which `ΔW` amplifies directions that `W` has little of.
    """

    rank: int
    weight: float
    change: float
    in_change: float
    in_weight: float
    in_random: float
    factor: float


def leaf_changes(base_params: Params, params: Params) -> list[LeafChange]:
    """`‖ΔW‖_F` and `‖W‖_F` of every floating-point leaf, in tree order. LoRA's are computed from its factors.

    Example:
        >>> base = {"w": jnp.full((2, 2), 2.0), "b": jnp.zeros(2)}
        >>> [(row.path, row.change, row.base) for row in leaf_changes(base, {**base, "w": jnp.full((2, 2), 3.0)})]
        [('b', 0.0, 0.0), ('w', 2.0, 4.0)]
    """
    changes = []
    for path, (before, after) in _pairs(base_params, params).items():
        if _is_low_rank(after):
            size = float(np.linalg.norm(_low_rank_svd(after).values))
        else:
            size = float(np.linalg.norm(_difference(before, after)))
        changes.append(LeafChange(path, size, float(np.linalg.norm(_float64(before)))))
    return changes


def layer_changes(changes: Sequence[LeafChange]) -> list[LayerChange]:
    """How far each layer moved, `√Σ‖ΔW‖²` and `√Σ‖W‖²` over its leaves, in the order of the layers.

    Example:
        >>> rows = [LeafChange("layers/0/w", 3.0, 5.0), LeafChange("layers/0/v", 4.0, 0.0)]
        >>> layer_changes(rows)[0].relative
        1.0
    """
    places = layer_places([change.path for change in changes])
    squares: dict[tuple[str, int], np.ndarray] = {}
    for row in changes:
        if row.path in places:
            key = places[row.path].stack, places[row.path].layer
            squares[key] = squares.get(key, np.zeros(2)) + np.square([row.change, row.base])
    ordered = sorted(squares, key=lambda key: (list(layer_sizes(places)).index(key[0]), key[1]))
    return [LayerChange(*key, *map(float, np.sqrt(squares[key]))) for key in ordered]


def bias_changes(base_params: Params, params: Params) -> BiasChanges:
    """`(1 / dim b) · ‖b₀ − b_F‖₁` for each layer and term, with `b₀` the bias before and `b_F` after.

    Returns:
        The changes; if there are several stacks of layers, the table is that of the stack with most biases.

    Raises:
        ValueError: The tree has no leaf that is named like a bias.

    Example:
        >>> before = {"layers": [{"query": {"bias": jnp.zeros(4)}}, {"query": {"bias": jnp.zeros(4)}}]}
        >>> after = {"layers": [{"query": {"bias": jnp.ones(4)}}, {"query": {"bias": jnp.arange(4.0)}}]}
        >>> bias_changes(before, after).values.tolist()
        [[1.0], [1.5]]

    Reference:
        Ben Zaken, Goldberg, Ravfogel, "BitFit", ACL 2022, arXiv:2106.10199, section 4 and figure 2.
    """
    values = {
        path: float(np.abs(_difference(before, after)).mean())
        for path, (before, after) in _pairs(base_params, params).items()
        if is_bias_name(path)
    }
    if not values:
        raise ArgumentError("the tree has no leaf named like a bias (`bias`, `b`, `beta`, `offset`)")
    places = layer_places(values)
    count = {name: sum(place.stack == name for place in places.values()) for name in layer_sizes(places)}
    stack = max(count, key=lambda name: count[name]) if count else ""
    inside = {path: place for path, place in places.items() if place.stack == stack}
    layers = sorted({place.layer for place in inside.values()})
    terms = list(dict.fromkeys(map(_term, inside.values())))
    table = np.full((len(layers), len(terms)), np.nan)
    for path, place in inside.items():
        table[layers.index(place.layer), terms.index(_term(place))] = values[path]
    elsewhere = {path: value for path, value in values.items() if path not in inside}
    return BiasChanges(stack, tuple(layers), tuple(terms), table, elsewhere)


def change_svd(base: Leaf, leaf: Leaf) -> ChangeSVD:
    """The singular value decomposition of one weight's `ΔW (in, out)`.

    For LoRA it is computed from the factors, without forming their product: with `Aᵀ = Q_a R_a (in, r)` and
    `Bᵀ = Q_b R_b (out, r)`, it is that of the small `scale · R_a R_bᵀ (r, r)`. Otherwise the difference is formed.

    Args:
        base: Weight before training; unused for an adapted weight, which has its own base.
        leaf: Weight after training: an adapted weight, or an array with two axes.

    Raises:
        ValueError: An array doesn't have two axes, so that their roles are unknown.

    Example:
        >>> node = lj.LoRAWeight(jnp.zeros((3, 2)), jnp.ones((1, 3)), jnp.ones((1, 2)), scale=2.0, axes="io")
        >>> change_svd(node.base, node).values.round(4).tolist()  # 2 · √3 · √2
        [[4.899]]
    """
    if _is_low_rank(leaf):
        return _low_rank_svd(leaf)
    axes = leaf.axes if is_adapted(leaf) else IN + OUT
    if len(axes) != len(leaf.shape) or not {IN, OUT} <= set(axes):
        raise ArgumentError(
            f"a leaf of shape {tuple(leaf.shape)} labelled {axes!r} is not a matrix with in and out axes"
        )
    left, values, right = np.linalg.svd(_matrices(_difference(base, leaf), axes), full_matrices=False)
    return ChangeSVD(left, values, right)


def subspace_similarity(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """How much the spans of the first directions of two factors overlap: `φ(i, j)` for all `i` and `j`.

        φ(A, B, i, j) = ‖U_Aⁱᵀ U_Bʲ‖²_F / min(i, j)

    with `U_Aⁱ` the first `i` right singular vectors of `A`. It is 1 if the smaller span lies in the larger and 0 if
    they are orthogonal; for random spans in `n` dimensions it is `max(i, j) / n` in expectation.

    Args:
        first: `A (r₁, n)`, the factor `a` of a LoRA.
        second: `B (r₂, n)`, that of a LoRA with another rank or seed.

    Returns:
        `(r₁, r₂)`; `[i - 1, j - 1]` is `φ(i, j)`.

    Raises:
        ValueError: The factors aren't matrices with rows of equal length.

    Example:
        >>> one, other = np.diag([2.0, 1.0, 0.0])[:2], np.diag([1.0, 2.0, 0.0])[:2]
        >>> subspace_similarity(one, other).tolist()
        [[0.0, 1.0], [1.0, 1.0]]

    Reference:
        Hu et al., "LoRA", 2021, arXiv:2106.09685, equation 4, section 7.2 and figure 3.
    """
    first, second = _float64(first), _float64(second)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ArgumentError(
            f"factors of shapes {first.shape} and {second.shape} must be matrices with rows of equal length"
        )
    u, v = (np.linalg.svd(matrix, full_matrices=False)[2] for matrix in (first, second))
    overlap = np.square(u @ v.T).cumsum(0).cumsum(1)
    i, j = np.indices(overlap.shape) + 1
    return overlap / np.minimum(i, j)


def adapter_similarities(params: Params, others: Params, *, factor: str = "a") -> dict[str, np.ndarray]:
    """`subspace_similarity` for each weight that LoRA has trained in both trees: `{path: (r₁, r₂)}`.

    Each member of a stack counts as a weight, with its number after the path.

    Raises:
        ValueError: The trees have no such weight in common.
    """
    first, second = (
        {path: leaf for path, leaf in leaves_by_path(tree).items() if _is_low_rank(leaf)} for tree in (params, others)
    )
    common = [path for path in first if path in second]
    if not common:
        held = [listed(list(leaves), most=5) or "none" for leaves in (first, second)]
        raise ArgumentError(
            f"the two have no weight in common that LoRA has trained: the first has {held[0]}, the other {held[1]}"
        )
    grids = {}
    for path in common:
        pairs = list(zip(_members(first[path], factor), _members(second[path], factor), strict=True))
        for number, (one, other) in enumerate(pairs):
            grids[path if len(pairs) == 1 else f"{path}/{number}"] = subspace_similarity(one, other)
    return grids


def amplification(base: Leaf, leaf: Leaf, *, rank: int | None = None, seed: int = 0) -> list[Amplification]:
    """How `ΔW` relates to `W`: one `Amplification` for each member of a stack, one for a single weight.

    Args:
        base, leaf: See `change_svd`.
        rank: Number of directions; by default the rank of `ΔW`.
        seed: Seed of the random directions.

    Example:
        >>> weight = jnp.diag(jnp.array([4.0, 1.0]))
        >>> row = amplification(weight, weight + jnp.diag(jnp.array([0.0, 3.0])))[0]
        >>> row.rank, row.in_change, row.in_weight, row.factor
        (1, 1.0, 4.0, 3.0)

    Reference:
        Hu et al., "LoRA", 2021, arXiv:2106.09685, section 7.3 and table 7.
    """
    axes = leaf.axes if is_adapted(leaf) else IN + OUT
    weights = _matrices(_float64(leaf.base if is_adapted(leaf) else base), axes)
    svd = change_svd(base, leaf)
    rows = []
    for weight, left, values, right in zip(weights, *svd, strict=True):
        floor = np.finfo(np.float32).eps * values.max(initial=0.0)
        directions = int((values > floor).sum()) if rank is None else min(rank, len(values))
        rng = np.random.default_rng(seed)
        random_left, random_right = (
            np.linalg.qr(rng.normal(size=(size, max(1, directions))))[0][:, :directions] for size in weight.shape
        )
        spectrum = np.linalg.svd(weight, compute_uv=False)
        in_change = _norm(left[:, :directions].T @ weight @ right[:directions].T)
        rows.append(
            Amplification(
                rank=directions,
                weight=_norm(weight),
                change=_norm(values),
                in_change=in_change,
                in_weight=_norm(spectrum[:directions]),
                in_random=_norm(random_left.T @ weight @ random_right),
                factor=_ratio(_norm(values), in_change),
            )
        )
    return rows


def _pairs(base_params: Params, params: Params) -> dict[str, tuple[Leaf, Leaf]]:
    """`{path: (before, after)}` of the leaves that could be trained."""
    before = leaves_by_path(base_params)
    # Inserted weights have no base to differ from.
    after = {path: leaf for path, leaf in leaves_by_path(params).items() if not isinstance(leaf, InsertedNode)}
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise ArgumentError(
            f"`base_params` and `params` must be trees of one model, but they differ at {', '.join(differing[:5])}"
        )
    wide = [_widened(leaf) if is_adapted(leaf) else leaf for leaf in after.values()]
    whole = dict(zip(after, merge_on_entry(wide), strict=True))
    return {path: (leaf, whole[path]) for path, leaf in before.items() if is_trainable(path, leaf)}


def _is_low_rank(leaf: object) -> TypeGuard[LoRAWeight]:
    """Whether the change is the product of the two factors and nothing else."""
    others = set(getattr(leaf, "fields", ())) - {"a", "b", "key"}
    return isinstance(leaf, LoRAWeight) and all(getattr(leaf, name) is None for name in others)


def _low_rank_svd(node: LoRAWeight) -> ChangeSVD:
    left, values, right = svd_of_product(_members(node, "a"), _members(node, "b"))
    return ChangeSVD(left, abs(node.scale) * values, math.copysign(1, node.scale) * right)


def _members(node: LoRAWeight, name: str) -> np.ndarray:
    """A factor as `(members, r, in or out)`."""
    array = _float64(getattr(node, name))
    stack = node.axes.count(STACK)
    return array.reshape(math.prod(array.shape[:stack]), node.rank, -1)


def _matrices(array: np.ndarray, axes: str) -> np.ndarray:
    """A weight as `(members, in, out)`."""
    order = [axis for label in (STACK, IN, OUT) for axis, own in enumerate(axes) if own == label]
    size = {label: math.prod(n for n, own in zip(array.shape, axes, strict=True) if own == label) for label in axes}
    return array.transpose(order).reshape(size.get(STACK, 1), size[IN], size[OUT])


def _difference(before: Leaf, after: Leaf) -> np.ndarray:
    if not is_adapted(after):
        if np.shape(before) != np.shape(after):
            raise ArgumentError(f"a leaf has the shape {np.shape(after)}, but its base has {np.shape(before)}")
        return _float64(after) - _float64(before)
    wide = _widened(after)
    return _float64(wide.merge()) - _float64(wide.base)


def _widened(node: AdaptedWeight) -> AdaptedWeight:
    """In float32 at least, so that small changes of a bfloat16 base aren't rounded away."""
    return node.with_base(node.base.astype(wider(node.dtype, jnp.float32)))


def _float64(array: ArrayLike) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def _term(place: Place) -> str:
    return place.term.rpartition("/")[0] or place.term
