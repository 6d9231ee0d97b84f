"""Whether the trained head of a base is kept, with the order of its labels, or replaced by a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.models import CheckpointHead
from lora_jax.text import listed

from ..task import Classification, LabelledTask
from .label_names import folded


class HeadChoice(NamedTuple):
    """Whether the base's head is kept.

    Attributes:
        task: The task, with its labels in the order of the logits.
        is_new: Whether the base has a head that is replaced by a new one.
        note: The decision and its reason; `None` for a base without a head.
    """

    task: LabelledTask
    is_new: bool
    note: str | None


def choose_head(task: LabelledTask, head: CheckpointHead | None) -> HeadChoice:
    """Keeps the base's head if its outputs are those of the task, and otherwise asks for a new one.

    The head fits a classification if its names for the outputs are exactly the labels of the data, apart from case,
    spaces and Unicode form. The labels then take the order of the base and keep the spelling of the data. Outputs that
    are only numbered, in transformers' manner (`LABEL_0`), stand for the labels `0`, `1`, … or `LABEL_0`, ….

    Args:
        task: The task that the training examples define.
        head: The base's head, if it has one.

    Example:
        >>> task = Classification(labels=("negative", "positive"))
        >>> choice = choose_head(task, CheckpointHead(2, ("POSITIVE", "NEGATIVE")))
        >>> choice.task.labels, choice.is_new
        (('positive', 'negative'), False)
        >>> choose_head(task, CheckpointHead(2, ("true", "false"))).is_new
        True
    """
    if head is None:
        return HeadChoice(task, False, None)
    if not isinstance(task, Classification):
        if head.outputs == 1:
            return HeadChoice(task, False, "the base's trained head is kept: it also predicts one number")
        return HeadChoice(task, True, f"{_NEW}: it has {_outputs(head)}, and the task is to predict a number")
    if (labels := _in_order(task.labels, head)) is None:
        return HeadChoice(
            task,
            True,
            f"{_NEW}: it has {_outputs(head)}, and the training data has the labels {_quoted(task.labels)}"
            + (". To keep the trained head, use the base's names for the labels" if head.labels else ""),
        )
    note = f"the base's trained head is kept, with its order of the labels: {_quoted(labels)}"
    if head.labels is not None and head.labels != labels:
        note += f" (which the base calls {_quoted(head.labels)})"
    return HeadChoice(dataclasses.replace(task, labels=labels), False, note)


_NEW = "the base's trained head is replaced by a new one"


def _in_order(labels: Sequence[str], head: CheckpointHead) -> tuple[str, ...] | None:
    """The labels in the order of the outputs; `None` if the outputs are others."""
    numbers = [str(index) for index in range(head.outputs)]
    candidates = [head.labels] if head.labels is not None else [numbers, [f"LABEL_{number}" for number in numbers]]
    for names in candidates:
        for key in (str, folded):
            by_key = {key(label): label for label in labels}
            order = [key(name) for name in names]
            if len(by_key) == len(labels) == len(order) and by_key.keys() == set(order):
                return tuple(by_key[name] for name in order)
    return None


def _quoted(labels: Sequence[str]) -> str:
    return listed(labels, 8, form="{!r}")


def _outputs(head: CheckpointHead) -> str:
    if head.labels is not None and head.outputs > 1:
        return f"the labels {_quoted(head.labels)}"
    return "one output" if head.outputs == 1 else f"{head.outputs} outputs without names"
