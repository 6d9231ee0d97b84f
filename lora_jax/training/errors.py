"""The errors of training that a user can fix: a command prints them as one line, without a traceback."""

from __future__ import annotations

from lora_jax.errors import LoraJaxError


class TrainingError(LoraJaxError):
    """A run that cannot start or go on; the message says why and what to do."""


class ConfigError(TrainingError):
    """An option that is unknown, of the wrong type or out of range."""


class DataError(TrainingError):
    """A data file that cannot be used; the message names the file, the row and the fix."""


class RunFolderError(TrainingError):
    """An output folder that belongs to something else."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read; those written earlier are intact."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not as it was written.

    Attributes:
        reason: What is wrong with it.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotFiniteError(TrainingError):
    """A loss, a gradient or a parameter that became NaN or infinite.

    Attributes:
        step: Step at which it happened, counted from 1.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step
