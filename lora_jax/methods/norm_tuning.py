"""Norm tuning: only the normalizations' scales and shifts learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..paths import BIAS_NAMES, NORM_NAMES, in_norm, leaf_name
from .base import is_trainable
from .leaf_sets import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(Selection):
    """Trains the scale `γ` and the shift `β` of every normalization `y = γ ⊙ (x - μ) / σ + β`, and the head.

    That is two numbers a feature and norm, one where there is no shift (RMS norms): 38,400 in BERT-base, whose 25 norms
    are 768 wide. Nothing is added to the model, so nothing needs merging.

    Args:
        targets: which. `"all"` takes the scales and shifts of the modules that are named as norms are (`norm`,
            `LayerNorm_0`, `final_layernorm`, `ln_1`, `bn1`) or have a leaf `scale` or `gamma`. Names choose among
            those, a regular expression (`".*scale"`, the scales alone) or a callable too; a leaf with a single axis
            that is named outright is taken as it is. See `selection.select`.
        also_train: the head, see `Method`.

    Raises:
        SelectionError: (when used) an entry matches no scale or shift of a norm, or `"all"` finds none; the message
            lists the one-axis leaves.

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

    label: ClassVar[str] = "norm"
    kind: ClassVar[str] = "scale or shift of a norm"
    sought: ClassVar[str] = f"module named as norms are, and no leaf named {', '.join(sorted(NORM_NAMES))}"

    def members(self, leaves: Mapping[str, Any]) -> list[str]:
        scaled = {_module(path) for path in leaves if leaf_name(path) in NORM_NAMES}
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf) and _is_norm(path, leaf, scaled)]


def _is_norm(path: str, leaf: Any, scaled: set[str]) -> bool:
    if not in_norm(path) and _module(path) not in scaled:
        return False
    return leaf_name(path) in BIAS_NAMES | NORM_NAMES or (leaf_name(path) in ("weight", "w") and len(leaf.shape) == 1)


def _module(path: str) -> str:
    return path.rpartition("/")[0]
