"""LoRA: a low-rank path beside each frozen weight."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp

from lora_jax.errors import ArgumentError
from lora_jax.paths import listed, path_key, shape_text
from lora_jax.types import LeafPath
from lora_jax.weights import IN, OUT, AdaptedWeight, not_finite

from ..base import FROZEN, LeafLabels, Leaves, flag, is_number, require, require_positive, require_probability
from ..weight_method import TargetWeight, WeightMethod, matching, overridden
from .starts import FROM_WEIGHT, placed_start, start
from .weight import LoRAWeight, LowRankWeight

Scaling = Literal["standard", "rank_stabilized"]
Start = Literal["gaussian", "kaiming", "pissa", "orthogonal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank adaptation: `h = x W + (α/r) · (x Aᵀ) B` with `W` frozen, `A` Gaussian and `B` zero at the start.

    For a weight of shape `(in, out)` it trains `a (r, in)` and `b (r, out)`, `r · (in + out)` parameters; for weights
    of more axes, `in` and `out` are the products of the axes so labelled. Factors are always float32.

    Args:
        rank: `r`, at least 1 and at most `min(in, out)`. A target of a preset that allows less gets the largest rank
            that it allows, with a warning.
        alpha: `α`; with `alpha == rank` the scale is 1.
        targets: Weights to adapt, see `selection.select`; or a preset: `"attention"` (query, key, value, in GPT-2 the
            fused weight of all three; and output), `"mlp"` (up, gate, down), `"all-linear"` (both). Presets know the
            bundled models' names. On a model of your own pass `uses`: then `"all-linear"` is every weight of a matmul
            or convolution, without embeddings and output heads; `"attention"` and `"mlp"` are, beside the bundled
            names, those of them within a module whose name says so (`self_attn`, `ffn`). Without `uses` a preset is
            refused if weights are left over that may belong to it, judging by their names and shapes: for
            `"all-linear"` all but embeddings, heads, poolers and norms; for the others those in modules of that kind,
            and if only some of the bundled names are there, also those without a bundled name.
        also_train: The head, see `Method`.
        dropout: Probability of dropping each element of the low-rank path's input, in `[0, 1)`; acts after
            `with_dropout`. The inputs of lookups are not dropped.
        scaling: Scale of the low-rank path: `"standard"` is `α/r`, `"rank_stabilized"` is `α/√r`.
        init: Initial factors. With `"gaussian"`, of standard deviation `1/r`, and `"kaiming"`, uniform in `±1/√in`, `a`
            is random and `b` zero. With `"pissa"`, the principal singular vectors of `W` (`starts.pissa`), and
            `"orthogonal"`, its QR decomposition (`starts.orthogonal`, OLoRA), the product `B₀ A₀` isn't zero. The base
            stays unchanged, and the weight is `W + scale · (B A − B₀ A₀)`, at the start the base's. The frozen start is
            saved with the factors. A step costs as much as LoRA of rank `2r`, and PEFT gets a LoRA of that rank.
        freeze_a: Whether to train `b` alone, `r · out` parameters (LoRA-FA): `a` keeps its random start, has no
            gradient and no optimizer state, and `x` needn't be kept for the backward pass.
        rank_overrides: Other ranks for some of the targets, `{name: rank}`, with names as in a sequence of `targets`.
        alpha_overrides: Other values of `alpha`, likewise.

    Raises:
        ValueError: A value is out of range, or (when used) a rank is larger than a weight allows, or the axes of a
            weight of more than two are unknown.
        SelectionError: (When used.) An entry matches no weight, or a target is also a head; a preset finds no weight
            that factors can stand beside, or only some of those that it promises.

    Warns:
        UserWarning: (When used.) A preset's target allows less than `rank`; or `uses` shows weights that a preset
            would select and factors can't stand beside. Each is named.

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
        `make_optimizer`. `starts.py` has the sources of the starts from the weight.

    Deviations:
        The paper's released code starts `A` with Kaiming's uniform; `"gaussian"` is what the paper states, with
        PEFT's standard deviation. `b` is stored transposed, `(r, out)`. PEFT starts an embedding's factors the other
        way round (A zero, B normal); here `a` is random and `b` zero everywhere. PiSSA and OLoRA subtract their
        start's product from the base; here the base is kept, so that `detach` gives it back bit for bit.
    """

    name: ClassVar[str] = "lora"
    saved_as: ClassVar[str] = "LoRA"
    title: ClassVar[str] = "LoRA"
    summary: ClassVar[str] = "low-rank factors (default)"
    defaults: ClassVar[Mapping[str, object]] = {"rank": 8, "alpha": 16.0, "targets": "all-linear"}
    node: ClassVar[type[LowRankWeight]] = LoRAWeight

    rank: int = dataclasses.field(metadata=flag("Rank of the factors"))
    alpha: float = dataclasses.field(metadata=flag("Numerator of the updates' scale, alpha / rank"))
    dropout: float = dataclasses.field(
        default=0.0, metadata=flag("Dropout probability of the factors' input", name="lora-dropout")
    )
    scaling: Scaling = dataclasses.field(
        default="standard", metadata=flag("Scale of the updates, alpha / rank or alpha / √rank")
    )
    init: Start = dataclasses.field(
        default="gaussian", metadata=flag("Initial factors: random (gaussian, kaiming), or from the weight")
    )
    freeze_a: bool = dataclasses.field(default=False, metadata=flag("Train the factor b alone (LoRA-FA)"))
    rank_overrides: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"rank": self.rank, **self.rank_overrides}.items():
            require_positive(rank, "rank", f" for {name}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_overrides}.items():
            usable = is_number(alpha, float) and math.isfinite(alpha) and alpha > 0
            require(usable, f"`alpha` must be a positive number, got {alpha!r} for {name}")
        require_probability(self.dropout, "dropout")
        for argument, value, choices in (
            ("scaling", self.scaling, get_args(Scaling)),
            ("init", self.init, get_args(Start)),
        ):
            require(value in choices, f"`{argument}` must be one of {choices}, got {value!r}")
        require(isinstance(self.freeze_a, bool), f"`freeze_a` must be True or False, got {self.freeze_a!r}")

    @classmethod
    def comparison_defaults(cls, options: Mapping[str, object]) -> Mapping[str, object]:
        """One learning rate suits all ranks with `alpha` of twice the rank, and with the start of the authors' code and
        PEFT: the Gaussian start's deviation, 1/r, makes a rate that suits one rank too high for a lower one."""
        rank = options.get("rank")
        return {"init": "kaiming"} | ({"alpha": 2.0 * rank} if isinstance(rank, int) else {})

    def learning_rate(self, task: str) -> float:
        """The rate that suits PEFT's start on all linear layers, 1e-3; on one or two kinds of weights twice as much.

        A Gaussian `a` starts some four times as large, so that the same rate moves the product further: 1e-3 on all
        linear layers has diverged with it (SST-2). It and the starts from the weight take half.
        """
        rate = super().learning_rate(task)
        if task == "causal-lm":
            return rate
        few = not isinstance(self.targets, str) and not callable(self.targets) and len(self.targets) <= 2
        rate = 2 * rate if few else rate
        return rate if self.init == "kaiming" else rate / 2

    def nodes(self, targets: list[TargetWeight], *, key: jax.Array) -> dict[LeafPath, AdaptedWeight]:
        ranks = self._ranks(targets)
        alphas = overridden(self.alpha, self.alpha_overrides, targets, "alpha_overrides")
        nodes: dict[LeafPath, AdaptedWeight] = {
            target.path: self._node(target, ranks[target.path], alphas[target.path], path_key(key, target.path))
            for target in targets
        }
        self._require_finite_start(nodes)
        return nodes

    def _require_finite_start(self, nodes: Mapping[LeafPath, AdaptedWeight]) -> None:
        """A start from a weight that holds NaN, or numbers whose squares overflow, is NaN throughout."""
        names = (*(("a", "b") if self.init in FROM_WEIGHT else ()), *self.node.starts_from_weight)
        started = {(path, name): getattr(node, name) for path, node in nodes.items() for name in names}
        for path, name in not_finite(started):
            dtypes = dict.fromkeys([str(nodes[path].dtype), "float32"])
            raise ArgumentError(
                f"the start of `{path}`'s `{name}` isn't finite, since the weight holds NaN, infinity, or numbers "
                f"whose squares exceed the range of {' or '.join(dtypes)}: fix the weight"
                + (f', or choose another `init` than "{self.init}"' if self.init in FROM_WEIGHT else "")
            )

    def _ranks(self, targets: list[TargetWeight]) -> dict[LeafPath, int]:
        """The rank of each target; without a rank of its own, a preset's target gets at most what it allows."""
        ranks = overridden(self.rank, self.rank_overrides, targets, "rank_overrides")
        if not self.by_preset:
            return ranks
        limits = {target.path: min(target.size(IN), target.size(OUT)) for target in targets}
        named = {path for entry in self.rank_overrides for path in matching(entry, targets, "rank_overrides")}
        narrow = {path: most for path, most in limits.items() if most < ranks[path] and path not in named}
        if narrow and len(narrow) < len(targets):  # larger than every weight allows: an error, raised with the first
            warnings.warn(
                f"`rank` {self.rank} is more than some weights of `targets={self.targets!r}` allow, so they get less: "
                f"{listed([f'{path} {most}' for path, most in narrow.items()])}. Set their ranks in `rank_overrides`, "
                "or name the targets to leave them out",
                stacklevel=5,
            )
            return ranks | narrow
        return ranks

    def _node(self, target: TargetWeight, rank: int, alpha: float, key: jax.Array) -> LowRankWeight:
        fan_in, fan_out = target.size(IN), target.size(OUT)
        most = min(fan_in, fan_out)
        require(
            rank <= most,
            f"`rank` {rank} is larger than `{target.path}` allows: {shape_text(target.base)} labelled "
            f"{target.axes!r} is {fan_in} in by {fan_out} out, so at most {most}; give it a rank of its own, "
            f'`rank_overrides={{"{target.path}": {most}}}`',
        )
        scale = float(alpha / rank if self.scaling == "standard" else alpha / math.sqrt(rank))
        node = self.node.bare(target.base, scale=scale, axes=target.axes, dropout=float(self.dropout))
        if shardings := node.placements():
            a, b = placed_start(self.init, key, target, rank, scale, (shardings["a"], shardings["b"]))
        else:
            a, b = start(self.init, key, target, rank, scale)
        node = dataclasses.replace(node, a=a, b=b)
        if self.init in FROM_WEIGHT:  # copies: a training step may donate the factors
            node = dataclasses.replace(node, start_a=jnp.copy(a), start_b=jnp.copy(b))
        return node

    def own_labels(self, leaves: Leaves) -> LeafLabels:
        labels = super().own_labels(leaves)
        if not self.freeze_a:
            return labels
        return {path: dataclasses.replace(label, a=FROZEN) for path, label in labels.items()}

    def resolved(self, leaves: Leaves) -> Self:
        nodes = self.own_nodes(leaves)
        ranks = {f"/{path}": node.rank for path, node in nodes.items() if node.rank != self.rank}
        alphas = {}
        for path, node in nodes.items():
            alpha = node.scale * (node.rank if self.scaling == "standard" else math.sqrt(node.rank))
            if not math.isclose(alpha, self.alpha, rel_tol=1e-9):
                alphas[f"/{path}"] = alpha
        return dataclasses.replace(super().resolved(leaves), rank_overrides=ranks, alpha_overrides=alphas)
