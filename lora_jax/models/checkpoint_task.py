"""What a checkpoint itself says of its task, and what a model has that its checkpoint hasn't."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ..paths import leaves_by_path
from .checkpoint.hub import find_base
from .checkpoint.weight_files import locate_tensors, read_config
from .families.registry import family_of, read_model_config
from .family import Family, Task
from .model import Model
from .model_config import label_names


class CheckpointTask(NamedTuple):
    """What to pass to `load` as `task` and `num_labels`."""

    task: Task
    num_labels: int | None


def task_of_outputs(family: Family, outputs: int | None) -> CheckpointTask:
    """The task of a head with so many outputs: one is a regression's, `None` stands for no head.

    A decoder's head gives logits over the vocabulary, however many.
    """
    if family.is_decoder:
        return CheckpointTask("causal-lm", None)
    if outputs is None:
        return CheckpointTask(None, None)
    return CheckpointTask("regression", None) if outputs == 1 else CheckpointTask("classification", outputs)


def checkpoint_task(source: str | os.PathLike[str]) -> CheckpointTask:
    """The task of a Hugging Face folder, from the head that its checkpoint has.

    Args:
        source: as for `load`.

    Raises:
        FileError: see `load`.
    """
    folder = find_base(source)
    family = family_of(read_model_config(folder))
    shapes = {name: located.info.shape for name, located in locate_tensors(folder).items()}
    return task_of_outputs(family, head_outputs(family, shapes))


class CheckpointHead(NamedTuple):
    """The head that a checkpoint brings along.

    Attributes:
        outputs: How many numbers it gives; one is a regression's.
        labels: The names of the outputs, in their order; `None` where `config.json` has no name of its own for each, or
            only numbers them as transformers does (`LABEL_0`, `LABEL_1`, …).
    """

    outputs: int
    labels: tuple[str, ...] | None


def checkpoint_head(source: str | os.PathLike[str]) -> CheckpointHead | None:
    """The trained head of an encoder's checkpoint; `None` where it has none, as a base has that was only pretrained.

    Who trains it further has to keep the order of its labels, or to leave the head aside (`load(..., new_head=True)`).

    Args:
        source: As for `load`.

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
    is_numbered = labels == tuple(f"LABEL_{place}" for place in range(outputs))
    return CheckpointHead(outputs, None if is_numbered or len(set(labels or ())) != outputs else labels)


def has_other_head(source: str | os.PathLike[str], task: Task, num_labels: int | None) -> bool:
    """Whether an encoder's checkpoint has a head of another size than a task's: it is of no use for an adapter that
    brings its own, and `load` has to be told so (`new_head=True`)."""
    if task not in ("classification", "regression"):
        return False
    head = checkpoint_head(source)
    return head is not None and head.outputs != (1 if task == "regression" else num_labels)


def head_outputs(family: Family, shapes: Mapping[str, tuple[int, ...]], *, prefix: str = "") -> int | None:
    """The outputs of the head among tensors with Hugging Face names, `None` if there is none; `prefix` is before it."""
    shape = shapes.get(prefix + family.names.tensor(f"{family.logits}/kernel"))
    return shape[0] if shape else None


def absent_leaves(model: Model, source: str | os.PathLike[str]) -> list[str]:
    """The leaves of a model that its base has no tensor for, or `load` has drawn all the same: a head, a BERT's pooler.

    What they are isn't known to anyone else who loads the base, so an exchange has to take them along, trained or not.
    """
    family = family_of(model.config)
    if not family.draws_heads:
        return []
    names = family.names
    held = names.modern(locate_tensors(find_base(source)))
    new = f"{family.head}/" if model.new_head else ()
    return [path for path in leaves_by_path(model.params) if path.startswith(new) or names.tensor(path) not in held]
