"""Bottleneck adapters: two small layers after a sublayer, with a skip of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp

from ..paths import path_key
from . import dtypes
from .base import is_number, require
from .inserted_arrays import InsertedArray, InsertingMethod, Sublayer, sublayers
from .norm_tuning import NormTuning

Placement = Literal["houlsby", "pfeiffer"]

_DEVIATION = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(InsertingMethod):
    """Inserts `h ← h + gelu(h D + c) U + e` after the sublayers of every layer, and trains that and the head.

    `h (…, d)` is what a sublayer is about to add to the residual: its output, projected back to `d` features. `D (d,
    m)`, `c (m,)`, `U (m, d)` and `e (d,)` are new; `D` starts normal with standard deviation 0.01, cut off at two of
    them, `U` and the biases at zero, so that at the start the function is the base's.

    `"houlsby"` has one after the attention and one after the MLP of each layer, `"pfeiffer"` one after the MLP. Each
    has `2 · m · d + m + d` parameters. A nonlinearity stands between them and the base's weights, so that there is
    nothing to merge: adapters stay in the model and cost time at inference, small matmuls that wait for each other.

    Only the functions of `lora_jax.models` read what is inserted. `lj.merge_params` leaves it in place as plain arrays;
    `lj.detach` takes it out.

    Args:
        size: `m`, the width of the bottleneck.
        placement: `"houlsby"` or `"pfeiffer"`.
        train_norms: whether the layers' norms learn too, `2 · d` parameters each, or `d` without a shift. `None`: as in
            the papers, with `"houlsby"` yes, with `"pfeiffer"` no.
        also_train: the head, see `Method`.

    Raises:
        ValueError: `size` is no positive integer, `placement` none of the two; (when used) the tree isn't that of a
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
        `U` starts at zero rather than near it: the start is the base's function exactly. Pfeiffer et al. put theirs
        after the MLP's residual and norm, with a norm after it; here it has Houlsby's second place in every family,
        also where norms come first. The nonlinearity is gelu in both, where Pfeiffer et al. have relu.
    """

    size: int = 64
    placement: Placement = "houlsby"
    train_norms: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.size, int) and self.size >= 1, f"`size` must be an integer of at least 1, got {self.size!r}"
        )
        require(
            self.placement in get_args(Placement),
            f"`placement` must be one of {get_args(Placement)}, got {self.placement!r}",
        )
        require(
            self.train_norms is None or isinstance(self.train_norms, bool),
            f"`train_norms` must be true, false or None, got {self.train_norms!r}",
        )

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        del uses
        self._norms(leaves)  # refuses what can't be trained
        attentions, mlps = sublayers(leaves, self)
        places = mlps if self.placement == "pfeiffer" else [*attentions, *mlps]
        nodes: dict[str, Any] = {}
        for place in places:
            nodes |= self._adapter(place, key)
        return nodes

    def _adapter(self, place: Sublayer, key: jax.Array) -> dict[str, InsertedArray]:
        path, stack = f"{place.path}/adapter", place.stack
        down = jax.random.truncated_normal(path_key(key, path), -2, 2, (*stack, place.width, self.size), jnp.float32)

        def node(value: jax.Array, labels: str) -> InsertedArray:
            return InsertedArray(None, value, axes=place.stack_axes + labels)

        return {
            f"{path}/down/kernel": node(_DEVIATION * down, "io"),
            f"{path}/down/bias": node(jnp.zeros((*stack, self.size), jnp.float32), "o"),
            f"{path}/up/kernel": node(jnp.zeros((*stack, self.size, place.width), jnp.float32), "io"),
            f"{path}/up/bias": node(jnp.zeros((*stack, place.width), jnp.float32), "o"),
        }

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self._norms(leaves), NormTuning.label) | super().own_labels(leaves)

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        return dataclasses.replace(super().resolved(leaves), train_norms=bool(self._norms(leaves)))

    def _norms(self, leaves: Mapping[str, Any]) -> list[str]:
        """Those of the layers."""
        wanted = self.placement == "houlsby" if self.train_norms is None else self.train_norms
        layers = {place.path.rpartition("/")[0] + "/" for place in sublayers(leaves, self)[1]}
        members = NormTuning().members(leaves) if wanted else []
        norms = [path for path in members if any(path.startswith(layer) for layer in layers)]
        return dtypes.trained(leaves, norms, argument="train_norms")
