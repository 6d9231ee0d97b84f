"""The errors that a user of the training can mend: a command prints them as one line, without a traceback."""

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
    """A checkpoint that cannot be written or read; those written earlier are whole."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not as it was written.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotFiniteError(TrainingError):
    """A loss, a gradient or a parameter that became NaN or infinite.

    Attributes:
        step: the step, counted from 1, at which it happened.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step
