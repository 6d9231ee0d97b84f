"""Fine-tuning the bundled models: `train(config)` from Python, `lora-jax train` from a shell."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig as TrainConfig
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import NotFiniteError as NotFiniteError
from .errors import RunFolderError as RunFolderError
from .errors import TrainingError as TrainingError
from .run.loop import RunResult as RunResult
from .run.loop import train as train

if TYPE_CHECKING:
    from lora_jax.inference.classify import Predictor as Predictor
    from lora_jax.inference.classify import load_predictor as load_predictor
    from lora_jax.inference.complete import Completer as Completer
    from lora_jax.inference.complete import GenerationOptions as GenerationOptions
    from lora_jax.inference.complete import load_completer as load_completer

# What answers lies in a room above; these names of it are at home here for those who train and ask in one script.
_OF_INFERENCE = {
    "Predictor": "classify",
    "load_predictor": "classify",
    "Completer": "complete",
    "GenerationOptions": "complete",
    "load_completer": "complete",
}


def __getattr__(name: str) -> Any:
    if name in _OF_INFERENCE:
        return getattr(importlib.import_module(f"lora_jax.inference.{_OF_INFERENCE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
