"""Converting adapters: between our folders, PEFT's and deltas, to lower ranks, and from two full models."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lora_jax as lj
from lora_jax import files, interop, models
from lora_jax.adapters.extract import Rest
from lora_jax.adapters.truncate import LowRankFit
from lora_jax.methods.base import is_trainable, rooted
from lora_jax.models.checkpoint.hub import ALIASES
from lora_jax.models.checkpoint.weight_files import read_config
from lora_jax.models.families.bundled import family_of
from lora_jax.models.model_config import label_names
from lora_jax.models.stacking import is_stacked, layer_path
from lora_jax.paths import leaves_by_path
from lora_jax.selection import Selector
from lora_jax.text import listed
from lora_jax.training.errors import ConfigError
from lora_jax.training.examples import Columns
from lora_jax.training.options import TASKS
from lora_jax.training.task import restore_task
from lora_jax.training.task_file import TaskFile, save_task_adapter

from .inspect import Group, trained_groups
from .source import AdapterSource, FolderKind, load_source

Format = Literal["peft", "lora_jax", "delta"]
_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    None: "FEATURE_EXTRACTION",
}
_MAX_LENGTH = 128


class Conversion(NamedTuple):
    """What was converted.

    Attributes:
        kind: FolderKind of the source; `"model"` for two full models.
        output: Folder that was written.
        base: Base of the adapter.
        method: Method of the written adapter.
        groups: Trained leaves.
        fits: Approximations by leaf path; empty if the conversion is exact.
        carried, dropped: See `lj.extract_lora`.
        notices: Sentences for the user.
    """

    kind: FolderKind
    output: Path
    base: str
    method: lj.Method
    groups: list[Group]
    fits: dict[str, LowRankFit]
    carried: list[str]
    dropped: list[str]
    notices: list[str]


def convert_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    to: Format,
    base: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    labels: Sequence[str] | None = None,
) -> Conversion:
    """Writes an adapter in another format, or with a lower rank, or both.

    Args:
        adapter: Folder of a run, of an adapter, or of PEFT's.
        output: New or empty folder; written whole or not at all.
        to: `"peft"`, `"lora_jax"`, or `"delta"`: the new values of every leaf that has changed, factors folded in.
        base: Folder or name of the base; the one that the adapter names if `None`.
        rank, energy: See `lj.truncate_lora`; ranks stay as they are if both are `None`.
        labels: Names of the classes, for `to="lora_jax"` where the adapter has none.

    Raises:
        FileError: `output` holds files; or see `load_source`.
        ValueError: What can't be converted, and why.
    """
    _check(to, output)
    source = load_source(adapter, base=base)
    fits: dict[str, LowRankFit] = {}
    if rank is not None or energy is not None:
        params, method, fits = lj.truncate_lora(source.params, source.method, rank=rank, energy=energy)
        source = source._replace(params=params, method=method)
    return _convert(source, output, to, labels, fits=fits)


def extract_adapter(
    base: str,
    tuned: str,
    output: str | Path,
    *,
    to: Format,
    targets: Selector = "all-linear",
    rank: int | None = None,
    energy: float | None = None,
    rest: Rest = "train",
    labels: Sequence[str] | None = None,
) -> Conversion:
    """Writes the LoRA that a fully fine-tuned model is on its base; see `lj.extract_lora`.

    Args:
        base: Model before fine-tuning; if it has no head and `tuned` does, the head goes with the adapter.
        tuned: Model after fine-tuning, of the same kind and sizes.
        output, to, labels: See `convert_adapter`.
        targets, rank, energy, rest: See `lj.extract_lora`.

    Raises:
        FileError: `output` holds files, or a model can't be loaded.
        ValueError: Two models that don't belong together, or see `lj.extract_lora`.
    """
    _check(to, output)
    if rank is None and energy is None:
        raise ConfigError("How much to keep isn't said: pass `rank`, or `energy` (0.9 keeps 90 % of Σσ²), or both.")
    task, num_labels = models.checkpoint_task(tuned)
    kinds = [models.read_model_config(models.find_base(source)).model_type for source in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"`base` {base} is a {kinds[0]}, and `tuned` {tuned} a {kinds[1]}: no fine-tuned form of it.")
    after = models.load(tuned, task=task, num_labels=num_labels)
    new_head = models.has_other_head(base, task, num_labels)
    before = models.load(base, task=task, num_labels=num_labels, new_head=new_head)
    # Nobody else has what was drawn for the base: it goes with the adapter, whatever becomes of the rest.
    absent = rooted(models.absent_leaves(before, base))
    found = lj.extract_lora(
        before.params, after.params, targets=targets, rank=rank, energy=energy, also_train=absent, rest=rest
    )
    source = AdapterSource("model", Path(tuned), base, before, found.params, found.method)
    own = _labels(tuned, num_labels or 0)
    return _convert(source, output, to, labels or own, fits=found.fits, carried=found.carried, dropped=found.dropped)


def _check(to: str, output: str | Path) -> None:
    if to not in get_args(Format):
        raise ConfigError(f"`to` is {to!r}, and one of {', '.join(get_args(Format))} is expected.")
    files.require_new_folder(output, "output")  # told before the model is loaded


def _convert(
    source: AdapterSource,
    output: str | Path,
    to: Format,
    labels: Sequence[str] | None,
    *,
    fits: dict[str, LowRankFit],
    carried: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> Conversion:
    return Conversion(
        kind=source.kind,
        output=Path(output),
        base=source.base,
        method=source.method,
        groups=trained_groups(source.params, source.method),
        fits=fits,
        notices=_write(source, output, to, labels),
        carried=list(carried),
        dropped=list(dropped),
    )


def _write(source: AdapterSource, output: str | Path, to: Format, labels: Sequence[str] | None) -> list[str]:
    """Writes the folder; returns what the user should know of it."""
    with files.new_folder(output, "output") as staging, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if to == "lora_jax":
            notices = _write_own(source, staging, labels)
        else:
            (_write_peft if to == "peft" else _write_delta)(_unstacked(source), staging)
            notices = _label_notice(source)
    return [str(warning.message) for warning in caught] + notices


def _label_notice(source: AdapterSource) -> list[str]:
    """What the outputs are, where the base would name them otherwise: the formats of others have no names for them."""
    labels = source.task_file.task.labels if source.task_file is not None else ()
    if not labels or _labels(source.base, len(labels)) == list(labels):
        return []
    return [
        "The folder has no names for the labels, and its base has others or none: the outputs are, in this order, "
        f"{', '.join(map(repr, labels))}. Pass them on as `id2label`."
    ]


def _write_own(source: AdapterSource, folder: Path, labels: Sequence[str] | None) -> list[str]:
    task_file = _task_file(source, labels)
    if task_file is None:
        lj.save_adapter(folder, source.params, source.method)
        return ["It has no task.json, since `lora-jax predict` has no such task: `lj.load_adapter` reads it."]
    save_task_adapter(folder, source.params, source.method, task_file)
    names = task_file.task.labels
    if source.task_file is not None or labels or not names:
        return []
    origin = "those of the base" if _labels(source.base, len(names)) == list(names) else "placeholders"
    return [
        f"The adapter doesn't name its labels. They are {origin}: {listed(names, form='{!r}')}. Name them with "
        "`labels` if they mean something else."
    ]


def _write_peft(source: AdapterSource, folder: Path) -> None:
    model = source.model
    if model.pooling == "mean":
        raise ConfigError(
            "The head of this adapter sees the mean over the tokens (`pooling: mean`), and transformers has no class "
            "that does, so PEFT can't load it. `to='delta'` writes the values."
        )
    interop.export_peft(
        folder,
        source.params,
        _with_absent(source),
        names=model.names,
        base_name=ALIASES.get(source.base, source.base) if source.config is None else None,
        task_type=_TASK_TYPES[model.task] if source.config is None else None,
        config=source.config,
    )


def _write_delta(source: AdapterSource, folder: Path) -> None:
    model = source.model
    interop.export_delta(
        folder,
        lj.merge_params(source.params),
        model.params,
        names=model.names,
        base_name=ALIASES.get(source.base, source.base),
        absent=models.absent_leaves(model, source.base),
    )


def _with_absent(source: AdapterSource) -> lj.Method:
    """The method with the leaves that the base hasn't, so that they are written though they weren't trained."""
    leaves = leaves_by_path(source.params)
    absent = [path for path in models.absent_leaves(source.model, source.base) if is_trainable(path, leaves[path])]
    head = source.method.head(leaves)
    return dataclasses.replace(source.method, also_train=rooted([path for path in leaves if path in {*head, *absent}]))


def _unstacked(source: AdapterSource) -> AdapterSource:
    """Hugging Face has a module for each layer."""
    model = source.model
    if not any(map(is_stacked, leaves_by_path(model.params))):
        return source
    layers = getattr(model.config, family_of(model.config).layers)

    def unstacked(value: object) -> Any:
        if isinstance(value, Mapping):
            return {path: item for old, item in value.items() for path in _layer_paths(old, layers)}
        if isinstance(value, tuple):
            return tuple(path for old in value for path in _layer_paths(old, layers))
        return value

    # The selectors of an adapter that was read are rooted paths.
    method = source.method
    selectors = {field.name: unstacked(getattr(method, field.name)) for field in dataclasses.fields(method)}
    return source._replace(
        model=dataclasses.replace(model, params=models.unstack_layers(model.params)),
        params=models.unstack_layers(source.params),
        method=dataclasses.replace(method, **selectors),
    )


def _layer_paths(path: str, layers: int) -> list[str]:
    plain = path.removeprefix("/")
    return rooted([layer_path(plain, layer) for layer in range(layers)]) if is_stacked(plain) else [path]  # type: ignore[return-value]


def _task_file(source: AdapterSource, labels: Sequence[str] | None) -> TaskFile | None:
    model = source.model
    if source.task_file is not None or model.task not in TASKS:
        return source.task_file
    return TaskFile(
        base=source.base,
        task=restore_task(model.task, _class_names(source, labels) if model.task == "classification" else ()),
        pooling=model.pooling,
        max_length=min(_MAX_LENGTH, model.config.max_length),
        dtype="float32",
        columns=Columns(),
        new_head=model.new_head,
    )


def _class_names(source: AdapterSource, labels: Sequence[str] | None) -> tuple[str, ...]:
    leaves = leaves_by_path(source.model.params)
    count = leaves[f"{family_of(source.model.config).logits}/kernel"].shape[1]
    names = list(labels or _labels(source.base, count) or [f"LABEL_{place}" for place in range(count)])
    if len(names) != count or len(set(names)) != count:
        raise ConfigError(f"`labels` has {', '.join(names)}, and the head has {count} classes: a name of its own each.")
    return tuple(names)


def _labels(source: str, count: int) -> list[str] | None:
    """The names that a folder's configuration gives to so many classes."""
    own = label_names(read_config(models.find_base(source)))
    return list(own) if own is not None and len(own) == count else None
