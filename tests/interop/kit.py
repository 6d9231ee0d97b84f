"""A small model with two names for everything, PEFT folders for it, and what PEFT computes from a folder.

`state_dict`, `peft_result` and the names are written down independently of `lora_jax.interop`: they are what it is held
against where PEFT itself isn't installed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.files import read_safetensors, write_safetensors
from lora_jax.paths import leaves_by_path

WORDS, WIDTH, HIDDEN, CLASSES = 11, 8, 6, 3
QUERY, VALUE, EMBED, HEAD, NORM = (
    "model.layers.0.query",
    "model.layers.0.value",
    "model.embed",
    "classifier",
    "model.norm",
)
NAMES = {
    "embed/embedding": EMBED,
    "query/kernel": QUERY,
    "query/bias": QUERY,
    "value/kernel": VALUE,
    "value/bias": VALUE,
    "norm/scale": NORM,
    "norm/bias": NORM,
    "classifier/kernel": HEAD,
    "classifier/bias": HEAD,
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def base(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    return {
        "embed": {"embedding": draw(WORDS, WIDTH)},
        "query": {"kernel": draw(WIDTH, HIDDEN), "bias": draw(HIDDEN)},
        "value": {"kernel": draw(HIDDEN, WIDTH), "bias": draw(WIDTH)},
        "norm": {"scale": draw(WIDTH), "bias": draw(WIDTH)},
        "classifier": {"kernel": draw(WIDTH, CLASSES), "bias": draw(CLASSES)},
    }


def state_dict(params: Any) -> dict[str, np.ndarray]:
    """Plain parameters under Hugging Face names, in their layout."""
    result = {}
    for path, leaf in leaves_by_path(params).items():
        array = np.asarray(leaf)
        suffix = "bias" if path.endswith("bias") else "weight"
        result[f"{NAMES[path]}.{suffix}"] = array.T if path.endswith("kernel") else array
    return result


def factors(module: str, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Non-zero factors of one module, under PEFT's names."""
    rng = np.random.default_rng([seed, len(module), rank])
    rows, columns = state_dict(base())[f"{module}.weight"].shape
    a, b = (WORDS, WIDTH) if module == EMBED else (columns, rows)
    kinds = ("lora_embedding_A", "lora_embedding_B") if module == EMBED else ("lora_A.weight", "lora_B.weight")
    shapes = ((rank, a), (b, rank))
    return {
        f"{PREFIX}{module}.{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in zip(kinds, shapes, strict=True)
    }


def whole(*tensors: str, seed: int = 2) -> dict[str, np.ndarray]:
    """Other values for whole parameters, such as `classifier.weight` or `model.layers.0.query.base_layer.bias`."""
    shapes = {name: array.shape for name, array in state_dict(base()).items()}
    rng = np.random.default_rng(seed)
    return {
        PREFIX + name: rng.normal(size=shapes[name.replace(".base_layer", "")]).astype(np.float32) for name in tensors
    }


def config(**entries: Any) -> dict[str, Any]:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    return {**plain, **entries}


def write_peft(folder: Path, tensors: Mapping[str, Any] | None = None, **entries: Any) -> Path:
    """A PEFT folder; by default with factors of rank 2 for query and value."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = factors(QUERY) | factors(VALUE)
    (folder / CONFIG).write_text(json.dumps(config(**entries)))
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def peft_result(folder: Path, before: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The merged model that PEFT makes of a folder: its own rules, its own regular expressions."""
    settings = read_config(folder)
    tensors = {name.removeprefix(PREFIX): array for name, array in read_safetensors(folder / WEIGHTS).items()}
    after = dict(before)

    def pattern(table: str, module: str, default: Any) -> Any:
        keys = settings.get(table) or {}
        return next((keys[key] for key in keys if re.match(rf"(.*\.)?({key})$", module)), default)

    for name, array in tensors.items():
        for a, b in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if name.endswith(a):
                module = name.removesuffix(a)
                rank = pattern("rank_pattern", module, settings["r"])
                assert rank == array.shape[0]
                alpha = pattern("alpha_pattern", module, settings["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
                delta = tensors[module + b].astype(np.float32) @ array.astype(np.float32)
                weight = after[f"{module}.weight"]
                after[f"{module}.weight"] = weight + scale * (delta.T if "embedding" in a else delta)
        if ".lora_" not in name:
            after[name.replace(".base_layer", "")] = array
    return after


def assert_equal_models(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        # Both are sums in float32, of values near 1.
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)
