"""Fine-tuning the bundled models: `train(config)` from Python, `lora-jax train` from a shell."""

from __future__ import annotations

from .completer import Completer as Completer
from .completer import GenerationOptions as GenerationOptions
from .completer import load_completer as load_completer
from .config import TrainConfig as TrainConfig
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import NotFiniteError as NotFiniteError
from .errors import RunFolderError as RunFolderError
from .errors import TrainingError as TrainingError
from .loop import RunResult as RunResult
from .loop import train as train
from .predict import Predictor as Predictor
from .predict import load_predictor as load_predictor
