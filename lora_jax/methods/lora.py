"""LoRA: a low-rank path beside each frozen weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax import lax

from ..matmul import Strategy, choose_strategy, low_rank_matmul, low_rank_product, merged_matmul
from ..paths import SelectionError, Selector, matches_entry, path_key, select, shape_text
from ..weights import (
    IN,
    OUT,
    STACK,
    AdaptedWeight,
    ConvSpec,
    DotSpec,
    RaggedDotSpec,
    TakeSpec,
    Unfactorable,
    register,
    wider,
)
from .base import Method, is_number, is_weight, require, require_selector, rooted

_ATTENTION = tuple(f"attention/{name}" for name in ("query", "key", "value", "query_key_value", "output"))
_MLP = tuple(f"mlp/{name}" for name in ("up", "gate", "down"))
_PRESETS = {"attention": _ATTENTION, "mlp": _MLP, "all-linear": _ATTENTION + _MLP}
# Modules that map to the output's vocabulary or classes; `"all-linear"` leaves them alone, as PEFT does.
_OUTPUT_HEADS = ("lm_head", "head", "classifier", "score", "logits", "unembed", "output_projection")


@register
@dataclasses.dataclass(frozen=True)
class LoRAWeight(AdaptedWeight):
    """`W + scale · B A` as a pytree node.

    The paper writes `h = W x + (α/r) B A x` with column vectors. Here `a` is the paper's `A`, which reduces, and `b`
    is the paper's `B` transposed, which expands; activations are rows, so `h = x W + scale · (x aᵀ) b`.

    Attributes:
        base: the frozen weight, any number of axes.
        a: shape `(stack…, r, in…)`, float32; the base's axes labelled `i`, in the base's order.
        b: shape `(stack…, r, out…)`, float32.
        key: random key of the dropout, one per member of the stack; `None` switches dropout off.
        scale: `α/r`, or `α/√r`.
        axes: one label per base axis: `i` in, `o` out, `s` stack.
        dropout: probability with which each element of the low-rank path's input is dropped.
    """

    fields: ClassVar[dict[str, str]] = {"a": "sri", "b": "sro", "key": "s"}
    saved: ClassVar[tuple[str, ...]] = ("a", "b")

    a: Any
    b: Any
    key: Any = None
    scale: float = dataclasses.field(kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"`dropout` must be in [0, 1), got {self.dropout!r}")

    @property
    def rank(self) -> int:
        return self.a.shape[self.axes.count(STACK)]

    def delta(self) -> jax.Array:
        """`scale · B A` in the base's layout, float32."""
        stack, i, o = (self._places(label) for label in (STACK, IN, OUT))
        product = low_rank_product(self.a * self.scale, self.b, len(stack))
        order = stack + i + o
        return lax.transpose(product, [order.index(axis) for axis in range(len(order))])

    def merge(self) -> jax.Array:
        wide = wider(self.base.dtype, jnp.float32)
        return (self.base.astype(wide) + self.delta().astype(wide)).astype(self.base.dtype)

    def label(self, method_labels: bool) -> Self:
        a, b = ("lora_a", "lora_b") if method_labels else ("frozen", "frozen")
        return dataclasses.replace(self, base="frozen", a=a, b=b, key=None if self.key is None else "frozen")

    def times(self, factor: jax.Array) -> Self:
        return dataclasses.replace(self, base=self.base * factor, b=self.b * factor.astype(self.b.dtype))

    def with_key(self, key: jax.Array | None) -> Self:
        if self.dropout == 0:
            key = None
        stack = self.a.shape[: self.axes.count(STACK)]
        if key is not None and stack:
            key = jax.random.split(key, stack)
        return dataclasses.replace(self, key=key)

    def for_use(self, number: Any) -> Self:
        if self.key is None:
            return self
        fold = jnp.vectorize(jax.random.fold_in, excluded={1})
        return dataclasses.replace(self, key=fold(self.key, number))

    # A function of its own in the program: traced, differentiated and lowered once for all weights of equal shapes.
    @functools.partial(jax.jit, static_argnames=("spec", "run"))
    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        self._direction(spec.weight_contract)  # refuses what the factors cannot follow
        if any(self.axes[axis] != STACK for axis in spec.weight_batch):
            raise Unfactorable("an axis that is not a stack axis is a batch axis of the matmul")

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return dataclasses.replace(self, a=a, b=b)._low_rank_dot(x, spec)

        def merge(base: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return dataclasses.replace(self, base=base, a=a, b=b).merge()

        if self._strategy(other, spec) == "merged_weight":
            return merged_matmul(other, self.base, self.a, self.b, run=run, merge=merge, low_rank=low_rank)
        base_out = run(self.base, other)
        return base_out + low_rank(self._dropped(other), self.a, self.b).astype(base_out.dtype)

    def _strategy(self, other: jax.Array, spec: DotSpec) -> Strategy:
        dropped = self.key is not None and self.dropout > 0
        # Below float32, or under an algorithm that rounds its operands, a small update is lost in the merged weight.
        exact = all(array.dtype == jnp.float32 for array in (self.base, other, self.a, self.b)) and not isinstance(
            spec.precision, lax.DotAlgorithm | lax.DotAlgorithmPreset
        )
        every_token_meets_every_member = len(spec.weight_batch) < self.axes.count(STACK)
        if dropped or not exact or every_token_meets_every_member:
            return "low_rank_first"
        if spec.strategy is not None:
            return spec.strategy
        tokens = [axis for axis in range(other.ndim) if axis not in spec.other_contract + spec.other_batch]
        inner = [self.shape[axis] for axis in spec.weight_contract]
        outer = [self.shape[axis] for axis in range(self.ndim) if axis not in spec.weight_contract + spec.weight_batch]
        return choose_strategy(
            math.prod(other.shape[axis] for axis in tokens),
            math.prod(inner),
            math.prod(outer),
            dtype=self.dtype,
            backend=jax.default_backend(),
        )

    def _low_rank_dot(self, other: jax.Array, spec: DotSpec) -> jax.Array:
        """The low-rank path of a `dot_general`, in its output's layout."""
        label, reduce, expand = self._direction(spec.weight_contract)
        # Every array is brought to `low_rank_matmul`'s shape: one axis of tokens, one contracted axis, before them one
        # batch axis for the stack axes that the matmul batches, and one for those it does not: they meet every token.
        batched = list(spec.weight_batch)
        loose = [axis for axis in self._places(STACK) if axis not in batched]
        expanded = self._places(OUT if label == IN else IN)
        contracted = self._places(label)
        pairs = dict(zip(spec.weight_contract, spec.other_contract, strict=True))
        free = [axis for axis in range(other.ndim) if axis not in spec.other_contract + spec.other_batch]

        def size(axes: Sequence[int]) -> int:
            return math.prod(self.shape[axis] for axis in axes)

        stack = [size(axes) for axes in (batched, loose) if axes]
        stack_order = [self._places(STACK).index(axis) for axis in batched + loose]
        tokens_and_k = (math.prod(other.shape[axis] for axis in free), size(contracted))
        compute = wider(other.dtype, self.dtype)
        x = _arranged(other, [*spec.other_batch, *free, *(pairs[axis] for axis in contracted)])
        x = x.reshape(*([size(batched)] if batched else []), *([1] if loose else []), *tokens_and_k)
        x = jnp.broadcast_to(x.astype(compute), (*stack, *tokens_and_k))

        def factor(array: jax.Array, axes: Sequence[int]) -> jax.Array:
            array = _arranged(array, stack_order + list(range(len(stack_order), array.ndim)))
            return array.reshape(*stack, self.rank, size(axes)).astype(compute)

        reduce, expand = factor(reduce, contracted), factor(expand, expanded)
        y = low_rank_matmul(x, reduce, expand, scale=self.scale, precision=spec.precision)

        # Back to the order of `dot_general`: batch axes, free axes of the left operand, free axes of the right one.
        shape = [self.shape[axis] for axis in batched + loose] + [other.shape[axis] for axis in free]
        y = y.reshape(shape + [self.shape[axis] for axis in expanded])
        place = {axis: index + len(batched) for index, axis in enumerate(loose)}
        place |= {axis: index + len(shape) for index, axis in enumerate(expanded)}
        tokens = list(range(len(batched) + len(loose), len(shape)))
        weight = [place[axis] for axis in sorted(place)]
        return _arranged(y, [*range(len(batched)), *(weight + tokens if spec.weight_is_lhs else tokens + weight)])

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        if self._places(STACK):
            raise Unfactorable("a lookup in a stacked weight")
        _, reduce, expand = self._direction((spec.axis,))
        # The same lookup in the factor's columns: (…, r), then out along the other axes of the weight. What an index
        # out of bounds is filled with comes from the base's lookup; its row here adds nothing.
        dimensions = lax.GatherDimensionNumbers(
            offset_dims=(indices.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        rows = lax.gather(reduce.T, indices, dimensions, (1, self.rank), mode=spec.mode, fill_value=0)
        base_out = run(self.base)
        rows = (rows * self.scale).astype(base_out.dtype).reshape(-1, self.rank)
        y = rows @ expand.reshape(self.rank, -1).astype(base_out.dtype)
        y = y.reshape(indices.shape[:-1] + expand.shape[1:])
        lookup = indices.ndim - 1
        y = jnp.moveaxis(y, range(lookup, y.ndim), spec.offset_dims)
        return base_out + y

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        if self._places(OUT) != [spec.kernel_out] or self._places(STACK):
            raise Unfactorable(f"the labels {self.axes!r} do not fit a kernel whose output axis is {spec.kernel_out}")
        base_out = run(self.base)
        compute = wider(other.dtype, self.dtype)
        kernel = jnp.moveaxis(self.a, 0, spec.kernel_out).astype(compute)
        hidden = lax.conv_general_dilated_p.bind(self._dropped(other).astype(compute), kernel, **spec.params)
        # As in `low_rank_matmul`: positions flattened into one axis, the rank before it.
        hidden = jnp.moveaxis(hidden * self.scale, spec.output_feature, 0)
        positions, hidden = hidden.shape[1:], hidden.reshape(self.rank, -1).astype(compute)
        y = lax.dot_general(hidden, self.b.astype(compute), (((0,), (0,)), ((), ())), spec.params["precision"])
        y = y.reshape(*positions, y.shape[-1])
        return base_out + jnp.moveaxis(y, -1, spec.output_feature).astype(base_out.dtype)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        _, reduce, expand = self._direction((spec.weight_contract,))
        if self._places(STACK) != [spec.weight_group] or self.ndim != 3:
            raise Unfactorable(f"the labels {self.axes!r} do not fit a ragged matmul over axis {spec.weight_group}")
        base_out = run(self.base)
        compute = wider(other.dtype, self.dtype)
        x, reduce, expand = self._dropped(other).astype(compute), reduce.astype(compute), expand.astype(compute)
        hidden = lax.ragged_dot(x, reduce.swapaxes(1, 2), sizes, precision=spec.precision)
        y = lax.ragged_dot(hidden * self.scale, expand, sizes, precision=spec.precision)
        return base_out + y.astype(base_out.dtype)

    def _places(self, label: str) -> list[int]:
        return [axis for axis, own in enumerate(self.axes) if own == label]

    def _direction(self, contracted: Sequence[int]) -> tuple[str, jax.Array, jax.Array]:
        """The label whose axes are contracted, the factor that carries them, and the other one."""
        for label, reduce, expand in ((IN, self.a, self.b), (OUT, self.b, self.a)):
            if sorted(contracted) == self._places(label):
                return label, reduce, expand
        raise Unfactorable(f"axes {tuple(sorted(contracted))} of a weight labelled {self.axes!r} are contracted")

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or self.dropout == 0:
            return x
        key = self.key.reshape(-1)[0] if self.key.ndim else self.key
        # Under `shard_map` each shard holds other rows, so each draws its own mask.
        for name in sorted(jax.typeof(x).manual_axis_type.varying):
            key = jax.random.fold_in(key, lax.axis_index(name))
        kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros((), x.dtype))


def _arranged(array: jax.Array, order: list[int]) -> jax.Array:
    return array if order == list(range(array.ndim)) else lax.transpose(array, order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation: `h = x W + (α/r) · (x Aᵀ) B` with `W` frozen, `A` Gaussian and `B` zero at the start.

    For a weight of shape `(in, out)` it trains `a (r, in)` and `b (r, out)`, that is `r · (in + out)` numbers; for
    weights of more axes, `in` and `out` are the products of the axes so labelled. Factors are float32 whatever the
    base.

    Args:
        rank: `r`, at least 1 and at most `min(in, out)`.
        alpha: `α`; with `alpha == rank` the scale is 1.
        targets: which weights, see `paths.select`; or a preset. `"attention"` (query, key, value, or in GPT-2 the
            one weight of all three, and output), `"mlp"` (up, gate, down) and `"all-linear"` (both) know the bundled
            models' names. On a model of your own, `"all-linear"` reads `uses`: every weight of a matmul or convolution,
            without embeddings and output heads.
        also_train: the head, see `Method`.
        dropout: probability of dropping each element of the low-rank path's input, in `[0, 1)`; acts after
            `with_dropout`. Lookups are not dropped.
        scaling: `"standard"` is `α/r`; `"rank_stabilized"` is `α/√r`.
        init: how `a` starts: `"gaussian"` has standard deviation `1/r`; `"kaiming"` is uniform in `±1/√in`. `b`
            starts at zero.
        rank_overrides: other ranks for some of the targets, `{name: rank}`, names as in a sequence of `targets`.
        alpha_overrides: likewise for `alpha`.

    Raises:
        ValueError: a value is out of range, or (when used) a rank is larger than a weight allows, or the axes of a
            weight of more than two are unknown.
        SelectionError: (when used) an entry matches no weight, or a target is also a head.

    Example:
        >>> import lora_jax as lj
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("query",))
        >>> params = lj.attach({"query": {"kernel": jnp.ones((8, 4))}}, method, key=jax.random.key(0))
        >>> params["query"]["kernel"].a.shape, params["query"]["kernel"].b.shape, params["query"]["kernel"].scale
        ((2, 8), (2, 4), 2.0)

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, equation 3.
        Rank-stabilized scaling: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023,
        arXiv:2312.03732.

    Deviations:
        The paper's released code starts `A` with Kaiming's uniform; `"gaussian"` is what the paper states, with
        PEFT's standard deviation. `b` is stored transposed, `(r, out)`. PEFT starts an embedding's factors the other
        way round (A zero, B normal); here `a` is random and `b` zero everywhere.
    """

    rank: int
    alpha: float
    targets: Selector
    dropout: float = 0.0
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    init: Literal["gaussian", "kaiming"] = "gaussian"
    rank_overrides: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_selector(self.targets, "targets")
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
        scalings, starts = ("standard", "rank_stabilized"), ("gaussian", "kaiming")
        require(self.scaling in scalings, f"`scaling` must be one of {scalings}, got {self.scaling!r}")
        require(self.init in starts, f"`init` must be one of {starts}, got {self.init!r}")

    def selected(self, leaves: Mapping[str, Any], uses: Mapping[str, Any] | None = None) -> list[str]:
        """Paths of the weights that get factors."""
        preset = _PRESETS.get(self.targets) if isinstance(self.targets, str) else None
        if preset is None:
            return select(leaves, self.targets, argument="targets", eligible=is_weight, kind="weight")
        heads = set(self.head(leaves))
        if self.targets == "all-linear" and uses is not None:
            return [path for path in leaves if path not in heads and _is_linear(path, uses)]
        found = [
            path
            for path, leaf in leaves.items()
            if path not in heads and is_weight(path, leaf) and any(matches_entry(path, entry) for entry in preset)
        ]
        if not found:
            raise SelectionError(
                f"`targets={self.targets!r}` knows the bundled models' names ({', '.join(preset)}), and this tree has "
                'none of them: name the modules, or pass `targets="all-linear"` with '
                "`uses=lj.trace_weights(fn, params, ...)`"
            )
        return found

    def attach(self, leaves: Mapping[str, Any], *, key: jax.Array, uses: Mapping[str, Any] | None) -> dict[str, Any]:
        chosen = self.selected(leaves, uses)
        both = sorted(set(chosen) & set(self.head(leaves)))
        if both:
            raise SelectionError(
                f"`targets` and `also_train` both select {', '.join(both)}: train it in full or by factors"
            )
        ranks = self._overridden(self.rank, self.rank_overrides, chosen, "rank_overrides")
        alphas = self._overridden(self.alpha, self.alpha_overrides, chosen, "alpha_overrides")
        return {
            path: self._node(path, leaves[path], _labels(path, leaves[path], uses), ranks[path], alphas[path], key)
            for path in chosen
        }

    def _node(self, path: str, base: Any, axes: str, rank: int, alpha: float, key: jax.Array) -> LoRAWeight:
        def sizes(label: str) -> tuple[int, ...]:
            return tuple(size for size, own in zip(base.shape, axes, strict=True) if own == label)

        fan_in, fan_out = math.prod(sizes(IN)), math.prod(sizes(OUT))
        most = min(fan_in, fan_out)
        require(
            rank <= most,
            f"`rank` {rank} is larger than `{path}` allows: {shape_text(base)} labelled {axes!r} is {fan_in} in by "
            f"{fan_out} out, so at most {most}",
        )
        shape = (*sizes(STACK), rank, *sizes(IN))

        def start(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            if self.init == "gaussian":
                a = jax.random.normal(key, shape, jnp.float32) / rank
            else:
                a = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) / math.sqrt(fan_in)
            return a, jnp.zeros((*sizes(STACK), rank, *sizes(OUT)), jnp.float32)

        scale = alpha / rank if self.scaling == "standard" else alpha / math.sqrt(rank)
        node = LoRAWeight(base, None, None, scale=float(scale), axes=axes, dropout=float(self.dropout))
        if places := node.placements():
            start = jax.jit(start, out_shardings=(places["a"], places["b"]))
        a, b = start(path_key(key, path))
        return dataclasses.replace(node, a=a, b=b)

    def _overridden(
        self, default: Any, overrides: Mapping[str, Any], chosen: list[str], argument: str
    ) -> dict[str, Any]:
        values = dict.fromkeys(chosen, default)
        owner: dict[str, str] = {}
        for entry, value in overrides.items():
            matched = [path for path in chosen if matches_entry(path, entry)]
            if not matched:
                raise SelectionError(f"`{argument}` entry {entry!r} matches none of the targets: {', '.join(chosen)}")
            for path in matched:
                if path in owner:
                    raise SelectionError(f"`{argument}` entries {owner[path]!r} and {entry!r} both match {path}")
                owner[path], values[path] = entry, value
        return values

    def own_labels(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        labels = {path: leaf.label(True) for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
        require(
            bool(labels),
            "the tree has no LoRA factors: make them with `lj.attach(params, method, key=...)` and label its result",
        )
        return labels

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        nodes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
        rooted_paths = rooted(list(nodes))
        ranks = {f"/{path}": node.rank for path, node in nodes.items() if node.rank != self.rank}
        alphas = {}
        for path, node in nodes.items():
            alpha = node.scale * (node.rank if self.scaling == "standard" else math.sqrt(node.rank))
            if not math.isclose(alpha, self.alpha, rel_tol=1e-9):
                alphas[f"/{path}"] = alpha
        return dataclasses.replace(
            super().resolved(leaves), targets=rooted_paths, rank_overrides=ranks, alpha_overrides=alphas
        )


def _labels(path: str, leaf: Any, uses: Mapping[str, Any] | None) -> str:
    use = (uses or {}).get(path)
    if use is not None and use.labels is not None:
        require(
            len(use.labels) == len(leaf.shape) and not set(use.labels) - {IN, OUT, STACK},
            f"`uses` labels `{path}` {shape_text(leaf)} with {use.labels!r}: one of i, o, s for each axis",
        )
        return use.labels
    if use is None and len(leaf.shape) == 2:
        return IN + OUT
    why = f" ({use.reason})" if use is not None else ""
    raise ValueError(
        f"the roles of the axes of `{path}` {shape_text(leaf)} are unknown{why}: pass "
        "`uses=lj.trace_weights(fn, params, ...)`, or "
        f'`uses={{"{path}": lj.Use("dot_general", labels)}}` with one label an axis (i in, o out, s stack)'
    )


def _is_linear(path: str, uses: Mapping[str, Any]) -> bool:
    use = uses.get(path)
    linear = (
        use is not None
        and use.labels is not None
        and use.op in ("dot_general", "conv_general_dilated", "ragged_dot_general")
    )
    return linear and not any(matches_entry(path, head) for head in _OUTPUT_HEADS)
