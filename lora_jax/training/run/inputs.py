"""What a run's result depends on: options, data, base, formats; hashed part by part, so that a change can be named.

A run writes this to `run.json` when it starts, and resumes only if nothing in it has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

import lora_jax as lj
from lora_jax import files
from lora_jax.models.checkpoint.hub import ALIASES, KNOWN, sha256_once
from lora_jax.models.checkpoint.weight_files import locate_tensors, read_config

from ..config import RunConfig, TrainConfig
from ..data.run_data import RunData
from ..errors import RunFolderError

_FORMAT = 1
# Versions of what the code makes of the same inputs; to be increased when that changes.
FORMATS = {"tokens": 1, "batches": 1, "keys": 1, "checkpoint": 1}
_PACKAGES = ("lora_jax", "jax", "jaxlib", "optax", "flax", "grain", "numpy", "tokenizers")
# Entries of config.json that don't affect what the base computes here.
_COSMETIC = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

# For each part that may differ: what the folder holds a run on, and what has changed.
_CALLED = {
    "train": ("other training data", "{train}"),
    "dev": ("another dev set", "{dev}"),
    "test": ("another test set", "{test}"),
    "labels": ("other labels", "the labels' names or order"),
    "base configuration": ("another base", "the config.json of {base}"),
    "base weights": ("another base", "the weights of {base}"),
    "tokenizer": ("another tokenizer", "the tokenizer of {base}"),
    "formats": ("another version of lora_jax", "what it makes of the same inputs"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Everything that a run's result depends on.

    Attributes:
        options: Settled options, in plain types.
        parts: Hashes of each split's examples, of the labels, the base's configuration, weights and tokenizer.
        sources: Hashes of the data files' bytes by split; files of equal bytes needn't be read.
        formats: Versions of what the code makes of the inputs.
        versions: Versions of packages, and the platform, which decide the last bits.
    """

    options: Mapping[str, object]
    parts: Mapping[str, str]
    sources: Mapping[str, str]
    formats: Mapping[str, int]
    versions: Mapping[str, str]

    def differences(self, other: RunInputs) -> list[str]:
        """The parts that differ: names of options, of `parts`, or `"formats"`."""
        mine, others = (TrainConfig.from_dict(inputs.options) for inputs in (self, other))
        found = [f"`{name}`" for name in mine.differences(others)]
        found += [name for name in {**self.parts, **other.parts} if self.parts.get(name) != other.parts.get(name)]
        return found + (["formats"] if self.formats != other.formats else [])


def run_inputs(config: RunConfig, data: RunData) -> RunInputs:
    """Reads and hashes the inputs of a run.

    Args:
        config: Settled options of the run.
        data: Splits of the run.
    """
    parts = {**data.fingerprints(), "labels": _hash(json.dumps(data.task.labels)), **base_parts(config.base)}
    if config.task == "causal-lm":
        special = lj.models.read_special_tokens(config.base)
        told = json.dumps([special.texts, special.stops, special.chat_template], sort_keys=True)
        parts["tokenizer"] = _hash(parts["tokenizer"], told)
    return RunInputs(
        options=config.to_dict(),
        parts=parts,
        sources=source_sums(config),
        formats=FORMATS,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"platform": jax.default_backend()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its source
            found[name] = importlib.metadata.version(name)
    return found


def base_parts(source: str) -> dict[str, str]:
    """Hashes of a base's configuration, weights and tokenizer.

    Weight files are hashed whole, once per process, at 1 to 2 GB per second where the processor has instructions for
    it. A base from the hub is identified by its commit, which determines every byte.
    """
    folder = lj.models.find_base(source)
    config = {name: value for name, value in read_config(folder).items() if name not in _COSMETIC}
    tokenizer = folder / "tokenizer.json"
    return {
        "base configuration": _hash(json.dumps(config, sort_keys=True)),
        "base weights": _weights(source, folder),
        "tokenizer": _hash(_sum(tokenizer) if tokenizer.is_file() else ""),
    }


def _weights(source: str, folder: Path) -> str:
    is_pinned = ALIASES.get(source, source) in KNOWN  # it may come from outside the hub's cache
    if not is_pinned and folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return f"revision {folder.name}"
    held = {tensor.file for tensor in locate_tensors(folder).values()}
    return _hash(*(text for file in sorted(held) for text in (file.name, _sum(file))))


def source_sums(config: TrainConfig) -> dict[str, str]:
    """Hashes of the data files that exist, by split."""
    return {split: _sum(Path(source)) for split, source in config.sources.items() if Path(source).is_file()}


def _sum(path: Path) -> str:
    stat = path.stat()
    return sha256_once(path.resolve(), stat.st_size, stat.st_mtime_ns)


def _hash(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def write_inputs(path: Path, inputs: RunInputs) -> None:
    """Writes `run.json`, atomically."""
    files.write_json(path, files.with_checksum({"format": _FORMAT, **dataclasses.asdict(inputs)}))


def read_inputs(path: Path) -> RunInputs:
    """Reads `run.json`.

    Raises:
        FileError: The file is damaged.
        RunFolderError: The file is of another version.
    """
    content = files.read_json(path)
    fields = {field.name for field in dataclasses.fields(RunInputs)}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise RunFolderError(f"{path} isn't that of a run, or is of another version: choose another `output`.")
    content = files.without_checksum(content, path)
    if any(not isinstance(content.get(name), dict) for name in fields):
        raise RunFolderError(f"{path} is incomplete: choose another `output`.")
    return RunInputs(**{name: content[name] for name in fields})


def describe_differences(config: TrainConfig, differences: Iterable[str]) -> str:
    """Describes what a folder holds a run on, and what has changed since.

    Example:
        >>> config = TrainConfig(train="train.tsv", dev="dev.tsv", base="model", output="out")
        >>> describe_differences(config, ["dev", "base weights"])
        'another dev set: dev.tsv has changed since; another base: the weights of model have changed since'
    """
    named = {"train": config.train, "dev": config.dev or "", "test": config.test or "", "base": config.base}
    shown = []
    for part in differences:
        what, changed = _CALLED.get(part, ("other options", part))
        changed = changed.format(**named)
        shown.append(f"{what}: {changed} {'have' if changed.startswith('the weights') else 'has'} changed since")
    return "; ".join(shown)
