"""Loading an adapter of any kind onto its base: a run's, one that `save_adapter` wrote, or PEFT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

import lora_jax as lj
from lora_jax import files, interop, models
from lora_jax.adapters import DESCRIPTION, read_description
from lora_jax.interop import delta
from lora_jax.interop.module_names import Names
from lora_jax.interop.peft.adapter_config import CONFIG, PeftConfig, is_saved, weights_file
from lora_jax.interop.peft.keys import PREFIX, FactorKey, parse_key
from lora_jax.models.checkpoint_task import CheckpointTask, head_outputs, task_of_outputs
from lora_jax.models.families.bundled import family_of
from lora_jax.models.family import HEAD, WORDS, Family
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.stacking import is_stacked
from lora_jax.paths import leaf_paths
from lora_jax.training.errors import TrainingError
from lora_jax.training.task_file import TASK_FILE, TaskFile
from lora_jax.types import Params

from ..inference.classify import adapter_folder, load_run_adapter

FolderKind = Literal["run", "adapter", "peft", "delta", "model"]

# The file that each kind of folder is known by; the first found decides, since a run's folder has two of them.
_MARKS: dict[str, FolderKind] = {
    f"adapter/{TASK_FILE}": "run",
    TASK_FILE: "run",
    DESCRIPTION: "adapter",
    CONFIG: "peft",
    delta.DESCRIPTION: "delta",
    "config.json": "model",
}


class AdapterSource(NamedTuple):
    """An adapter on its base.

    Attributes:
        kind: `"run"`, `"adapter"`, `"peft"`; or `"model"`, where it was made of two models.
        folder: Folder of the adapter.
        base: Folder or name of its base.
        model: Base, with a head where the adapter has one.
        params: Adapted tree.
        method: Method that labels it.
        task_file: `task.json` of a run.
        config: `adapter_config.json` of a PEFT folder.
    """

    kind: FolderKind
    folder: Path
    base: str
    model: models.Model
    params: Params
    method: lj.Method
    task_file: TaskFile | None = None
    config: PeftConfig | None = None


def folder_kind(folder: str | Path) -> FolderKind:
    """What a folder holds, by its files.

    Raises:
        TrainingError: The folder holds nothing known, or two adapters.
    """
    folder = Path(folder)
    files.settle(folder)
    held = [mark for mark in _MARKS if (folder / mark).is_file()]
    if not held:
        if not folder.is_dir():
            raise TrainingError(f"`adapter` {folder} doesn't exist, or is no folder.")
        if (folder / "config.yaml").is_file():
            adapter_folder(folder)  # tells that its run isn't complete
        raise TrainingError(
            f"`adapter` {folder} holds no adapter: neither a run's {TASK_FILE}, nor {DESCRIPTION}, nor PEFT's {CONFIG}."
        )
    if CONFIG in held and held[0] != CONFIG:
        raise TrainingError(f"`adapter` {folder} holds two adapters, {held[0]} and PEFT's {CONFIG}: move one away.")
    return _MARKS[held[0]]


def load_source(
    folder: str | Path, *, base: str | None = None, progress: models.Progress | None = None
) -> AdapterSource:
    """Loads an adapter of any kind, and the base that it belongs to.

    Args:
        folder: Folder of a run, of an adapter, or of PEFT's.
        base: Folder or name of the base; the one that the folder names if `None`.
        progress: Callback for the weights read; see `lj.models.load`.

    Raises:
        TrainingError: No adapter there, or one whose base isn't said.
        AdapterError, FileError: See `lj.load_adapter`, `lj.interop.import_peft` and `lj.models.load`.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if kind == "run":
        found = load_run_adapter(folder, base=base, progress=progress)
        saved = found.task_file
        return AdapterSource(kind, found.folder, base or saved.base, found.model, found.params, found.method, saved)
    if kind == "adapter":
        return _load_own(folder, base, progress)
    if kind == "peft":
        return _load_peft(folder, base, progress)
    raise no_adapter(kind, folder)


def no_adapter(kind: FolderKind, folder: Path) -> TrainingError:
    """The error to raise for what an adapter is asked for, and isn't one."""
    if kind == "delta":
        return TrainingError(
            f"`adapter` {folder} is a delta, new values for some leaves of a base: `lj.interop.apply_delta` puts them "
            "in place."
        )
    return TrainingError(
        f"`adapter` {folder} is a whole model and no adapter. `lora-jax convert --base BASE --tuned {folder}` makes a "
        "LoRA of what it has other than its base."
    )


def peft_base(folder: str | Path, config: PeftConfig, base: str | None) -> str:
    """The base of a PEFT folder: the one given, or the one that its config names."""
    if found := base or config.get("base_model_name_or_path"):
        return found
    raise TrainingError(f"{Path(folder) / CONFIG} doesn't say its base (`base_model_name_or_path`): pass `base`.")


