"""What becomes of the trained head that a base brings along: kept with the order of its labels, or drawn anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.models import CheckpointHead

from ..task import Classification, LabelledTask
from .label_names import folded, shown


class HeadChoice(NamedTuple):
    """What is done with the base's head.

    Attributes:
        task: The task, its labels in the order of the logits.
        is_new: Whether the base has a head, and it is left aside for a new one.
        note: What was done and why; `None` for a base without a head.
    """

    task: LabelledTask
    is_new: bool
    note: str | None


def choose_head(task: LabelledTask, head: CheckpointHead | None) -> HeadChoice:
    """Keeps the base's head if its outputs are the task's, and otherwise has another drawn.

    The outputs are a classification's if the base's names for them are the data's labels, all of them and no others;
    case, spaces and Unicode form aside. The labels are then in the base's order, and spelled as in the data. Outputs
    that are only numbered, as transformers numbers them (`LABEL_0`), are the labels `0`, `1`, … or `LABEL_0`, ….

    Args:
        task: As the training rows define it.
        head: Of the base.

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
            return HeadChoice(task, False, "the base's trained head is kept: it gives one number, too")
        return HeadChoice(task, True, f"{_NEW}: it has {_outputs(head)}, and a number is learnt")
    if (labels := _in_order(task.labels, head)) is None:
        return HeadChoice(
            task,
            True,
            f"{_NEW}: it has {_outputs(head)}, and the training rows have the labels {shown(task.labels, quoted=True)}"
            + (". To go on with the trained one, name the labels of the data as the base does" if head.labels else ""),
        )
    note = f"the base's trained head is kept, with the labels in its order: {shown(labels, quoted=True)}"
    if head.labels is not None and head.labels != labels:
        note += f" (which the base calls {shown(head.labels, quoted=True)})"
    return HeadChoice(dataclasses.replace(task, labels=labels), False, note)


_NEW = "the base's trained head is left aside, and a new one is drawn"


def _in_order(labels: Sequence[str], head: CheckpointHead) -> tuple[str, ...] | None:
    """The labels in the order of the outputs; `None` if they aren't the outputs."""
    numbers = [str(place) for place in range(head.outputs)]
    candidates = [head.labels] if head.labels is not None else [numbers, [f"LABEL_{number}" for number in numbers]]
    for names in candidates:
        for key in (str, folded):
            by_key = {key(label): label for label in labels}
            order = [key(name) for name in names]
            if len(by_key) == len(labels) == len(order) and by_key.keys() == set(order):
                return tuple(by_key[name] for name in order)
    return None


def _outputs(head: CheckpointHead) -> str:
    if head.labels is not None and head.outputs > 1:
        return f"the labels {shown(head.labels, quoted=True)}"
    return "one output" if head.outputs == 1 else f"{head.outputs} outputs without names"
