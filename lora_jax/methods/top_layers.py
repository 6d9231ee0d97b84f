"""Fine-tuning of the last layers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..depth import layer_places, layer_sizes
from ..selection import SelectionError
from ..state import StateLeaf
from . import dtypes
from .base import Method, is_number, is_trainable, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayers(Method):
    """Trains the last `count` of a model's layers in full, and the head; all that lies below stays as pretrained.

    Of `L` layers of `n` numbers each that is `count · n`. The backward pass ends at the lowest trained layer, so a step
    costs less than with LoRA; nothing is added to the model, so nothing needs merging.

    Layers are what numbers tell apart in leaf paths, see `depth.layer_places`. Layers that one leaf holds along an
    axis (of a scan) can't be trained in part: `lj.models.unstack_layers` makes them leaves of their own, in the bundled
    models.

    Args:
        count: how many layers, at least 1.
        within: which layers, where a tree has several stacks of them: the end of the stack's path,
            `"decoder/layers"`.
        also_train: the head, see `Method`; and what comes after the last layer, a final norm or a pooler.

    Raises:
        ValueError: `count` is no positive integer, or (when used) more than there are layers.
        SelectionError: (when used) the tree has no layers that numbers tell apart, or several stacks and no `within`.

    Example:
        >>> import lora_jax as lj
        >>> params = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))}], "head": jnp.ones(2)}
        >>> lj.label_params(params, lj.TopLayers(count=1, also_train=("head",)))
        {'head': 'head', 'layers': [{'w': 'frozen'}, {'w': 'full'}]}

    Reference:
        Lee, Tang, Lin, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019, arXiv:1911.03090.
        With `count=2` it is the baseline FT-Top2 of Li, Liang, "Prefix-Tuning", 2021, arXiv:2101.00190.
    """

    count: int
    within: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.count, int) and self.count >= 1,
            f"`count` must be an integer of at least 1, got {self.count!r}",
        )

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        places = layer_places(path for path, leaf in leaves.items() if not isinstance(leaf, StateLeaf))
        stack, size = self._stack(layer_sizes(places))
        require(self.count <= size, f"`count` is {self.count}, and `{stack}` has {size} layers")
        first = size - self.count
        top = [path for path, place in places.items() if place.stack == stack and place.layer >= first]
        found = [path for path in top if is_trainable(path, leaves[path])]
        return dict.fromkeys(dtypes.trained(leaves, found, argument="count"), "full")

    def _stack(self, sizes: Mapping[str, int]) -> tuple[str, int]:
        known = ", ".join(f"{stack} ({size} layers)" for stack, size in sizes.items())
        if not sizes:
            raise SelectionError(
                "the tree has no layers that numbers tell apart, as in `layers/0/...` or `Block_0/...`. "
                "Layers along an axis of a leaf can't be trained in part: take them apart "
                "(`lj.models.unstack_layers`), or name leaves in `FullFineTune(targets=...)`"
            )
        if self.within is None:
            if len(sizes) > 1:
                raise SelectionError(f"the tree has several stacks of layers, {known}: say which in `within`")
            return next(iter(sizes.items()))
        wanted = "/" + self.within.strip("/")
        found = [stack for stack in sizes if f"/{stack}".endswith(wanted)]
        if len(found) != 1:
            what = "no stack" if not found else "more than one stack"
            raise SelectionError(f"`within={self.within!r}` matches {what} of layers; the tree has {known}")
        return found[0], sizes[found[0]]
