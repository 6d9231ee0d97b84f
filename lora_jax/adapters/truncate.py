"""The best factors of a lower rank, and what they lose."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..methods import LoRA, LoRAWeight, Method
from ..methods.base import is_number
from ..methods.lora.starts import FROM_WEIGHT
from ..paths import flatten_with_paths, leaves_by_path
from ..state import marked_leaves
from ..types import Leaf, Params
from ..weights import STACK, is_adapted, is_traced

_FLOAT32_EPS = float(np.finfo(np.float32).eps)


class LowRankFit(NamedTuple):
    """How much of a weight's change `ΔW` its new factors hold.

    Attributes:
        full_rank: Rank before: that of the old factors, or `min(in, out)`.
        rank: Rank of the new factors.
        error: `‖ΔW − ΔW'‖ / ‖ΔW‖`, Frobenius norms; 0 where `ΔW` is zero. All members of a stack together.
        energy: Kept share of `Σσ²`, which is `1 − error²`.
    """

    full_rank: int
    rank: int
    error: float
    energy: float


class Truncated(NamedTuple):
    """From `truncate_lora`: the tree, its method, and one fit for each adapted weight."""

    params: Params
    method: LoRA
    fits: dict[str, LowRankFit]


def truncate_lora(params: Params, method: Method, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best LoRA of lower rank: for each adapted weight, the truncated SVD of `ΔW = scale · Aᵀ B`.

    With `QR` of both factors, `Aᵀ = Q_a R_a (in, r)` and `Bᵀ = Q_b R_b (out, r)`, the singular values of `ΔW` are those
    of the `r × r` matrix `R_a R_bᵀ`, so the `in × out` product is never formed. No factors of that rank are nearer
    to `ΔW` (Eckart and Young). The new factors share each singular value evenly, `√σ` a side, and keep the scale of the
    old ones. It is computed in float64 on the host: factors are thin.

    Args:
        params: Adapted tree.
        method: `LoRA` that labels it.
        rank: Highest rank. A weight whose rank is no higher keeps its factors, bit for bit.
        energy: Share of `Σσ²` to keep, in `(0, 1]`: each weight gets the least rank that does, at most `rank` if
            that is given too. 1 keeps all that float32 can tell from rounding. In a stack each member keeps the share.

    Returns:
        `Truncated(params, method, fits)`. `method` has the most frequent rank, and the others in `rank_overrides`; its
        `alpha` leaves the scale as it was, so that training can go on at the same rates.

    Raises:
        ValueError: Neither `rank` nor `energy`, or one out of range; no factors, other factors than LoRA's, or values
            that are not finite, or complex ones; called under `jit`, where a rank can't depend on values.

    Example:
        >>> a = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> node = lj.LoRAWeight(jnp.zeros((3, 2)), a, jnp.array([[3.0, 0.0], [0.0, 4.0]]), scale=2.0, axes="io")
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("w",))
        >>> params, method, fits = lj.truncate_lora({"w": node}, method, rank=1)
        >>> fits["w"].error, round(fits["w"].energy, 3), method.rank, method.alpha
        (0.6, 0.64, 1, 2.0)
        >>> [[round(value, 4) for value in row] for row in lj.merge_params(params)["w"].tolist()]
        [[0.0, 0.0], [0.0, 8.0], [0.0, 0.0]]

    Reference:
        Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.
    """
    check_wanted(rank, energy)
    if not isinstance(method, LoRA):
        raise ArgumentError(f"`method` is {type(method).__name__}, and only LoRA has factors of a rank")
    leaves = leaves_by_path(params)
    nodes = {path: leaf for path, leaf in leaves.items() if is_adapted(leaf)}
    if not nodes:
        raise ArgumentError("`params` has no factors: pass the tree from `lj.attach`, not a merged one")
    fits, replaced = {}, {}
    for path, node in nodes.items():
        _require_plain(path, node)
        assert isinstance(node, LoRAWeight)
        # Of a start from the weight, what counts is the difference from it: one pair of twice the rank.
        replaced[path], fits[path] = _truncated(path, node.one_pair(), rank, energy)
    if method.init in FROM_WEIGHT:
        method = dataclasses.replace(method, init="gaussian")
    scale = _scale(method, method.alpha, method.rank)
    new = rebuilt(params, replaced)
    usual = most_frequent(fit.rank for fit in fits.values())
    alpha = scale * (usual if method.scaling == "standard" else math.sqrt(usual))
    return Truncated(new, relabelled(method, new, usual, alpha), fits)


