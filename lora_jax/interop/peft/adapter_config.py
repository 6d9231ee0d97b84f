"""`adapter_config.json`: read as a claim, and held against what can be represented here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lora_jax.adapters import AdapterError
from lora_jax.files import read_json, settle, within_folder

from ..module_names import selects

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST_CONFIG = 4 * 2**20
_MOST_PATTERNS = 10_000


# An `adapter_config.json`: entries that are known have been checked, the others are kept as they are.
PeftConfig = Mapping[str, Any]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value < 1e30


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_table(of: Callable[[object], bool]) -> Callable[[object], bool]:
    def fits(value: object) -> bool:
        return isinstance(value, dict) and len(value) <= _MOST_PATTERNS and all(of(item) for item in value.values())

    return lambda value: value is None or fits(value)


# What is read: the check, and how to say what is expected.
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a string"),
    "r": (_is_count, "a whole number of at least 1"),
    "lora_alpha": (_is_positive, "a positive number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "target_modules": (
        lambda value: _is_text_or_none(value) or _is_list_of_names(value),
        "a list of names, an expression or null",
    ),
    "modules_to_save": (lambda value: value is None or _is_list_of_names(value), "a list of names or null"),
    "rank_pattern": (_is_table(_is_count), "an object of whole numbers of at least 1"),
    "alpha_pattern": (_is_table(_is_positive), "an object of positive numbers"),
    "base_model_name_or_path": (_is_text_or_none, "a string or null"),
    "task_type": (_is_text_or_none, "a string or null"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str) or value is None, "true, false or a string"),
}
_DEFAULTS = {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}

# Variants of LoRA that compute something else than `W + scale · B A`, where the entry is set.
_VARIANTS = {
    "use_qalora": "QALoRA, which pools the inputs",
    "lora_bias": "a bias beside `lora_B`",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only",
    "monteclora_config": "MonteCLoRA, which samples",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base's weights",
    "velora_config": "VeLoRA",
    "layer_replication": "repeated layers: another base",
    "target_parameters": "factors of parameters outside of any module",
    "trainable_token_indices": "single trained rows of an embedding",
    "megatron_config": "Megatron's parallel layers",
}
# Starts that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) train beside a changed base.
_STARTS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}

# How the targets were chosen; the tensors' names say which they are.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Without a meaning for what the trained adapter computes.
_INERT = {
    *SELECTION,
    *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
_KNOWN = {*_FIELDS, *_VARIANTS, *_INERT}


def read_peft_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a PEFT folder's `adapter_config.json`, its types checked, absent entries as PEFT has them.

    Pass it to `export_peft` as `config` to keep the entries that lora_jax has no place for.

    Args:
        folder: Folder with an `adapter_config.json`.

    Returns:
        A dict of the file's entries, unknown ones included.

    Raises:
        FileError: The file is missing, a link that leads out of the folder, no JSON, or has an entry twice.
        AdapterError: It is no LoRA's, or an entry has a wrong type.

    Example:
        >>> import lora_jax as lj, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
        >>> lj.interop.read_peft_config(folder)["bias"]
        'none'
    """
    settle(folder)
    path = within_folder(folder, CONFIG)
    content = read_json(path, max_bytes=_LARGEST_CONFIG)
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must be a JSON object, and is a {type(content).__name__}")
    config = {**_DEFAULTS, **content}
    for name in ("peft_type", "r", "lora_alpha"):
        if name not in config:
            raise AdapterError(f"{path} has no `{name}`: it is no LoRA configuration of PEFT")
    for name, (fits, expected) in _FIELDS.items():
        if name in config and not fits(config[name]):
            raise AdapterError(f"{path}: `{name}` must be {expected}, got {config[name]!r:.200}")
    endless = [name for name, value in config.items() if not _is_finite(value)]
    if endless:
        raise AdapterError(f"{path} has a NaN or an infinity, which JSON lacks, in {', '.join(sorted(endless)[:5])}")
    if config["peft_type"] != "LORA":
        raise AdapterError(f"{path} is of the type {config['peft_type']!r:.50}, and only LORA can be read")
    return config


def _is_finite(value: object) -> bool:
    """Whether no number in a JSON value is NaN or infinite: Python reads such, and no other reader has to."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def weights_file(folder: str | os.PathLike[str]) -> Path:
    """The path of a PEFT folder's tensors; a pickle alone is refused, with the way out."""
    settle(folder)
    path = within_folder(folder, WEIGHTS)
    pickle = Path(folder) / PICKLE
    if not path.exists() and pickle.exists():
        raise AdapterError(
            f"{pickle} is a pickle, which can run code when it is read, so it isn't. Save the adapter as safetensors: "
            "`peft.PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)`"
        )
    return path


def variants(config: PeftConfig) -> list[str]:
    """What makes an adapter something else than LoRA or DoRA, each as `entry: what it is`."""
    found = [f"`{name}`: {what}" for name, what in _VARIANTS.items() if config.get(name)]
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        found.append(f"`init_lora_weights` {start!r:.50}: factors beside a base that the start has changed")
    return found


def require_representable(config: PeftConfig, folder: Path) -> None:
    """Refuses every variant by name."""
    found = variants(config)
    if found:
        raise AdapterError(
            f"{folder / CONFIG} describes what can't be represented here: {'; '.join(found)}. Where it can be "
            "converted to plain LoRA, do so in PEFT and save it again"
        )


def unknown_entries(config: PeftConfig) -> list[str]:
    """Names of the entries that this lora_jax knows nothing of, those that are set to nothing aside."""
    return [name for name, value in config.items() if name not in _KNOWN and value not in (None, False, [], {})]


def is_saved(entries: Collection[str], module: str) -> bool:
    """Whether `modules_to_save` covers a module, by PEFT's rule: the name of it or of what it is in ends so.

    PEFT doesn't look for a dot there: `classifier` covers `pre_classifier` as well.

    Args:
        entries: The names, best a set.
        module: A module's name.

    Example:
        >>> is_saved({"classifier"}, "classifier.dense"), is_saved({"classifier"}, "pre_classifier")
        (True, True)
        >>> is_saved({"classifier"}, "bert.pooler.dense")
        False
    """
    ends = [place for place, character in enumerate(module) if character == "."] + [len(module)]
    return any(module[start:end] in entries for end in ends for start in range(end))


def listed_targets(config: PeftConfig, modules: list[str]) -> list[str] | None:
    """The modules that `target_modules` means, `None` where an expression or layer numbers choose: none is run."""
    entries = config.get("target_modules")
    if not isinstance(entries, list) or any(config.get(name) for name in SELECTION[1:]):
        return None
    wanted, saved = set(entries), set(config.get("modules_to_save") or [])
    return [module for module in modules if selects(wanted, module) and not is_saved(saved, module)]


def scale_of(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """`α/r`, or `α/√r`."""
    return float(alpha / math.sqrt(rank) if rank_stabilized else alpha / rank)


def alpha_of(scale: float, rank: int, *, rank_stabilized: bool) -> float:
    """The inverse of `scale_of`; a whole number where it is one but for rounding."""
    alpha = scale * (math.sqrt(rank) if rank_stabilized else rank)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-9) else alpha
