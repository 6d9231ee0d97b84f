"""The task and head that a checkpoint comes with, and the leaves that it lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ..paths import leaves_by_path
from .checkpoint.hub import find_base
from .checkpoint.weight_files import locate_tensors, read_config
from .families.bundled import family_of, read_model_config
from .family import Family, Task
from .model import Model
from .model_config import label_names


class CheckpointTask(NamedTuple):
    """Values of `task` and `num_labels` for `load`."""

    task: Task
    num_labels: int | None


def task_of_outputs(family: Family, outputs: int | None) -> CheckpointTask:
    """The task of a head with this many outputs: regression for one, hidden states for `None`, no head.

    A decoder's task is always `"causal-lm"`.
    """
    if family.is_decoder:
        return CheckpointTask("causal-lm", None)
    if outputs is None:
        return CheckpointTask(None, None)
    return CheckpointTask("regression", None) if outputs == 1 else CheckpointTask("classification", outputs)


def checkpoint_task(source: str | os.PathLike[str]) -> CheckpointTask:
    """The task of a Hugging Face folder, judged by the head in its checkpoint.

    Args:
        source: Folder, hub name or alias, as for `load`.

    Raises:
        FileError: See `load`.
    """
    folder = find_base(source)
    family = family_of(read_model_config(folder))
    shapes = {name: located.info.shape for name, located in locate_tensors(folder).items()}
    return task_of_outputs(family, head_outputs(family, shapes))


class CheckpointHead(NamedTuple):
    """The trained head in a checkpoint.

    Attributes:
        outputs: Number of outputs; 1 for regression.
        labels: Labels of the outputs, in order; `None` if `config.json` doesn't name each one, or only has the
            numbered names of transformers (`LABEL_0`, `LABEL_1`, …).
    """

    outputs: int
    labels: tuple[str, ...] | None


def checkpoint_head(source: str | os.PathLike[str]) -> CheckpointHead | None:
    """The trained head of an encoder's checkpoint; `None` if it has none, as after pretraining alone.

    To train it further, keep the order of its labels, or replace the head (`load(..., new_head=True)`).

    Args:
        source: Folder, hub name or alias, as for `load`.

    Raises:
        FileError: See `load`.
    """
    folder = find_base(source)
    family = family_of(read_model_config(folder))
    if family.is_decoder:
        return None
    held = family.names.modern(tensors := locate_tensors(folder))
    outputs = head_outputs(family, {name: tensors[old].info.shape for name, old in held.items()})
    if outputs is None:
        return None
    labels = label_names(read_config(folder))
    is_numbered = labels == tuple(f"LABEL_{number}" for number in range(outputs))
    return CheckpointHead(outputs, None if is_numbered or len(set(labels or ())) != outputs else labels)


def has_other_head(source: str | os.PathLike[str], task: Task, num_labels: int | None) -> bool:
    """Whether an encoder's checkpoint has a head of a different size than the task needs.

    Such a head must be replaced: `load(..., new_head=True)`.
    """
    if task not in ("classification", "regression"):
        return False
    head = checkpoint_head(source)
    return head is not None and head.outputs != (1 if task == "regression" else num_labels)


def head_outputs(family: Family, shapes: Mapping[str, tuple[int, ...]], *, prefix: str = "") -> int | None:
    """Number of outputs of the head among tensors with Hugging Face names after `prefix`; `None` without a head."""
    shape = shapes.get(prefix + family.names.tensor(f"{family.logits}/kernel"))
    return shape[0] if shape else None


def absent_leaves(model: Model, source: str | os.PathLike[str]) -> list[str]:
    """Paths of the model's leaves that `load` drew instead of reading from the base: a head, BERT's pooler.

    Whoever else loads the base can't know their values, so an exported adapter must include them, trained or not.
    """
    family = family_of(model.config)
    if not family.draws_heads:
        return []
    names = family.names
    held = names.modern(locate_tensors(find_base(source)))
    new = f"{family.head}/" if model.new_head else ()
    return [path for path in leaves_by_path(model.params) if path.startswith(new) or names.tensor(path) not in held]
