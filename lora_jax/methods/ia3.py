"""(IA)³: a learned factor for each output, or input, of a frozen weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from ..selection import Selector
from ..weights import IN, OUT, STACK, AdaptedWeight, ConvSpec, DotSpec, RaggedDotSpec, TakeSpec, register
from .base import FROZEN, require, require_selector, rooted
from .scaling import scaled, scaled_conv, scaled_dot, scaled_ragged_dot, scaled_take, vector_axes
from .targets import Target, WeightMethod, matching


@register
@dataclasses.dataclass(frozen=True)
class IA3Weight(AdaptedWeight):
    """`W ⊙ l`, with `l` along the out axes or along the in axes, as a pytree node; it has one of the two.

    Attributes:
        base: the frozen weight, any number of axes.
        output_scale: `l` of shape `(stack…, out…)`, float32: what the weight computes is rescaled.
        input_scale: `l` of shape `(stack…, in…)`, float32: what it is given is rescaled.
        axes: one label per base axis: `i` in, `o` out, `s` stack.
    """

    fields: ClassVar[dict[str, str]] = {"output_scale": "so", "input_scale": "si"}
    saved: ClassVar[tuple[str, ...]] = ("output_scale", "input_scale")
    optional: ClassVar[tuple[str, ...]] = saved

    output_scale: Any = None
    input_scale: Any = None

    def merge(self) -> jax.Array:
        vector, label = self._scale()
        return scaled(self.base, vector, vector_axes(self, label))

    def label(self, method_labels: bool) -> Self:
        frozen = jax.tree.map(lambda array: FROZEN, self)
        return jax.tree.map(lambda array: "ia3", frozen).with_base(frozen.base) if method_labels else frozen

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        if len(shapes) != 1:
            return "exactly one of `output_scale` and `input_scale` belongs to it"
        return super().misfit(shapes)

    def times(self, factor: jax.Array) -> Self:
        return self.with_base(self.base * factor.astype(self.base.dtype))

    # One function in the program, as LoRA's.
    @functools.partial(jax.jit, static_argnames=("spec", "run"))
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
        return (self.output_scale, OUT) if self.input_scale is None else (self.input_scale, IN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(WeightMethod):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations: `k' = l_k ⊙ k`, `v' = l_v ⊙ v`, `h' = l_ff ⊙ h`.

    Keys, values and the MLP's inner activations are rescaled by learned vectors that start at one. On a function of
    weights that is to rescale a weight along its out axes (keys and values: `x (W ⊙ l)`) or along its in axes (the
    weight that takes the MLP's inner activations: `(h ⊙ l) W`). It trains `out`, or `in`, numbers a weight, and merges
    into it exactly.

    Args:
        targets: which weights, see `selection.select`; or the preset `"keys-values-mlp"`: the bundled models'
            `attention/key`, `attention/value` (in GPT-2 the one weight of query, key and value) and `mlp/down`.
        feedforward: names of those targets whose *input* is rescaled, as in a sequence of `targets`; of the others it
            is the output. The preset knows its own, `mlp/down`; with other targets say which, `()` for none.
        also_train: the head, see `Method`.

    Raises:
        ValueError: `feedforward` is missing beside targets of your own; (when used) the axes of a weight of more than
            two are unknown.
        SelectionError: (when used) an entry matches no weight, or a target is also a head; the preset finds a part of
            its modules alone, in a tree that has other weights which may be the rest.

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
        2022, arXiv:2205.05638, section 3.3. That an MLP's vector is applied where the second weight takes its input
        (`feedforward_modules`), and the choice of GPT-2's weights, are PEFT's.

    Deviations:
        The paper's model has no biases. Where a layer has one, PEFT rescales it with the output; here the weight alone
        is rescaled, since a function of parameters doesn't say which bias belongs to which weight. A key's bias has no
        effect under softmax either way.
    """

    node: ClassVar[type[AdaptedWeight]] = IA3Weight
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "keys-values-mlp": ("attention/key", "attention/value", "attention/query_key_value", "mlp/down")
    }

    targets: Selector = "keys-values-mlp"
    feedforward: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedforward is None:
            require(
                isinstance(self.targets, str) and self.targets in self.presets,
                "`feedforward` is missing: name those of the targets whose input is rescaled, or pass `()` for none",
            )
        else:
            require(
                not isinstance(self.feedforward, str) and not callable(self.feedforward),
                f"`feedforward` must be a sequence of names, got {self.feedforward!r}",
            )
            require_selector(self.feedforward, "feedforward")

    def nodes(self, targets: list[Target], *, key: jax.Array) -> dict[str, AdaptedWeight]:
        del key  # nothing is drawn
        if self.feedforward is None:
            inputs = {target.path for target in targets if "mlp" in target.path.split("/")}
        else:
            inputs = {path for entry in self.feedforward for path in matching(entry, targets, "feedforward")}
        return {target.path: _start(target, target.path in inputs) for target in targets}

    def _admitted(self, leaves: Mapping[str, Any], paths: list[str]) -> list[str]:
        return paths  # a real factor for each output is as good for complex ones

    def resolved(self, leaves: Mapping[str, Any]) -> Self:
        inputs = [path for path, node in self.own_nodes(leaves).items() if node.input_scale is not None]
        return super(IA3, dataclasses.replace(self, feedforward=rooted(inputs))).resolved(leaves)


def _start(target: Target, at_input: bool) -> IA3Weight:
    name, label = ("input_scale", IN) if at_input else ("output_scale", OUT)
    node = IA3Weight(target.base, axes=target.axes)
    ones = jnp.ones(target.sizes(STACK) + target.sizes(label), jnp.float32)
    if place := node.placements().get(name):
        ones = jax.device_put(ones, place)
    return dataclasses.replace(node, **{name: ones})
