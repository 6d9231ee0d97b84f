"""LoRA: a low-rank path beside each frozen weight."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from lora_jax.errors import ArgumentError
from lora_jax.paths import listed, path_key, shape_text
from lora_jax.weights import IN, OUT, AdaptedWeight, not_finite

from ..base import FROZEN, is_number, require
from ..targets import Target, WeightMethod, matching, overridden
from .starts import FROM_WEIGHT, STARTS, placed_start, start
from .weight import LoRAWeight, LowRankWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank adaptation: `h = x W + (α/r) · (x Aᵀ) B` with `W` frozen, `A` Gaussian and `B` zero at the start.

    For a weight of shape `(in, out)` it trains `a (r, in)` and `b (r, out)`, that is `r · (in + out)` numbers; for
    weights of more axes, `in` and `out` are the products of the axes so labelled. Factors are float32 whatever the
    base.

    Args:
        rank: `r`, at least 1 and at most `min(in, out)`. A target of a preset with less room gets what it has room for,
            with a warning.
        alpha: `α`; with `alpha == rank` the scale is 1.
        targets: which weights, see `selection.select`; or a preset: `"attention"` (query, key, value, or in GPT-2 the
            one weight of all three, and output), `"mlp"` (up, gate, down), `"all-linear"` (both). They know the bundled
            models' names. On a model of your own pass `uses`, and `"all-linear"` is every weight of a matmul or
            convolution, without embeddings and output heads; `"attention"` and `"mlp"` are, beside the bundled names,
            those of them within a module whose name says so (`self_attn`, `ffn`). Without `uses` a preset is refused
            where weights are left that may belong to it, going by their names and shapes: for `"all-linear"` all but
            embeddings, heads, poolers and norms; for the others those in modules of that kind, and where the bundled
            names are there in part only, also those of no bundled name.
        also_train: the head, see `Method`.
        dropout: probability of dropping each element of the low-rank path's input, in `[0, 1)`; acts after
            `with_dropout`. Lookups are not dropped.
        scaling: `"standard"` is `α/r`; `"rank_stabilized"` is `α/√r`.
        init: how the factors start. With `"gaussian"`, of standard deviation `1/r`, and `"kaiming"`, uniform in
            `±1/√in`, `a` is random and `b` zero. With `"pissa"`, the principal singular vectors of `W`
            (`starts.pissa`), and `"orthogonal"`, its QR decomposition (`starts.orthogonal`, OLoRA), the product
            `B₀ A₀` isn't zero: the base stays as it is, and what is computed is `W + scale · (B A − B₀ A₀)`, at the
            start the base's function. The frozen start is saved with the factors. A step costs what LoRA of rank `2r`
            costs, and that is what goes out to PEFT.
        freeze_a: train `b` alone, `r · out` numbers (LoRA-FA): `a` keeps its random start, has no gradient and no
            optimizer state, and `x` need not be kept for the backward pass.
        rank_overrides: other ranks for some of the targets, `{name: rank}`, names as in a sequence of `targets`.
        alpha_overrides: likewise for `alpha`.

    Raises:
        ValueError: a value is out of range, or (when used) a rank is larger than a weight allows, or the axes of a
            weight of more than two are unknown.
        SelectionError: (when used) an entry matches no weight, or a target is also a head; a preset finds no weight
            that factors can stand beside, or only a part of what it promises.

    Warns:
        UserWarning: (when used) a preset's target has less room than `rank`; or `uses` shows weights that a preset
            would take and factors can't stand beside. Each is named.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("query",))
        >>> params = lj.attach({"query": {"kernel": jnp.ones((8, 4))}}, method, key=jax.random.key(0))
        >>> params["query"]["kernel"].a.shape, params["query"]["kernel"].b.shape, params["query"]["kernel"].scale
        ((2, 8), (2, 4), 2.0)

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, equation 3.
        Rank-stabilized scaling: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023,
        arXiv:2312.03732. A frozen `A`: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language
        Models Fine-tuning", 2023, arXiv:2308.03303, section 3.1. A higher rate for `B` (LoRA+) is an option of
        `make_optimizer`. The starts from the weight have their sources in `starts.py`.

    Deviations:
        The paper's released code starts `A` with Kaiming's uniform; `"gaussian"` is what the paper states, with
        PEFT's standard deviation. `b` is stored transposed, `(r, out)`. PEFT starts an embedding's factors the other
        way round (A zero, B normal); here `a` is random and `b` zero everywhere. PiSSA and OLoRA subtract their
        start's product from the base; here the base is kept, so that `detach` gives it back bit for bit.
    """

    node: ClassVar[type[LowRankWeight]] = LoRAWeight

    rank: int
    alpha: float
    dropout: float = 0.0
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    init: Literal["gaussian", "kaiming", "pissa", "orthogonal"] = "gaussian"
    freeze_a: bool = False
    rank_overrides: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"rank": self.rank, **self.rank_overrides}.items():
            require(
                is_number(rank, int) and rank >= 1, f"`rank` must be an integer of at least 1, got {rank!r} for {name}"
            )
        for name, alpha in {"alpha": self.alpha, **self.alpha_overrides}.items():
            usable = is_number(alpha, float) and math.isfinite(alpha) and alpha > 0
            require(usable, f"`alpha` must be a positive number, got {alpha!r} for {name}")
        require(
            is_number(self.dropout, float) and 0 <= self.dropout < 1,
            f"`dropout` must be in [0, 1), got {self.dropout!r}",
        )
        scalings = ("standard", "rank_stabilized")
        require(self.scaling in scalings, f"`scaling` must be one of {scalings}, got {self.scaling!r}")
        require(self.init in STARTS, f"`init` must be one of {STARTS}, got {self.init!r}")
        require(isinstance(self.freeze_a, bool), f"`freeze_a` must be True or False, got {self.freeze_a!r}")

    def nodes(self, targets: list[Target], *, key: jax.Array) -> dict[str, AdaptedWeight]:
        ranks = self._ranks(targets)
        alphas = overridden(self.alpha, self.alpha_overrides, targets, "alpha_overrides")
        nodes: dict[str, AdaptedWeight] = {
            target.path: self._node(target, ranks[target.path], alphas[target.path], path_key(key, target.path))
            for target in targets
        }
        self._require_finite_start(nodes)
        return nodes

    def _require_finite_start(self, nodes: Mapping[str, AdaptedWeight]) -> None:
        """What starts from the weight is NaN in all its numbers where the weight has one, or squares that overflow."""
        names = (*(("a", "b") if self.init in FROM_WEIGHT else ()), *self.node.starts_from_weight)
        started = {(path, name): getattr(node, name) for path, node in nodes.items() for name in names}
        for path, name in not_finite(started):
            raise ArgumentError(
                f"the start of `{path}`'s `{name}` isn't finite, for the weight holds NaN, infinity, or numbers whose "
                f"squares exceed {nodes[path].dtype}'s or float32's range: mend the weight"
                + (f', or choose another `init` than "{self.init}"' if self.init in FROM_WEIGHT else "")
            )

    def _ranks(self, targets: list[Target]) -> dict[str, int]:
        """The rank of each target; of those that nobody has named, at most what the weight has room for."""
        ranks = overridden(self.rank, self.rank_overrides, targets, "rank_overrides")
        if not self.by_preset:
            return ranks
        room = {target.path: min(target.size(IN), target.size(OUT)) for target in targets}
        named = {path for entry in self.rank_overrides for path in matching(entry, targets, "rank_overrides")}
        narrow = {path: most for path, most in room.items() if most < ranks[path] and path not in named}
        if narrow and len(narrow) < len(targets):  # larger than every weight allows: a mistake, told with the first
            warnings.warn(
                f"`rank` {self.rank} is larger than some weights allow that `targets={self.targets!r}` has found, so "
                f"there it is less: {listed([f'{path} {most}' for path, most in narrow.items()])}. Say it in "
                "`rank_overrides`, or name the targets to leave them out",
                stacklevel=5,
            )
            return ranks | narrow
        return ranks

    def _node(self, target: Target, rank: int, alpha: float, key: jax.Array) -> LowRankWeight:
        fan_in, fan_out = target.size(IN), target.size(OUT)
        most = min(fan_in, fan_out)
        require(
            rank <= most,
            f"`rank` {rank} is larger than `{target.path}` allows: {shape_text(target.base)} labelled "
            f"{target.axes!r} is {fan_in} in by {fan_out} out, so at most {most}; give it a rank of its own, "
            f'`rank_overrides={{"{target.path}": {most}}}`',
        )
        scale = float(alpha / rank if self.scaling == "standard" else alpha / math.sqrt(rank))
        node = self.node(target.base, None, None, scale=scale, axes=target.axes, dropout=float(self.dropout))
        if places := node.placements():
            a, b = placed_start(self.init, key, target, rank, scale, (places["a"], places["b"]))
        else:
            a, b = start(self.init, key, target, rank, scale)
        node = dataclasses.replace(node, a=a, b=b)
        if self.init in FROM_WEIGHT:  # copies: a training step may donate the factors
            node = dataclasses.replace(node, start_a=jnp.copy(a), start_b=jnp.copy(b))
        return node

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        labels = super().own_labels(leaves)
        if not self.freeze_a:
            return labels
        return {path: dataclasses.replace(label, a=FROZEN) for path, label in labels.items()}

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        nodes = self.own_nodes(leaves)
        ranks = {f"/{path}": node.rank for path, node in nodes.items() if node.rank != self.rank}
        alphas = {}
        for path, node in nodes.items():
            alpha = node.scale * (node.rank if self.scaling == "standard" else math.sqrt(node.rank))
            if not math.isclose(alpha, self.alpha, rel_tol=1e-9):
                alphas[f"/{path}"] = alpha
        return dataclasses.replace(super().resolved(leaves), rank_overrides=ranks, alpha_overrides=alphas)
