"""Norm tuning: only the scales and shifts of the normalizations are trained."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..paths import BIAS_NAMES, NORM_NAMES, in_norm, leaf_name
from ..types import LeafPath, PyTree
from .base import Leaves, is_trainable
from .leaf_method import LeafMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(LeafMethod):
    """Trains the scale `γ` and the shift `β` of every normalization `y = γ ⊙ (x - μ) / σ + β`, and the head.

    That is two parameters per feature of each norm, or one where there is no shift (RMS norms): 38,400 in BERT-base,
    whose 25 norms are 768 wide. Nothing is added to the model, so nothing needs merging.

    Args:
        targets: Scales and shifts to train. `"all"` takes those of every module that is named like a norm (`norm`,
            `LayerNorm_0`, `final_layernorm`, `ln_1`, `bn1`) or has a leaf `scale` or `gamma`. Names, a regular
            expression (`".*scale"` for the scales alone) or a callable select some of them; any leaf with a single axis
            is trained if it is named outright. See `selection.select`.
        also_train: The head, see `Method`.

    Raises:
        SelectionError: (When used.) An entry matches no scale or shift of a norm, or `"all"` finds none; the message
            lists the leaves with one axis.

    Example:
        >>> import lora_jax as lj
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"weight": jnp.ones(3)}}
        >>> lj.label_params(params, lj.NormTuning())
        {'dense': {'bias': 'frozen', 'kernel': 'frozen'}, 'norm': {'weight': 'norm'}}

    Reference:
        Qi et al., "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022,
        arXiv:2211.08682. Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm", ICLR 2021,
        arXiv:2003.00152.
    """

    name: ClassVar[str] = "norms"
    saved_as: ClassVar[str] = "NormTuning"
    title: ClassVar[str] = "norms"
    summary: ClassVar[str] = "scales and shifts of the norms"
    default_rate: ClassVar[float] = 3e-3
    label: ClassVar[str] = "norm"
    kind: ClassVar[str] = "scale or shift of a norm"
    sought: ClassVar[str] = f"module named like a norm, and no leaf named {', '.join(sorted(NORM_NAMES))}"

    def members(self, leaves: Leaves) -> list[LeafPath]:
        scaled = {_module(path) for path in leaves if leaf_name(path) in NORM_NAMES}
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf) and _is_norm(path, leaf, scaled)]


def _is_norm(path: LeafPath, leaf: PyTree, scaled: set[str]) -> bool:
    if not in_norm(path) and _module(path) not in scaled:
        return False
    return leaf_name(path) in BIAS_NAMES | NORM_NAMES or (leaf_name(path) in ("weight", "w") and len(leaf.shape) == 1)


def _module(path: str) -> str:
    return path.rpartition("/")[0]
