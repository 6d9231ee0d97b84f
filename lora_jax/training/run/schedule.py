"""AdamW with a learning-rate schedule, one for each label where they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

import lora_jax as lj

from ..config import TrainConfig
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


def make_optimizer(config: TrainConfig, labels: Any, *, steps: int) -> optax.GradientTransformation:
    """AdamW (β₁ 0.9, β₂ 0.999, ε 1e-8) by `lj.make_optimizer`; frozen leaves get neither state nor update.

    The peak rate is a number in the state, so runs that differ in it alone are one compiled program; so are those of
    LoRA+, `lora_plus_ratio`, which is why it is in the rate rather than in `lj.make_optimizer`'s `rate_ratios`.
    """
    present = sorted({label for label in jax.tree.leaves(labels) if label != "frozen"})
    for name in ("lr", "weight_decay"):
        value = getattr(config, name)
        if isinstance(value, Mapping) and (wrong := sorted(set(value).symmetric_difference(present))):
            raise ConfigError(
                f"`{name}` has the labels {', '.join(value)}, and this method trains {', '.join(present)}: "
                f"'{wrong[0]}' is {'missing' if wrong[0] in present else 'not among them'}."
            )

    def adamw(label: str) -> optax.GradientTransformation:
        peak, decay = (_of(getattr(config, name), label) for name in ("lr", "weight_decay"))
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


def _of(value: float | Mapping[str, float] | None, label: str) -> float:
    if isinstance(value, Mapping):
        return value[label]
    assert value is not None  # resolved when the config was made
    return value
