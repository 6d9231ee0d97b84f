"""Fine-tuning of the last layers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from ..depth import layer_places, layer_sizes
from ..selection import SelectionError
from ..state import StateLeaf
from . import dtypes
from .base import LeafLabels, Leaves, Method, flag, is_trainable, require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayers(Method):
    """Trains the last `count` of a model's layers in full, and the head; everything below stays as pretrained.

    With layers of `n` parameters each, it trains `count · n`. The backward pass ends at the lowest trained layer, so a
    step costs less than with LoRA. Nothing is added to the model, so nothing needs merging.

    Layers are told apart by the numbers in leaf paths, see `depth.layer_places`. Layers that a scan stacks along an
    axis of one leaf can't be trained in part; for the bundled models `lj.models.unstack_layers` gives each layer leaves
    of its own.

    Args:
        count: Number of layers, at least 1.
        within: The stack of layers, where a tree has several: the end of its path, `"decoder/layers"` for example.
        also_train: The head, see `Method`, and what comes after the last layer, such as a final norm or a pooler.

    Raises:
        ValueError: `count` is no positive integer, or (when used) more than there are layers.
        SelectionError: (When used.) The tree has no numbered layers, or several stacks and no `within`.

    Example:
        >>> import lora_jax as lj
        >>> params = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))}], "head": jnp.ones(2)}
        >>> lj.label_params(params, lj.TopLayers(count=1, also_train=("head",)))
        {'head': 'head', 'layers': [{'w': 'frozen'}, {'w': 'full'}]}

    Reference:
        Lee, Tang, Lin, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019, arXiv:1911.03090.
        With `count=2` it is the baseline FT-Top2 of Li, Liang, "Prefix-Tuning", 2021, arXiv:2101.00190.
    """

    name: ClassVar[str] = "top-layers"
    saved_as: ClassVar[str] = "TopLayers"
    title: ClassVar[str] = "last layers"
    summary: ClassVar[str] = "the last layers"
    defaults: ClassVar[Mapping[str, object]] = {"count": 2}
    default_rate: ClassVar[float] = 1e-4

    count: int = dataclasses.field(metadata=flag("Number of layers"))
    within: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.count, "count")

    def own_labels(self, leaves: Leaves) -> LeafLabels:
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
                "the tree has no numbered layers, as in `layers/0/...` or `Block_0/...`. "
                "Layers stacked along an axis of a leaf can't be trained in part: take them apart "
                "(`lj.models.unstack_layers`), or name leaves in `FullFineTune(targets=...)`"
            )
        if self.within is None:
            if len(sizes) > 1:
                raise SelectionError(f"the tree has several stacks of layers, {known}: name one in `within`")
            return next(iter(sizes.items()))
        wanted = "/" + self.within.strip("/")
        found = [stack for stack in sizes if f"/{stack}".endswith(wanted)]
        if len(found) != 1:
            what = "no stack" if not found else "more than one stack"
            raise SelectionError(f"`within={self.within!r}` matches {what} of layers; the tree has {known}")
        return found[0], sizes[found[0]]