def check_peft_source(folder: str | Path, *, base: str | None = None) -> Names:
    """Raises what `load_source` would of a PEFT folder, short of reading tensors.

    Returns:
        The Hugging Face modules of the base's leaves.
    """
    config = interop.read_peft_config(folder)
    base = peft_base(folder, config, base)
    sizes = models.read_model_config(models.find_base(base))
    family = family_of(sizes)
    task, num_labels = _peft_task(family, base, Path(folder))
    if _head_of_its_own(Path(folder), config, sizes, task):
        sizes = dataclasses.replace(sizes, tie_word_embeddings=False)
    shapes = models.skeleton(sizes, task=task, num_labels=num_labels or 1).params
    paths = leaf_paths(shapes)
    names = family.leaf_modules(paths, task)
    interop.check_peft(folder, shapes, names=names)
    return names


def _head_of_its_own(folder: Path, config: PeftConfig, sizes: ModelConfig, task: str | None) -> bool:
    """Whether a PEFT folder changes one use of tied embeddings, so that each needs a leaf."""
    if task != "causal-lm" or not getattr(sizes, "tie_word_embeddings", False) or config.get("ensure_weight_tying"):
        return False
    names = family_of(sizes).names
    tied = {names.module(WORDS, prefix=names.prefix), names.module(HEAD)}
    file = weights_file(folder)
    keys = [parse_key(name, str(file)) for name in files.read_safetensors_header(file)]
    factored = {key.module for key in keys if isinstance(key, FactorKey)}
    saved = config.get("modules_to_save") or ()
    return any(module in factored or is_saved(saved, module) for module in tied)


def _load_own(folder: Path, base: str | None, progress: models.Progress | None) -> AdapterSource:
    """An adapter without a `task.json`; the leaves that it names tell which head its model had."""
    if base is None:
        raise TrainingError(f"`adapter` {folder} doesn't say its base, as it isn't a run's: pass `base`.")
    description = read_description(folder)
    leaves = {path: tuple(entry["shape"]) for name in ("base", "tensors") for path, entry in description[name].items()}
    config = models.read_model_config(models.find_base(base))
    family = family_of(config)
    logits = leaves.get(f"{family.logits}/kernel")
    task, num_labels = task_of_outputs(family, logits[-1] if logits else None)
    if family.is_decoder and logits is None and not getattr(config, "tie_word_embeddings", False):
        task = None
    # A BERT's pooler belongs to a head that sees the first token.
    has_pooler = any(path.startswith("pooler/") for path in leaves)
    pooling = "mean" if family.config.model_type == "bert" and task and not has_pooler else "first"
    stacked = family.is_decoder and any(map(is_stacked, leaves))
    model = models.load(
        base,
        task=task,
        num_labels=num_labels,
        pooling=pooling,
        scan_layers=stacked,
        tie_word_embeddings=False if family.is_decoder and logits else None,
        new_head=models.has_other_head(base, task, num_labels),
        progress=progress,
    )
    params, method = lj.load_adapter(folder, model.params)
    return AdapterSource("adapter", folder, base, model, params, method)


def _load_peft(folder: Path, base: str | None, progress: models.Progress | None) -> AdapterSource:
    config = interop.read_peft_config(folder)
    base = peft_base(folder, config, base)
    sizes = models.read_model_config(models.find_base(base))
    task, num_labels = _peft_task(family_of(sizes), base, folder)
    tie = False if _head_of_its_own(folder, config, sizes, task) else None
    model = models.load(
        base,
        task=task,
        num_labels=num_labels,
        tie_word_embeddings=tie,
        new_head=models.has_other_head(base, task, num_labels),
        progress=progress,
    )
    params, method = interop.import_peft(folder, model.params, names=model.names)
    return AdapterSource("peft", folder, base, model, params, method, config=config)


def _peft_task(family: Family, base: str, folder: Path) -> CheckpointTask:
    """The task from the names of the tensors: classes with a head keep the model itself under a name of its own."""
    shapes = {name: info.shape for name, info in files.read_safetensors_header(weights_file(folder)).items()}
    if not any(name.startswith(PREFIX + family.names.prefix) for name in shapes) and not _in_head(family, shapes):
        return CheckpointTask(None, None)
    if family.is_decoder:
        return CheckpointTask("causal-lm", None)
    outputs = head_outputs(family, shapes, prefix=PREFIX)
    task = task_of_outputs(family, outputs) if outputs else models.checkpoint_task(base)
    if task.task is None:
        raise TrainingError(
            f"{folder} was trained on a model with a head, and the head is neither in it nor in its base {base}: save "
            "it along (`modules_to_save`), or pass as `base` the model that has it."
        )
    return task


def _in_head(family: Family, names: Collection[str]) -> bool:
    tops = {PREFIX + top for head in family.heads if head != "pooler" for top in family.names.tops(head)}
    return any(name.startswith(f"{top}.") for name in names for top in tops)
