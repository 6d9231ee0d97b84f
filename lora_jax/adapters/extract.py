"""Extracting a LoRA from two full models: the best low-rank factors of what fine-tuning changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..attach import attach
from ..errors import ArgumentError
from ..masks import copied
from ..methods import LoRA, LoRAWeight, dtypes
from ..methods.base import is_trainable, rooted
from ..paths import leaves_by_path
from ..selection import Selector
from ..state import marked_leaves, state_paths
from ..text import listed
from ..types import Leaf, Params, Uses
from ..weights import IN, OUT, STACK, is_adapted, wider
from .changes import changed_leaves
from .truncate import LowRankFit, check_wanted, fit_of, most_frequent, rank_for, rebuilt, relabelled, with_factors

Rest = Literal["train", "drop", "error"]
_CODE = "`{}`"
_FLOAT64_EPS = float(np.finfo(np.float64).eps)


class Extracted(NamedTuple):
    """From `extract_lora`.

    Attributes:
        params: Base with factors at the targets that have changed.
        method: Method that labels them.
        fits: One for each weight with factors.
        carried: Leaves that are taken over in full: `also_train`, and with `rest="train"` all others that have changed.
        dropped: Leaves that have changed and stay as the base has them.
    """

    params: Params
    method: LoRA
    fits: dict[str, LowRankFit]
    carried: list[str]
    dropped: list[str]


def extract_lora(
    base_params: Params,
    tuned_params: Params,
    *,
    targets: Selector,
    rank: int | None = None,
    energy: float | None = None,
    also_train: Selector = (),
    rest: Rest = "train",
    uses: Uses | None = None,
) -> Extracted:
    """A LoRA out of two full models: for each target that has changed, the truncated SVD of `W_tuned − W_base`.

    The difference is taken in float32 (float64 where the weights are) and decomposed in float64 on the host, one leaf
    at a time, of a stack one member: memory is taken for a few copies of one leaf. `ΔW ≈ U Σ Vᵀ` becomes `a = √Σ Uᵀ`
    `(r, in…)` and `b = √Σ Vᵀ (r, out…)`, with the scale 1. `rest` says what becomes of
    other leaves that fine-tuning changed, and the result names them.

    Args:
        base_params: Model before fine-tuning.
        tuned_params: Model after fine-tuning, in the same structure.
        targets: Weights that get factors, as in `LoRA`.
        rank: Highest rank; a smaller weight gets its full rank, and is then exact.
        energy: Share of `Σσ²` to keep, in `(0, 1]`: each weight gets the least rank that does, at most `rank` if
            that is given too. 1 keeps all that can be told from the rounding of the weights, so a fine-tuning of rank
            `r` gives factors of rank `r`.
        also_train: Leaves that are taken over in full, as in `LoRA`.
        rest: Treatment of other leaves that have changed (biases, norms, embeddings, a head): `"train"` takes them
            over in full, in the method's `also_train` (batch statistics and other state in the tree alone, since no
            method trains them); `"drop"` leaves them as the base has them; `"error"` refuses.
        uses: Result of `trace_weights`, needed where a target has more than two axes.

    Returns:
        `Extracted(params, method, fits, carried, dropped)`.

    Raises:
        ValueError: Neither `rank` nor `energy`, or one out of range; trees of two models, or with factors; no target
            has changed; a leaf has changed that is neither array nor float; values that are not finite.
        SelectionError: See `attach`; what is to be factored or carried is complex in the tuned model.

    Example:
        >>> base = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> tuned = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
        >>> found = lj.extract_lora(base, tuned, targets=("dense",), energy=1.0)
        >>> found.fits["dense/kernel"].rank, found.carried
        (1, ['dense/bias'])
        >>> bool(jnp.allclose(lj.merge_params(found.params)["dense"]["kernel"], 1.0))
        True
    """
    check_wanted(rank, energy)
    if rest not in ("train", "drop", "error"):
        raise ArgumentError(f'`rest` must be "train", "drop" or "error", got {rest!r}')
    changed = changed_leaves(tuned_params, base_params, argument="tuned_params")
    before, after = leaves_by_path(base_params), leaves_by_path(tuned_params)
    # Rank 1 for the moment: what counts is which weights are targets, and the labels of their axes.
    probe = LoRA(rank=1, alpha=1, targets=targets, also_train=also_train)
    nodes = leaves_by_path(attach(base_params, probe, key=jax.random.key(0), uses=uses))
    chosen = {path: nodes[path] for path in changed if is_adapted(nodes[path])}
    if not chosen:
        raise ArgumentError(
            "None of the targets differs between `base_params` and `tuned_params`; what does: "
            f"{listed(changed, form=_CODE) or 'nothing'}."
        )
    head, state = set(probe.head(marked_leaves(base_params))), state_paths(base_params)
    others = [path for path in changed if path not in chosen and path not in head]
    _check_others([path for path in others if path not in state or rest == "error"], before, after, rest)
    kept = head | (set(others) if rest == "train" else set())
    carried = [path for path in before if path in kept]
    # The base's dtypes have passed as the targets and the head were chosen; those of the tuned model may be others.
    dtypes.factored(after, chosen, argument="tuned_params")
    trained = [path for path in carried if path not in state]  # a file keeps state without its being trained
    dtypes.trained(after, trained, argument="tuned_params")

    fits, replaced = {}, {path: copied(after[path]) for path in carried}
    for path, node in chosen.items():
        replaced[path], fits[path] = _factored(path, node, after[path], rank, energy)
    usual = most_frequent(fit.rank for fit in fits.values())
    params = rebuilt(base_params, replaced)
    probe = dataclasses.replace(probe, targets=rooted(list(chosen)), also_train=rooted(trained))
    method = relabelled(probe, params, usual, usual)
    return Extracted(params, method, fits, carried, [] if rest == "train" else others)


def _check_others(others: list[str], before: Mapping[str, Leaf], after: Mapping[str, Leaf], rest: Rest) -> None:
    if rest == "error" and others:
        raise ArgumentError(
            f"`tuned_params` has other values at {listed(others, form=_CODE)}, which no factors stand for: name "
            'them in `also_train`, or pass `rest="train"` to take them over in full or `rest="drop"` to leave them out'
        )
    fixed = [path for path in others if not (_can_learn(path, before[path]) and _can_learn(path, after[path]))]
    if rest == "train" and fixed:
        kinds = ", ".join(dict.fromkeys(str(after[path].dtype) for path in fixed))
        raise ArgumentError(
            f"{listed(fixed, form=_CODE)} changed, and can't be trained, since it is {kinds}, which is no real "
            'floating type of 16 bits or more: pass `rest="drop"` to leave it as the base has it'
        )


def _can_learn(path: str, leaf: Leaf) -> bool:
    return is_trainable(path, leaf) and dtypes.why_not_trained(leaf) is None


def _factored(
    path: str, node: LoRAWeight, tuned: Leaf, rank: int | None, energy: float | None
) -> tuple[LoRAWeight, LowRankFit]:
    """The node's factors of rank 1 replaced by those of the difference."""
    full = min(math.prod(node.shape[axis] for axis in node.places(label)) for label in (IN, OUT))
    most = full if rank is None else min(rank, full)
    a, b, sigma, floor = [], [], [], []
    for base, new in zip(_members(node, node.base), _members(node, tuned), strict=True):
        wide = wider(wider(base.dtype, new.dtype), np.float32)
        delta = new.astype(wide) - base.astype(wide)
        if not np.isfinite(delta).all():
            raise ArgumentError(f"`{path}` holds NaN or infinity, in `base_params` or in `tuned_params`")
        *factors, spectrum = _balanced_factors(delta.astype(np.float64), most)
        for array, kept in zip(factors, (a, b), strict=True):
            kept.append(array)
        sigma.append(spectrum)
        eps = max(float(jnp.finfo(array.dtype).eps) for array in (base, new))
        of_weights = (eps * float(np.linalg.norm(new.astype(wide)))) ** 2
        floor.append(of_weights + full * _FLOAT64_EPS * spectrum[0] ** 2)
    spectra = np.stack(sigma)
    kept = rank_for(spectra, np.array(floor), rank, energy)
    return with_factors(node, np.stack(a)[:, :kept], np.stack(b)[:, :kept]), fit_of(full, kept, spectra)


def _balanced_factors(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`√Σ Uᵀ (r, in)`, `√Σ Vᵀ (r, out)` and all singular values of a float64 matrix `(in, out)`.

    From the eigenvectors of its smaller Gram matrix, several times as fast as LAPACK's SVD. Squaring costs half of the
    digits, and float64 has twice those of the weights.
    """
    if delta.shape[0] > delta.shape[1]:
        b, a, sigma = _balanced_factors(delta.T, rank)
        return a, b, sigma
    squares, u = np.linalg.eigh(delta @ delta.T)
    sigma = np.sqrt(np.maximum(squares[::-1], 0.0))
    root = np.sqrt(sigma[:rank, None])
    u = u.T[::-1][:rank]
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return root * u, inverse * (u @ delta), sigma


def _members(node: LoRAWeight, array: Leaf) -> Iterator[np.ndarray]:
    """The `(in, out)` matrices of a weight: one, or as many as its stack has members."""
    inside, outside, stack = (node.places(label) for label in (IN, OUT, STACK))
    matrices = np.asarray(array).transpose(*stack, *inside, *outside)
    sizes = (math.prod(node.shape[axis] for axis in axes) for axes in (stack, inside, outside))
    return iter(matrices.reshape(*sizes))