def check_wanted(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ArgumentError(
            "Neither `rank` nor `energy` is given: pass `rank`, or `energy` (the share of Σσ², such as 0.9), or both."
        )
    if rank is not None and not (is_number(rank, int) and rank >= 1):
        raise ArgumentError(f"`rank` must be a positive integer, got {rank!r}.")
    if energy is not None and not (is_number(energy, float) and 0 < energy <= 1):
        raise ArgumentError(f"`energy` must be a share in (0, 1], got {energy!r}.")


def _require_plain(path: str, node: Leaf) -> None:
    if type(node) is not LoRAWeight:
        raise ArgumentError(f"`{path}` is a {type(node).__name__}, and only LoRA's factors can be given another rank")
    if any(array is None for array in (node.base, node.a, node.b)):
        raise ArgumentError(f"`params` lacks the base or a factor of `{path}`: pass `lj.combine(trainable, frozen)`")
    kinds = {str(array.dtype) for array in (node.base, node.a, node.b) if jnp.iscomplexobj(array)}
    if kinds:
        raise ArgumentError(f"`{path}` is {', '.join(sorted(kinds))}, and only real factors can be given another rank")
    if is_traced(node):
        raise ArgumentError(f"`{path}` is abstract, and a rank can't depend on values under `jax.jit`: call it outside")


def _truncated(path: str, node: LoRAWeight, rank: int | None, energy: float | None) -> tuple[LoRAWeight, LowRankFit]:
    stack = node.axes.count(STACK)
    a, b = (np.asarray(array, np.float64) for array in (node.a, node.b))
    for name, array in (("a", a), ("b", b)):
        if not np.isfinite(array).all():
            raise ArgumentError(f"the factor `{name}` of `{path}` holds NaN or infinity; load an earlier checkpoint")
    members = math.prod(a.shape[:stack])
    left, sigma, right = svd_of_product(a.reshape(members, node.rank, -1), b.reshape(members, node.rank, -1))
    floor = (_FLOAT32_EPS**2) * np.square(sigma).sum(-1)
    kept = rank_for(sigma, floor, rank, energy)
    kept = node.rank if energy is None and rank is not None and rank >= node.rank else kept
    if kept == node.rank or not sigma.any():
        # The start of the factors is then as good as any, and training can go on from it.
        cut = (slice(None),) * stack + (slice(kept),)
        same = node if kept == node.rank else dataclasses.replace(node, a=node.a[cut], b=node.b[cut])
        return same, LowRankFit(node.rank, kept, 0.0, 1.0)
    root = np.sqrt(sigma[:, :kept, None])
    new_a = root * np.swapaxes(left[:, :, :kept], 1, 2)
    new_b = root * right[:, :kept]
    return with_factors(node, new_a, new_b), fit_of(node.rank, kept, sigma)


def svd_of_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of `aᵀ b` for each member, `a (members, r, in)` and `b (members, r, out)`, by QR of both.

    Returns:
        `left (members, in, r)`, the singular values `(members, r)`, `right (members, r, out)`.
    """
    q_a, r_a = np.linalg.qr(np.swapaxes(a, 1, 2))
    q_b, r_b = np.linalg.qr(np.swapaxes(b, 1, 2))
    u, sigma, vt = np.linalg.svd(r_a @ np.swapaxes(r_b, 1, 2), full_matrices=False)
    return q_a @ u, sigma, vt @ np.swapaxes(q_b, 1, 2)


def rank_for(sigma: np.ndarray, floor: np.ndarray, rank: int | None, energy: float | None) -> int:
    """The rank to keep of spectra `(members, k)`; `floor` is the energy that rounding may have, of each member."""
    needed = sigma.shape[-1]
    if energy is not None:
        squares = np.square(sigma)
        # What is lost at each rank from 0 on, the small terms summed first.
        lost = np.cumsum(squares[:, ::-1], axis=-1)[:, ::-1]
        enough = lost <= ((1 - energy) * squares.sum(-1) + floor)[:, None]
        needed = max(1, int(np.where(enough.any(-1), enough.argmax(-1), needed).max()))
    return needed if rank is None else min(rank, needed)


def fit_of(full: int, kept: int, sigma: np.ndarray) -> LowRankFit:
    total = float(np.square(sigma).sum())
    lost = float(np.square(sigma[:, kept:]).sum()) / total if total else 0.0
    return LowRankFit(full, kept, math.sqrt(lost), 1.0 - lost)


def with_factors(node: LoRAWeight, a: np.ndarray, b: np.ndarray) -> LoRAWeight:
    """The node with factors `(members, r, in)` and `(members, r, out)`, in the shapes and places of its own."""
    stack = node.axes.count(STACK)
    places = node.placements()
    arrays = {}
    for name, array in (("a", a), ("b", b)):
        old = getattr(node, name)
        shape = (*old.shape[:stack], array.shape[1], *old.shape[stack + 1 :])
        # A copy: a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
        new = jnp.array(array.reshape(shape), old.dtype, copy=True)
        arrays[name] = jax.device_put(new, places[name]) if name in places else new
    return dataclasses.replace(node, **arrays)


def _scale(method: LoRA, alpha: float, rank: int) -> float:
    return alpha / (rank if method.scaling == "standard" else math.sqrt(rank))


def most_frequent(ranks: Iterator[int]) -> int:
    """Of those equally frequent the highest."""
    counts = collections.Counter(ranks)
    return max(counts, key=lambda rank: (counts[rank], rank))


def relabelled(method: LoRA, params: Params, rank: int, alpha: float) -> LoRA:
    """The method with this rank and alpha, and what differs from them in the tree as overrides."""
    plain = dataclasses.replace(method, rank=rank, alpha=alpha, rank_overrides={}, alpha_overrides={})
    return plain.resolved(marked_leaves(params))


def rebuilt(params: Params, replaced: Mapping[str, Leaf]) -> Params:
    paths, leaves, treedef = flatten_with_paths(params)
    return jax.tree.unflatten(treedef, [replaced.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
