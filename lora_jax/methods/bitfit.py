"""BitFit: only the biases learn."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from ..paths import BIAS_NAMES, in_norm, is_bias_name, is_scale_name, leaf_name, listed, shape_text, words
from .base import is_trainable
from .leaf_sets import Selection

# Words of a name that speak of a bias, be the leaf one or not.
_BIAS_WORDS = BIAS_NAMES - {"b"} | {"betas", "offsets", "shift", "intercept"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Selection):
    """Trains bias terms, all of them or a subset, and the head; every weight stays as pretrained.

    For every layer `y = W x + b` only `b` moves, and so do the shifts of the normalizations. Nothing is added to the
    model, so nothing needs merging.

    Args:
        targets: which biases. `"all"` takes every leaf that is named as biases are, by the words of its path's last
            segment (`paths.is_bias_name`): `bias`, `b`, `beta`, `offset`; `q_bias`, `in_proj_bias`, `ln_beta`;
            `bias_n`, `bias_ih_l0`; `b1`. So is a `bq` with fewer axes than the `wq` beside it, and a `b_in` with a
            single one. What else speaks of a bias, such as a table of biases over relative positions or a `shift`,
            stays frozen and is named in a warning.
            Names choose the biases of modules: the paper's {query, MLP-up} is `("attention/query", "mlp/up")`. A
            regular expression or a callable may choose any leaf so named, or any with a single axis; a table of biases
            is chosen by its own name. See `selection.select`.
        also_train: the head, see `Method`. A bias of the head counts as head.

    Raises:
        SelectionError: (when used) an entry matches no bias, or `"all"` finds none; the message lists the one-axis
            leaves that are no norm's scale, and says how layers without biases get some.

    Warns:
        UserWarning: (when used) `"all"` leaves out leaves whose names speak of biases; each is named. Name them in
            `targets` beside the others to train them, too.

    Example:
        >>> import lora_jax as lj
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> lj.label_params(params, lj.BitFit(targets="all"))
        {'dense': {'bias': 'bias', 'kernel': 'frozen'}}

    Reference:
        Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models", ACL 2022, arXiv:2106.10199.

    Deviations:
        The authors' code picks terms by substring, so that `output` also trains the attention output's bias; here a
        name matches whole path segments.
    """

    label: ClassVar[str] = "bias"
    kind: ClassVar[str] = "bias"
    sought: ClassVar[str] = f"leaf named {', '.join(sorted(BIAS_NAMES - {'biases'}))}, or so by its words"

    def members(self, leaves: Mapping[str, Any]) -> list[str]:
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf) and _is_bias(path, leaf, leaves)]

    def candidates(self, leaves: Mapping[str, Any]) -> list[str]:
        return [path for path in super().candidates(leaves) if not _is_norm_scale(path)]

    def may_be_named(self, path: str, leaf: Any) -> bool:
        outright = not callable(self.targets) and not isinstance(self.targets, str)
        return super().may_be_named(path, leaf) or (outright and is_trainable(path, leaf) and _speaks_of_a_bias(path))

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        labels = super().own_labels(leaves)
        if self.targets == "all" and (left := self._left_out(leaves, {*labels, *self.head(leaves)})):
            warnings.warn(
                f"BitFit's `targets=\"all\"` leaves out {listed(left)}: their names speak of biases, but aren't those "
                "of bias terms. To train them name them in `targets`, beside the others",
                stacklevel=3,
            )
        return labels

    def _left_out(self, leaves: Mapping[str, Any], trained: set[str]) -> list[str]:
        return [
            f"{path} {shape_text(leaf)}"
            for path, leaf in leaves.items()
            if path not in trained and is_trainable(path, leaf) and _speaks_of_a_bias(path)
        ]

    def way_out(self, leaves: Mapping[str, Any]) -> str:
        return (
            f"{super().way_out(leaves)}. Layers without biases can be given some of zeros, which change nothing at the "
            "start: those of the bundled models by `lj.models.load(..., zero_biases=True)`, your own in their function"
        )


def _is_bias(path: str, leaf: Any, leaves: Mapping[str, Any]) -> bool:
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


def _speaks_of_a_bias(path: str) -> bool:
    named = words(leaf_name(path))
    return bool(_BIAS_WORDS.intersection(named)) or named[:1] == ["b"]


def _is_norm_scale(path: str) -> bool:
    return is_scale_name(path) or (in_norm(path) and not is_bias_name(path))
