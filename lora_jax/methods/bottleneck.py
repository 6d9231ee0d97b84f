"""Bottleneck adapters: two small layers after a sublayer, with a skip connection of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp

from ..paths import path_key
from ..types import LeafPath, Uses
from ..weights import AdaptedWeight
from . import dtypes
from .base import LeafLabels, Leaves, flag, require, require_positive
from .inserting_method import InsertedArray, InsertingMethod, Sublayer, sublayers
from .norm_tuning import NormTuning

Sublayers = Literal["houlsby", "pfeiffer"]

_DEVIATION = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(InsertingMethod):
    """Inserts `h ← h + gelu(h D + c) U + e` after the sublayers of every layer, and trains that and the head.

    `h (…, d)` is what a sublayer is about to add to the residual: its output, projected back to `d` features.
    `D (d, m)`, `c (m,)`, `U (m, d)` and `e (d,)` are new. `D` starts normal with standard deviation 0.01, truncated at
    two standard deviations; `U` and the biases start at zero, so that at first the function is the base's.

    `"houlsby"` inserts one after the attention and one after the MLP of each layer, `"pfeiffer"` one after the MLP.
    Each has `2 · m · d + m + d` parameters. Because of the nonlinearity they can't be merged into the base's weights:
    adapters stay in the model and cost time at inference, as small matmuls that wait for each other.

    Only the functions of `lora_jax.models` read what is inserted. `lj.merge_params` leaves it in place as plain arrays;
    `lj.detach` takes it out.

    Args:
        size: `m`, the width of the bottleneck.
        placement: Sublayers that are followed by an adapter, `"houlsby"` or `"pfeiffer"`.
        train_norms: Whether the layers' norms are trained too, `2 · d` parameters each, or `d` without a shift. `None`
            follows the papers: yes with `"houlsby"`, no with `"pfeiffer"`.
        also_train: The head, see `Method`.

    Raises:
        ValueError: `size` is no positive integer, `placement` neither of the two; (when used) the tree isn't that of a
            bundled model.

    Example:
        >>> import lora_jax as lj
        >>> attention, mlp = {"output": {"kernel": jnp.ones((4, 4))}}, {"down": {"kernel": jnp.ones((8, 4))}}
        >>> layer = {"attention": attention, "mlp": mlp}
        >>> method = lj.BottleneckAdapter(size=2, placement="pfeiffer")
        >>> tree = lj.attach({"layers": {"0": layer}}, method, key=jax.random.key(0))
        >>> print(lj.count_params(tree, lj.label_params(tree, method)))  # 2 · 2 · 4 + 2 + 4
        22 of 70 parameters are trained (31.4 %)

    Reference:
        Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751, section 2.1 and
        figure 2. Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021,
        arXiv:2005.00247, section 3.

    Deviations:
        `U` starts at zero rather than near it, so that the start is exactly the base's function. Pfeiffer et al. put
        theirs after the MLP's residual and norm, with a norm after it; here it has Houlsby's second position in every
        family, also where norms come first. The nonlinearity is gelu in both; Pfeiffer et al. use relu.
    """

    name: ClassVar[str] = "adapter"
    saved_as: ClassVar[str] = "BottleneckAdapter"
    title: ClassVar[str] = "bottleneck adapters"
    summary: ClassVar[str] = "bottlenecks after the sublayers"
    defaults: ClassVar[Mapping[str, object]] = {"size": 16, "placement": "houlsby"}

    size: int = dataclasses.field(default=64, metadata=flag("Width of the bottleneck"))
    placement: Sublayers = dataclasses.field(
        default="houlsby", metadata=flag("After attention and MLP (houlsby), or after the MLP alone (pfeiffer)")
    )
    train_norms: bool | None = dataclasses.field(
        default=None, metadata=flag("Train the layers' norms too; by default with houlsby only, as in the papers")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.size, "size")
        require(
            self.placement in get_args(Sublayers),
            f"`placement` must be one of {get_args(Sublayers)}, got {self.placement!r}",
        )
        require(
            self.train_norms is None or isinstance(self.train_norms, bool),
            f"`train_norms` must be True, False or None, got {self.train_norms!r}",
        )

    def attach(self, leaves: Leaves, *, key: jax.Array, uses: Uses | None) -> dict[LeafPath, AdaptedWeight]:
        del uses
        self._norms(leaves)  # refuses what can't be trained
        attentions, mlps = sublayers(leaves, self)
        followed = mlps if self.placement == "pfeiffer" else [*attentions, *mlps]
        nodes: dict[LeafPath, AdaptedWeight] = {}
        for sublayer in followed:
            nodes |= self._adapter(sublayer, key)
        return nodes

    def _adapter(self, sublayer: Sublayer, key: jax.Array) -> dict[LeafPath, InsertedArray]:
        path, stack, width = f"{sublayer.path}/adapter", sublayer.stack, sublayer.width
        down = jax.random.truncated_normal(path_key(key, path), -2, 2, (*stack, width, self.size), jnp.float32)

        def node(value: jax.Array, labels: str) -> InsertedArray:
            return InsertedArray(None, value, axes=sublayer.stack_axes + labels)

        return {
            f"{path}/down/kernel": node(_DEVIATION * down, "io"),
            f"{path}/down/bias": node(jnp.zeros((*stack, self.size), jnp.float32), "o"),
            f"{path}/up/kernel": node(jnp.zeros((*stack, self.size, width), jnp.float32), "io"),
            f"{path}/up/bias": node(jnp.zeros((*stack, width), jnp.float32), "o"),
        }

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        return dict.fromkeys(self._norms(leaves), NormTuning.label) | super().own_labels(leaves)

    def resolved(self, leaves: Leaves) -> Self:
        return dataclasses.replace(super().resolved(leaves), train_norms=bool(self._norms(leaves)))

    def _norms(self, leaves: Leaves) -> list[LeafPath]:
        """Paths of the layers' norms, if they are trained."""
        wanted = self.placement == "houlsby" if self.train_norms is None else self.train_norms
        layers = {sublayer.path.rpartition("/")[0] + "/" for sublayer in sublayers(leaves, self)[1]}
        members = NormTuning().members(leaves) if wanted else []
        norms = [path for path in members if any(path.startswith(layer) for layer in layers)]
        return dtypes.trained(leaves, norms, argument="train_norms")
