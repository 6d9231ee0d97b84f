"""BitFit: only the biases learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ..paths import BIAS_NAMES, SelectionError, Selector, is_bias_name, leaf_name, listed, select
from .base import Method, is_trainable, require_selector, rooted


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Method):
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

    targets: Selector = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")

    def selected(self, leaves: Mapping[str, Any]) -> list[str]:
        """Paths of the chosen biases."""
        if self.targets != "all":
            return select(leaves, self.targets, argument="targets", eligible=self._is_bias, kind="bias")
        found = [path for path, leaf in leaves.items() if is_trainable(path, leaf) and is_bias_name(path)]
        if not found:
            vectors = [path for path, leaf in leaves.items() if is_trainable(path, leaf) and len(leaf.shape) == 1]
            raise SelectionError(
                f'`targets="all"` found no leaf named {", ".join(sorted(BIAS_NAMES))}. Leaves with one axis: '
                f"{listed(vectors) or 'none'}; name those that are biases in `targets`. Layers without biases can be "
                "given some of zeros, which change nothing at the start: of the bundled models by "
                "`lj.models.load(..., zero_biases=True)`, of your own in its function"
            )
        return found

    def _is_bias(self, path: str, leaf: Any) -> bool:
        if not is_trainable(path, leaf):
            return False
        if is_bias_name(path):
            return True
        # A name that means a whole module must not sweep up its other vectors: a normalization's scale, say.
        named = (
            callable(self.targets) or isinstance(self.targets, str) or leaf_name(path) in map(leaf_name, self.targets)
        )
        return named and len(leaf.shape) == 1

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self.selected(leaves), "bias")

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return dataclasses.replace(super().resolved(leaves), targets=rooted(self.selected(leaves)))
