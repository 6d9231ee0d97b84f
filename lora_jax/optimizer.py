"""One Optax transformation per label."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import jax

from .errors import ArgumentError
from .masters import with_masters
from .methods.base import FROZEN, is_number
from .types import Labels, Mask, Params

if TYPE_CHECKING:
    import optax


def make_optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    labels: Labels,
    *,
    rate_ratios: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An `optax.multi_transform` that updates what is trained and keeps no state for the rest.

    It takes the whole tree and the trainable part of a `Partition` alike. Prefer the latter: differentiating the
    trainable part alone, no gradient of a frozen leaf is ever computed, and clipping by global norm or
    `optax.MultiSteps` around the optimizer see trained leaves only.

    **Leaves of fewer bits than float32** (biases, norms, a head or all of a bfloat16 model) have a float32 copy in
    the state, on which `tx` works: its moments, weight decay and schedules are float32, and updates too small for
    the leaf add up. The leaf is the copy rounded, and is what evaluation sees and `save_adapter` saves. That takes
    4 bytes a number, and as many for each of `tx`'s moments. `tx.update` then needs `params`. What is to act in
    float32 too belongs inside of `tx`: `optax.MultiSteps(...).gradient_transformation()` there adds up float32
    gradients, around the optimizer it adds them in the leaf's own dtype. Nothing that changes updates
    (`optax.scale`, `optax.ema`, `optax.contrib.reduce_on_plateau`) belongs after it in a chain: it would act on the
    step to the rounded leaf. Of float32 leaves there is no copy, and nothing changes.

    LoRA+ trains `B` with a rate `λ` times that of `A`: `rate_ratios={"lora_b": 16.0}` with the paper's `λ`. A ratio
    multiplies the updates of its label, which for any optimizer whose last step is to multiply by the learning rate
    (Optax's `sgd`, `adam`, `adamw` with its decay; with schedules, too) is to multiply that rate.

    Args:
        tx: One transformation for all that is trained, or `{label: transformation}`, for settings of their own (a
            higher rate for `lora_b`, no weight decay on `bias`). Frozen leaves get `optax.set_to_zero()`.
        labels: Labels from `label_params`.
        rate_ratios: `{label: factor of the learning rate}`; 1 for a label that isn't in it.

    Returns:
        The Optax transformation.

    Raises:
        ValueError: A label has no transformation; a ratio is negative or not finite, or of a label that isn't trained.

    Example:
        >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
        >>> tx = make_optimizer(optax.sgd(1.0), {"w": "frozen", "b": "bias"})
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["w"].tolist(), updates["b"].tolist()
        ([0.0, 0.0], [-1.0, -1.0])

    Reference:
        Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv:2402.12354,
        section 4; the ratio `2⁴` is that of section 5.
    """
    import optax  # on first use: who only merges or serves needs none, and its import takes a while

    names = sorted(set(jax.tree.leaves(labels)))
    given = tx if isinstance(tx, Mapping) else {name: tx for name in names if name != FROZEN}
    transforms: dict[Hashable, optax.GradientTransformation] = {FROZEN: optax.set_to_zero(), **given}
    missing = [name for name in names if name not in transforms]
    if missing:
        raise ArgumentError(
            f"`tx` has no transformation for the labels {', '.join(missing)}; it has {', '.join(sorted(given))}"
        )

    for name, ratio in (rate_ratios or {}).items():
        if name not in names or name == FROZEN:
            trained = ", ".join(label for label in names if label != FROZEN)
            raise ArgumentError(f"`rate_ratios` has the label {name!r}, and what is trained is labelled {trained}")
        if not is_number(ratio, float) or not 0 <= ratio < math.inf:
            raise ArgumentError(f"`rate_ratios` must have finite numbers from 0, got {ratio!r} for {name!r}")
        transforms[name] = optax.chain(transforms[name], optax.scale(ratio))

    def labels_of(tree: Params) -> Labels:
        # The trainable part holds `None` where the whole tree has frozen leaves; their labels go with them.
        return jax.tree.map(
            lambda leaf, label: None if leaf is None else label, tree, labels, is_leaf=lambda node: node is None
        )

    def moves(tree: Params) -> Mask:
        return jax.tree.map(lambda label: label != FROZEN and label in given, labels_of(tree))

    return with_masters(optax.multi_transform(transforms, labels_of), moves)
