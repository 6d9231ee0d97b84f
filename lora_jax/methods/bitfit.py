"""BitFit: only the biases learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..paths import BIAS_NAMES, is_bias_name
from .base import is_trainable
from .selection import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Selection):
    """Trains bias terms, all of them or a subset, and the head; every weight stays as pretrained.

    For every layer `y = W x + b` only `b` moves, and so do the shifts of the normalizations. Nothing is added to the
    model, so nothing needs merging.

    Args:
        targets: which biases. `"all"` takes every leaf whose last path segment is `bias`, `b`, `beta` or `offset`.
            Names choose the biases of modules: the paper's {query, MLP-up} is `("attention/query", "mlp/up")`. A
            regular expression or a callable may choose any leaf so named, or any with a single axis. See
            `paths.select`.
        also_train: the head, see `Method`. A bias of the head counts as head.

    Raises:
        SelectionError: (when used) an entry matches no bias, or `"all"` finds none; the message lists the one-axis
            leaves, and says how layers without biases get some.

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
    sought: ClassVar[str] = f"leaf named {', '.join(sorted(BIAS_NAMES))}"

    def members(self, leaves: Mapping[str, Any]) -> list[str]:
        return [path for path, leaf in leaves.items() if is_trainable(path, leaf) and is_bias_name(path)]

    def way_out(self, leaves: Mapping[str, Any]) -> str:
        return (
            f"{super().way_out(leaves)}. Layers without biases can be given some of zeros, which change nothing at the "
            "start: those of the bundled models by `lj.models.load(..., zero_biases=True)`, your own in their function"
        )
