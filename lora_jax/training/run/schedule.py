"""The optimizer of a run: AdamW with a learning-rate schedule, one per label."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import optax

import lora_jax as lj
from lora_jax.types import PyTree

from ..config import RunConfig
from ..errors import ConfigError


def make_schedule(kind: str, *, peak: float, steps: int, warmup: float) -> optax.Schedule:
    """The learning rate of each step, counted from 0.

    With `w = ceil(warmup · steps)`: `peak · t / w` for `t < w`; then, with `u = (t − w) / (steps − w)`,
    `peak · (1 − u)` (linear), `peak · (1 + cos πu) / 2` (cosine) or `peak` (constant).

    **Deviations.** As in PyTorch's `get_linear_schedule_with_warmup`, the first step of a warm-up has rate 0.
    """
    warmup_steps = math.ceil(warmup * steps)
    rest = max(steps - warmup_steps, 1)
    after: optax.Schedule
    if kind == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        after = optax.constant_schedule(peak)
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def adamw_by_label(config: RunConfig, labels: PyTree[str], *, steps: int) -> optax.GradientTransformation:
    """AdamW (β₁ 0.9, β₂ 0.999, ε 1e-8) by `lj.make_optimizer`; frozen leaves get neither state nor update.

    The peak rate is a number in the state, so runs that differ only in it share a compiled program. That is also why
    LoRA+'s ratio, `lora_plus_ratio`, multiplies the rate here and isn't passed as `rate_ratios`.
    """
    present = sorted({label for label in jax.tree.leaves(labels) if label != "frozen"})
    for name, value in (("lr", config.lr), ("weight_decay", config.weight_decay)):
        if isinstance(value, Mapping) and (wrong := sorted(set(value).symmetric_difference(present))):
            raise ConfigError(
                f"`{name}` must have the labels that the method trains, {', '.join(present)}, got {', '.join(value)}: "
                f"'{wrong[0]}' is {'missing' if wrong[0] in present else 'not trained'}."
            )

    def adamw(label: str) -> optax.GradientTransformation:
        peak, decay = _of(config.lr, label), _of(config.weight_decay, label)
        if label == "lora_b" and config.lora_plus_ratio is not None:
            peak *= config.lora_plus_ratio
        shape = make_schedule(config.schedule, peak=1.0, steps=steps, warmup=config.warmup)
        return optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(decay),
            optax.scale_by_schedule(shape),
            optax.inject_hyperparams(optax.scale_by_learning_rate)(peak),
        )

    return lj.make_optimizer({label: adamw(label) for label in present}, labels)


def _of(value: float | Mapping[str, float], label: str) -> float:
    return value[label] if isinstance(value, Mapping) else value
