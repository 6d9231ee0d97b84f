"""`config.yaml`: the options of a run in a file."""

from __future__ import annotations

from pathlib import Path

import yaml

from lora_jax import files

from .config import TrainConfig
from .errors import ConfigError
from .yaml_file import read_yaml_file


def read_yaml(path: str | Path) -> dict[str, object]:
    """The options in a YAML file, read safely: see `read_yaml_file`."""
    try:
        options = read_yaml_file(path)
    except files.FileError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path} must hold options, one a line (`train: data.tsv`).")
    return options


def write_yaml(path: str | Path, config: TrainConfig) -> None:
    """Writes the settled options, atomically."""
    files.write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=120))
