"""Scalars for TensorBoard, where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import TrainingError


class Scalars:
    """Writes scalars into `folder`; does nothing if that is `None`.

    Args:
        folder: for TensorBoard's event files.
        start: the step that a run goes on from; what was written of later ones is hidden.
    """

    def __init__(self, folder: Path | None, *, start: int = 0) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise TrainingError("`tensorboard` needs tensorboardX: pip install 'lora_jax[tensorboard]'.") from error
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        """One point of each curve `prefix/name`."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{prefix}/{name}", value, step)
