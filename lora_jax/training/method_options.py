"""Methods as plain data: `{"name": "lora", "rank": 8, ...}` and back, for YAML files and command lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lora_jax as lj
from lora_jax.text import clipped, nearest_name

from .errors import ConfigError

METHODS: dict[str, type] = {
    "frozen": lj.Frozen,
    "bitfit": lj.BitFit,
    "lora": lj.LoRA,
    "dora": lj.DoRA,
    "ia3": lj.IA3,
    "vera": lj.VeRA,
    "adapter": lj.BottleneckAdapter,
    "prefix": lj.PrefixTuning,
    "full": lj.FullFineTune,
    "norms": lj.NormTuning,
    "top-layers": lj.TopLayers,
    "random-mask": lj.RandomMask,
    "random-subspace": lj.RandomSubspace,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "frozen": {"also_train": ("classifier",)},
    "bitfit": {"targets": "all", "also_train": ("classifier",)},
    "lora": {"rank": 8, "alpha": 16.0, "targets": "all-linear", "also_train": ("classifier",)},
    "dora": {"rank": 8, "alpha": 16.0, "targets": "all-linear", "also_train": ("classifier",)},
    "ia3": {"targets": "keys-values-mlp", "also_train": ("classifier",)},
    "vera": {"rank": 256, "targets": "all-linear", "also_train": ("classifier",)},
    "adapter": {"size": 16, "placement": "houlsby", "also_train": ("classifier",)},
    "prefix": {"length": 16, "hidden": 512, "also_train": ("classifier",)},
    "full": {"also_train": ("classifier",)},
    "norms": {"targets": "all", "also_train": ("classifier",)},
    "top-layers": {"count": 2, "also_train": ("classifier",)},
    "random-mask": {"size": "bitfit", "also_train": ("classifier",)},
    "random-subspace": {"dimension": 1000, "also_train": ("classifier",)},
}

# Of AdamW. LoRA's and DoRA's are those of PEFT's start on all linear layers.
_RATES = {
    "frozen": 5e-3,
    "bitfit": 3e-3,
    "lora": 1e-3,
    "dora": 1e-3,
    "ia3": 1e-2,
    "vera": 1e-2,
    "adapter": 1e-3,
    "prefix": 3e-4,
    "full": 1e-4,
    "norms": 3e-3,
    "top-layers": 1e-4,
    "random-mask": 3e-3,
    "random-subspace": 0.1,
}

# Of a prefix without its network, which moves all of it at once.
_DIRECT_PREFIX = 1e-2

# A decoder's head is its own, and is there already.
_CAUSAL_LM: dict[str, Any] = {"also_train": ()}


def make_method(options: Mapping[str, Any] | str, task: str = "classification") -> Any:
    """The method that `{"name": ..., **fields}` describes; what isn't said is as in `DEFAULTS`.

    A language model (`task` `"causal-lm"`) has no head to be trained beside: its `also_train` is empty.

    Example:
        >>> make_method({"name": "lora", "rank": 4}).rank
        4
    """
    options = {"name": options} if isinstance(options, str) else dict(options)
    name = options.pop("name", "lora")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"`method` is {name!r:.200}, and one of {', '.join(METHODS)} is expected.")
    fields = [field.name for field in dataclasses.fields(METHODS[name])]
    if unknown := [key for key in options if key not in fields]:
        near = nearest_name(unknown[0], fields)
        hint = f"; the nearest is `{near}`" if near else ""
        raise ConfigError(f"`{clipped(unknown[0])}` is no option of {name}{hint}. It has {', '.join(fields)}.")
    defaults = DEFAULTS[name] | (_CAUSAL_LM if task == "causal-lm" else {})
    if task == "causal-lm" and name == "frozen" and not options.get("also_train"):
        raise ConfigError(
            "`method` frozen trains the head alone, and a causal-lm adds none: name modules in `also_train` "
            "(`norm`, say), or choose another method."
        )
    try:
        return METHODS[name](**{**defaults, **{key: _tuples(value) for key, value in options.items()}})
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"`method` {name}: {error}") from error


def method_name(method: Any) -> str:
    for name, kind in METHODS.items():
        if type(method) is kind:
            return name
    raise ConfigError(f"`method` is a {type(method).__name__}, and one of {', '.join(METHODS)} is expected.")


def method_options(method: Any) -> dict[str, Any]:
    """The inverse of `make_method`, of types that YAML and JSON have."""
    return {"name": method_name(method)} | {
        field.name: _plain(field.name, getattr(method, field.name)) for field in dataclasses.fields(method)
    }


def default_learning_rate(method: Any, task: str = "classification") -> float:
    """A learning rate for AdamW: that of `docs/results.md`; for LoRA's other starts, half of it.

    DoRA's is LoRA's. The vectors of (IA)³ and VeRA are few numbers that each move a whole layer little, and both papers
    train them with some ten times LoRA's rate. A prefix that is trained through its network has diverged at 1e-3
    (TREC). In a random subspace of `d` dimensions a weight moves `√d` times as far as one number, hence `3 / √d`: dev
    chose as much for 1,000 dimensions and for 10,000 (TREC). The head has the same rate, so it is 0.1 at most. For
    language models LoRA's is that of its paper for GPT-2 (arXiv:2106.09685, Table 11); the others keep the proportions.
    """
    name = method_name(method)
    rate = _DIRECT_PREFIX if name == "prefix" and method.hidden is None else _RATES[name]
    if name == "random-subspace":
        rate = min(rate, float(f"{3 / math.sqrt(method.dimension):.2g}"))
    if task == "causal-lm":
        return rate / 5
    if name in ("lora", "dora"):
        targets = method.targets
        few = not isinstance(targets, str) and not callable(targets) and len(targets) <= 2
        rate = 2 * rate if few else rate
        # A Gaussian `a` starts some four times as large, so that the same rate moves the product further: 1e-3 on all
        # linear layers has diverged with it (SST-2).
        return rate if method.init == "kaiming" else rate / 2
    return rate


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(name: str, value: Any) -> Any:
    if callable(value):
        raise ConfigError(f"`{name}` is a function, which a file can't hold: name the leaves instead.")
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(name, item) for item in value]
    return value
