"""BitFit: only the biases are trained."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

from ..paths import BIAS_NAMES, in_norm, is_bias_name, is_scale_name, leaf_name, listed, shape_text, words
from ..types import LeafPath, PyTree
from .base import LeafLabels, Leaves, is_trainable
from .leaf_method import LeafMethod

# Words in a leaf's name that suggest a bias, whether or not the leaf is one.
_BIAS_WORDS = BIAS_NAMES - {"b"} | {"betas", "offsets", "shift", "intercept"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(LeafMethod):
    """Trains bias terms, all of them or a subset, and the head; every weight stays as pretrained.

    In every layer `y = W x + b` only `b` is trained, and in every normalization only the shift. Nothing is added to
    the model, so nothing needs merging.

    Args:
        targets: Biases to train. `"all"` takes every leaf that is named like a bias, by the words of its path's last
            segment (`paths.is_bias_name`): `bias`, `b`, `beta`, `offset`; `q_bias`, `in_proj_bias`, `ln_beta`;
            `bias_n`, `bias_ih_l0`; `b1`. It also takes a `bq` with fewer axes than the `wq` beside it, and a `b_in`
            with a single axis. Other leaves whose names suggest a bias, such as a table of biases over relative
            positions or a `shift`, stay frozen and are named in a warning.
            Names select the biases of modules: the paper's {query, MLP-up} is `("attention/query", "mlp/up")`. A
            regular expression or a callable may select any leaf named like a bias, or any with a single axis; a table
            of biases is selected by its own name. See `selection.select`.
        also_train: The head, see `Method`. A bias of the head counts as head.

    Raises:
        SelectionError: (When used.) An entry matches no bias, or `"all"` finds none; the message lists the leaves with
            one axis that are no norm's scale, and says how to give biases to layers without them.

    Warns:
        UserWarning: (When used.) `"all"` leaves out leaves whose names suggest biases; each is named. To train them,
            name them in `targets` beside the others.

    Example:
        >>> import lora_jax as lj
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> lj.label_params(params, lj.BitFit(targets="all"))
        {'dense': {'bias': 'bias', 'kernel': 'frozen'}}

    Reference:
        Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models", ACL 2022, arXiv:2106.10199.

    Deviations:
        The authors' code selects biases by substring, so that `output` also trains the attention output's bias. Here
        a name matches whole path segments.
    """

    name: ClassVar[str] = "bitfit"
    saved_as: ClassVar[str] = "BitFit"
    title: ClassVar[str] = "BitFit"
    summary: ClassVar[str] = "biases"
    default_rate: ClassVar[float] = 3e-3
    label: ClassVar[str] = "bias"
    kind: ClassVar[str] = "bias"
    sought: ClassVar[str] = f"leaf named {', '.join(sorted(BIAS_NAMES - {'biases'}))}, or by its words"

    def members(self, leaves: Leaves) -> list[LeafPath]:
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf) and _is_bias(path, leaf, leaves)]

    def candidates(self, leaves: Leaves) -> list[LeafPath]:
        return [path for path in super().candidates(leaves) if not _is_norm_scale(path)]

    def may_be_named(self, path: LeafPath, leaf: PyTree) -> bool:
        by_name = not callable(self.targets) and not isinstance(self.targets, str)
        return super().may_be_named(path, leaf) or (by_name and is_trainable(path, leaf) and _suggests_a_bias(path))

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        labels = super().own_labels(leaves)
        if self.targets == "all" and (left := self._left_out(leaves, {*labels, *self.head(leaves)})):
            warnings.warn(
                f"BitFit's `targets=\"all\"` leaves out {listed(left)}: their names suggest biases, but aren't those "
                "of bias terms. To train them, name them in `targets` beside the others",
                stacklevel=3,
            )
        return labels

    def _left_out(self, leaves: Leaves, trained: set[str]) -> list[LeafPath]:
        return [
            f"{path} {shape_text(leaf)}"
            for path, leaf in leaves.items()
            if path not in trained and is_trainable(path, leaf) and _suggests_a_bias(path)
        ]

    def advice(self, leaves: Leaves) -> str:
        return (
            f"{super().advice(leaves)}. Layers without biases can be given zeros, which change nothing at the "
            "start: with `lj.models.load(..., zero_biases=True)` in the bundled models, in your own in their function"
        )


def _is_bias(path: LeafPath, leaf: PyTree, leaves: Leaves) -> bool:
    if is_bias_name(path):
        return True
    name = leaf_name(path)
    if not name.startswith("b") or "bias" in name:
        return False
    module = path.removesuffix(name)
    weights = [leaves[twin] for first in "wW" if (twin := f"{module}{first}{name[1:]}") in leaves]
    if weights:
        return len(leaf.shape) < len(weights[0].shape)
    return len(leaf.shape) == 1 and words(name)[0] == "b"


def _suggests_a_bias(path: str) -> bool:
    named = words(leaf_name(path))
    return bool(_BIAS_WORDS.intersection(named)) or named[:1] == ["b"]


def _is_norm_scale(path: str) -> bool:
    return is_scale_name(path) or (in_norm(path) and not is_bias_name(path))
