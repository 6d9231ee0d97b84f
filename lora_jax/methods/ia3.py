"""(IA)³: a trained factor for each output, or each input, of a frozen weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ..errors import ArgumentError
from ..selection import Selector
from ..types import LeafPath
from ..weights import (
    IN,
    OUT,
    STACK,
    AdaptedWeight,
    ConvSpec,
    DotSpec,
    FactoredWeight,
    RaggedDotSpec,
    TakeSpec,
    labelled,
    own_function,
    register,
)
from .base import Leaves, flag, require, require_selector, rooted
from .scaling import scaled, scaled_conv, scaled_dot, scaled_ragged_dot, scaled_take, vector_axes
from .weight_method import TargetWeight, WeightMethod, matching


@register
@dataclasses.dataclass(frozen=True)
class IA3Weight(FactoredWeight):
    """`W ⊙ l`, with `l` along the out axes or along the in axes, as a pytree node; it has one of the two.

    Attributes:
        base: The frozen weight, with any number of axes.
        output_scale: `l` of shape `(stack…, out…)`, float32, by which outputs are rescaled.
        input_scale: `l` of shape `(stack…, in…)`, float32, by which inputs are rescaled.
        axes: One label per base axis: `i` in, `o` out, `s` stack.
    """

    saved_as: ClassVar[str] = "IA3Weight"
    fields: ClassVar[dict[str, str]] = {"output_scale": "so", "input_scale": "si"}
    saved: ClassVar[tuple[str, ...]] = ("output_scale", "input_scale")
    optional: ClassVar[tuple[str, ...]] = saved

    output_scale: jax.Array | None = None
    input_scale: jax.Array | None = None

    def merge(self) -> jax.Array:
        vector, label = self._scale()
        return scaled(self.base, vector, vector_axes(self, label))

    def label(self, method_labels: bool) -> Self:
        return labelled(self, dict.fromkeys(self.fields, "ia3") if method_labels else {})

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        if len(shapes) != 1:
            return "it must have exactly one of `output_scale` and `input_scale`"
        return super().misfit(shapes)

    def times(self, factor: jax.Array) -> Self:
        return self.with_base(self.base * factor.astype(self.base.dtype))

    @own_function
    def dot_general(
        self, other: jax.Array, spec: DotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        return scaled_dot(self, *self._scale(), other, spec, lambda x: run(self.base, x))

    def take(self, indices: jax.Array, spec: TakeSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return scaled_take(self, *self._scale(), indices, spec, lambda: run(self.base))

    def conv(self, other: jax.Array, spec: ConvSpec, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return scaled_conv(self, *self._scale(), spec, lambda: run(self.base))

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, spec: RaggedDotSpec, run: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        return scaled_ragged_dot(self, *self._scale(), other, sizes, spec, lambda x: run(self.base, x))

    def _scale(self) -> tuple[jax.Array, str]:
        for scale, label in ((self.output_scale, OUT), (self.input_scale, IN)):
            if scale is not None:
                return scale, label
        raise ArgumentError("an IA3Weight needs one of `output_scale` and `input_scale`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(WeightMethod):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations: `k' = l_k ⊙ k`, `v' = l_v ⊙ v`, `h' = l_ff ⊙ h`.

    Keys, values and the MLP's inner activations are rescaled by trained vectors that start at one. In a function of
    weights this rescales a weight along its out axes (keys and values: `x (W ⊙ l)`) or along its in axes (the weight
    that takes the MLP's inner activations: `(h ⊙ l) W`). It trains `out`, or `in`, parameters per weight, and merges
    into the weight exactly.

    Args:
        targets: Weights to rescale, see `selection.select`; or the preset `"keys-values-mlp"`: the bundled models'
            `attention/key`, `attention/value` (in GPT-2 the fused weight of query, key and value) and `mlp/down`.
        feedforward: Names of the targets whose *input* is rescaled, as in a sequence of `targets`; the others have
            their output rescaled. The preset uses `mlp/down`; with other targets name them, or pass `()` for none.
        also_train: The head, see `Method`.

    Raises:
        ValueError: `feedforward` is missing beside targets of your own; (when used) the axes of a weight of more than
            two are unknown.
        SelectionError: (When used.) An entry matches no weight, or a target is also a head; the preset finds only some
            of its modules in a tree that has other weights which may be the rest.

    Example:
        >>> import lora_jax as lj
        >>> params = {name: {"kernel": jnp.ones((4, 3))} for name in ("value", "down")}
        >>> tree = lj.attach(
        ...     params, lj.IA3(targets=("value", "down"), feedforward=("down",)), key=jax.random.key(0)
        ... )
        >>> tree["value"]["kernel"].output_scale.shape, tree["down"]["kernel"].input_scale.shape
        ((3,), (4,))

    Reference:
        Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
        2022, arXiv:2205.05638, section 3.3. Applying the MLP's vector to the second weight's input
        (`feedforward_modules`), and the choice of GPT-2's weights, follow PEFT.

    Deviations:
        The paper's model has no biases. Where a layer has one, PEFT rescales it with the output; here only the weight
        is rescaled, since a function of parameters doesn't say which bias belongs to which weight. A key's bias has no
        effect under softmax either way.
    """

    name: ClassVar[str] = "ia3"
    saved_as: ClassVar[str] = "IA3"
    title: ClassVar[str] = "(IA)³"
    summary: ClassVar[str] = "factors of outputs or inputs"
    defaults: ClassVar[Mapping[str, object]] = {"targets": "keys-values-mlp"}
    # A factor for each output moves a whole layer little; the paper's rate is some ten times LoRA's.
    default_rate: ClassVar[float] = 1e-2
    node: ClassVar[type[AdaptedWeight]] = IA3Weight
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "keys-values-mlp": ("attention/key", "attention/value", "attention/query_key_value", "mlp/down")
    }

    targets: Selector = dataclasses.field(default="keys-values-mlp", metadata=flag("keys-values-mlp, or modules"))
    feedforward: Sequence[str] | None = dataclasses.field(
        default=None, metadata=flag("Targets whose input is rescaled, not the output; by default the MLP's")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedforward is None:
            require(
                isinstance(self.targets, str) and self.targets in self.presets,
                "`feedforward` is missing: name the targets whose input is rescaled, or pass `()` for none",
            )
        else:
            require(
                not isinstance(self.feedforward, str) and not callable(self.feedforward),
                f"`feedforward` must be a sequence of names, got {self.feedforward!r}",
            )
            require_selector(self.feedforward, "feedforward")

    def nodes(self, targets: list[TargetWeight], *, key: jax.Array) -> dict[LeafPath, AdaptedWeight]:
        del key  # nothing is drawn
        if self.feedforward is None:
            inputs = {target.path for target in targets if "mlp" in target.path.split("/")}
        else:
            inputs = {path for entry in self.feedforward for path in matching(entry, targets, "feedforward")}
        return {target.path: _start(target, target.path in inputs) for target in targets}

    def _admitted(self, leaves: Leaves, paths: list[LeafPath]) -> list[LeafPath]:
        return paths  # real factors suit complex weights as well

    def resolved(self, leaves: Leaves) -> Self:
        inputs = [path for path, node in self.own_nodes(leaves).items() if node.input_scale is not None]
        return super(IA3, dataclasses.replace(self, feedforward=rooted(inputs))).resolved(leaves)


def _start(target: TargetWeight, at_input: bool) -> IA3Weight:
    name, label = ("input_scale", IN) if at_input else ("output_scale", OUT)
    node = IA3Weight(target.base, axes=target.axes)
    ones = jnp.ones(target.sizes(STACK) + target.sizes(label), jnp.float32)
    if place := node.placements().get(name):
        ones = jax.device_put(ones, place)
    return dataclasses.replace(node, **{name: ones})
