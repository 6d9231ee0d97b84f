"""Scalars for TensorBoard, on request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import TrainingError

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class Scalars:
    """Writer of scalars, and a context manager.

    Args:
        folder: Folder of TensorBoard's event files; `None` to write nothing.
        start: Step that the run resumes from; scalars of later steps that were written before are hidden.
    """

    def __init__(self, folder: Path | None, *, start: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                "`tensorboard` needs tensorboardX, which isn't installed: pip install 'lora_jax[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        """Adds a point to each curve `prefix/name`."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{prefix}/{name}", value, step)
