"""Inspecting what a method would train on a base, and what a saved adapter holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax import files
from lora_jax.adapters import TENSORS, read_description, saved_arrays
from lora_jax.models import find_base, read_model_config, skeleton
from lora_jax.training.config import TrainConfig, resolve
from lora_jax.training.run.schedule import adamw_by_label
from lora_jax.training.task_file import TaskFile, read_task
from lora_jax.types import Leaf, Params, PyTree

from ..inference.classify import adapter_folder


class Group(NamedTuple):
    """Leaves that are alike but for their layer: `encoder/layers/*/attention/query/kernel/a`.

    Attributes:
        pattern: Their path, with numbers as `*`.
        label: Their label.
        leaves: Number of leaves.
        shape: Shape of each; `None` if they differ.
        params, bytes: Number of parameters and bytes of all leaves.
    """

    pattern: str
    label: str
    leaves: int
    shape: tuple[int, ...] | None
    params: int
    bytes: int


class MethodReport(NamedTuple):
    """A method on a base; no array was made for it. Bytes of activations are not in it: they depend on the batch.

    Attributes:
        groups: Trainable leaves.
        trainable, total, percent: Numbers of parameters, and their ratio in percent.
        per_label: `{label: (params, bytes)}`, the frozen ones too.
        frozen_bytes: Bytes of the base, and of factors that stay at their start.
        trainable_bytes, gradient_bytes, optimizer_bytes: Bytes that training adds.
        adapter_bytes: Bytes of the tensors in `adapter.safetensors`, without its header of names and shapes.
    """

    groups: list[Group]
    trainable: int
    total: int
    percent: float
    per_label: dict[str, tuple[int, int]]
    frozen_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    adapter_bytes: int


def inspect_method(config: TrainConfig, *, num_labels: int) -> MethodReport:
    """Counts what a run of `config` would train, from the base's `config.json` and shapes alone.

    Args:
        config: Config of a run; base, method, task, pooling and dtype count, and no data is read.
        num_labels: Number of labels of a classification.
    """
    config = resolve(config)
    base = read_model_config(find_base(config.base))
    shapes = skeleton(
        base,
        task=config.task,
        num_labels=num_labels if config.task == "classification" else 1,
        pooling=config.pooling,
        dtype=jax.numpy.dtype(config.dtype),
    ).params
    params = jax.eval_shape(lambda p: lj.attach(p, config.method, key=jax.random.key(0)), shapes)
    labels = lj.label_params(params, config.method)
    counts = lj.count_params(params, labels)
    trainable = _trainable(params, config.method)
    optimizer = jax.eval_shape(adamw_by_label(config, labels, steps=1).init, trainable)
    trained_bytes = _bytes(trainable)
    return MethodReport(
        groups=trained_groups(params, config.method),
        trainable=counts.trainable,
        total=counts.total,
        percent=counts.percent,
        per_label={label: (count.params, count.bytes) for label, count in counts.per_label.items()},
        frozen_bytes=sum(count.bytes for label, count in counts.per_label.items() if label == "frozen"),
        trainable_bytes=trained_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=_bytes(optimizer),
        adapter_bytes=_bytes(_saved(params, config.method)),
    )


def _saved(params: Params, method: lj.Method) -> dict[str, Leaf]:
    """The arrays of the adapter's file; of shapes."""
    kept: list[lj.Method] = []

    def fold(params: Params) -> Params:
        folded, after = method.folded(params)
        kept.append(after)
        return folded

    folded = jax.eval_shape(fold, params)
    return saved_arrays(folded, kept[0])


class Tensor(NamedTuple):
    """A tensor of an adapter; `norm` is Frobenius'."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float


class AdapterReport(NamedTuple):
    """A saved adapter.

    Attributes:
        folder: Folder of its files.
        task: `task.json`; `None` where the adapter wasn't saved by a run.
        method: Name and saved options of its method.
        tensors: Name, shape and norm of each tensor.
        base: `{path: {"shape", "sample"}}`, the fingerprint of the frozen leaves.
        file_bytes: Size of `adapter.safetensors`.
    """

    folder: Path
    task: TaskFile | None
    method: dict[str, Any]
    tensors: list[Tensor]
    base: dict[str, dict[str, Any]]
    file_bytes: int


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Reads an adapter of a run, or any that `lj.save_adapter` wrote; the base isn't needed."""
    folder = Path(folder)
    task = None
    if not (folder / TENSORS).is_file() or (folder / "task.json").is_file():
        folder = adapter_folder(folder)
        task = read_task(folder)
    description = read_description(folder)
    tensors = [
        Tensor(name, array.shape, str(array.dtype), float(np.linalg.norm(array.astype(np.float64))))
        for name, array in sorted(files.read_safetensors(folder / TENSORS).items())
    ]
    return AdapterReport(
        folder=folder,
        task=task,
        method=description["method"],
        tensors=tensors,
        base=description["base"],
        file_bytes=(folder / TENSORS).stat().st_size,
    )


def pattern(path: str) -> str:
    """A path with its numbers as `*`.

    Example:
        >>> pattern("encoder/layers/11/mlp/up/bias")
        'encoder/layers/*/mlp/up/bias'
    """
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))


def _trainable(params: Params, method: lj.Method) -> Params:
    return jax.tree.map(lambda leaf, keep: leaf if keep else None, params, lj.trainable_mask(params, method))


def trained_groups(params: Params, method: lj.Method) -> list[Group]:
    """The leaves that a method trains, alike ones together; of arrays or shapes."""
    names = dict(_by_path(lj.label_params(params, method)))
    groups: dict[tuple[str, str], list[Leaf]] = {}
    for path, leaf in _by_path(_trainable(params, method)):
        groups.setdefault((pattern(path), names[path]), []).append(leaf)
    return [
        Group(
            pattern=path,
            label=label,
            leaves=len(leaves),
            shape=leaves[0].shape if len({leaf.shape for leaf in leaves}) == 1 else None,
            params=sum(math.prod(leaf.shape) for leaf in leaves),
            bytes=_bytes(leaves),
        )
        for (path, label), leaves in groups.items()
    ]


def _by_path(tree: PyTree) -> Iterable[tuple[str, Leaf]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
