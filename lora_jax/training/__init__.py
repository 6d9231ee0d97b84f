"""Fine-tuning the bundled models: `train(config)` from Python, `lora-jax train` from a shell."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .config import TrainConfig as TrainConfig
from .config import resolve as resolve
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import NotFiniteError as NotFiniteError
from .errors import RunFolderError as RunFolderError
from .errors import TrainingError as TrainingError

if TYPE_CHECKING:
    from lora_jax.inference.classify import Predictor as Predictor
    from lora_jax.inference.classify import load_predictor as load_predictor
    from lora_jax.inference.complete import Completer as Completer
    from lora_jax.inference.complete import GenerationOptions as GenerationOptions
    from lora_jax.inference.complete import load_completer as load_completer

    from .run.loop import RunResult as RunResult
    from .run.loop import train as train

# Imported on first use, so that `lora-jax --help` knows the options without the packages that training needs. Inference
# lies in a room above; its names are offered here to those who train and predict in one script.
_LAZY = {
    "train": "training.run.loop",
    "RunResult": "training.run.loop",
    "Predictor": "inference.classify",
    "load_predictor": "inference.classify",
    "Completer": "inference.complete",
    "GenerationOptions": "inference.complete",
    "load_completer": "inference.complete",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"lora_jax.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
