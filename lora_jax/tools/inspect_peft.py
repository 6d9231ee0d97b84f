"""What a PEFT folder holds, whether it can be read here, and what vLLM would say of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax import files, interop
from lora_jax.adapters import AdapterError
from lora_jax.interop.peft.adapter_config import CONFIG, PeftConfig, weights_file
from lora_jax.interop.peft.keys import PREFIX, FactorKey, parse_key
from lora_jax.training.errors import TrainingError

from .inspect import Tensor
from .source import check_peft_source


class TargetModule(NamedTuple):
    """Modules of one name, in so many layers, that have factors of this rank."""

    name: str
    modules: int
    rank: int


class PeftReport(NamedTuple):
    """A PEFT folder.

    Attributes:
        folder: Folder of its files.
        file_bytes: Size of its tensor file.
        config: Its `adapter_config.json`, without empty entries.
        targets: Modules with factors.
        whole: Tensors that aren't factors: trained in full, or saved along by PEFT.
        tensors: Name, shape and norm of each tensor.
        refusal: Reason why `import_peft` refuses it; `None` if it doesn't, or if that is unknown.
        unchecked: Reason why the base couldn't be checked; `None` if it was.
        vllm: See `lj.interop.vllm_problems`.
    """

    folder: Path
    file_bytes: int
    config: PeftConfig
    targets: list[TargetModule]
    whole: list[str]
    tensors: list[Tensor]
    refusal: str | None
    unchecked: str | None
    vllm: list[str]


def inspect_peft(folder: str | Path, *, base: str | None = None, max_lora_rank: int = 16) -> PeftReport:
    """Reads a PEFT folder of any kind, also one that can't be imported.

    Args:
        folder: Folder with an `adapter_config.json`.
        base: Folder or name of its base, to check names and shapes; the one that it names if `None`.
        max_lora_rank: Highest rank that vLLM is set to serve.

    Raises:
        FileError: A file is missing, corrupt or too large to be honest.
    """
    folder = Path(folder)
    files.settle(folder)
    config = files.read_json(files.within_folder(folder, CONFIG))
    if not isinstance(config, dict):
        raise TrainingError(f"{folder / CONFIG} must hold an object, and holds a {type(config).__name__}.")
    file = weights_file(folder)
    tensors = sorted(
        Tensor(name, array.shape, str(array.dtype), float(np.linalg.norm(array.astype(np.float64))))
        for name, array in files.iter_safetensors(file)
    )
    targets, whole = _sorted_tensors(tensors)
    refusal, unchecked, modules = _importable(folder, base)
    return PeftReport(
        folder=folder,
        file_bytes=file.stat().st_size,
        config={name: value for name, value in config.items() if value not in (None, False, [], {}, "")},
        targets=targets,
        whole=whole,
        tensors=tensors,
        refusal=refusal,
        unchecked=unchecked,
        vllm=_vllm(folder, max_lora_rank, modules),
    )


def _sorted_tensors(tensors: list[Tensor]) -> tuple[list[TargetModule], list[str]]:
    counts: Counter[tuple[str, int]] = Counter()
    whole = []
    for tensor in tensors:
        try:
            key = parse_key(tensor.name, "")
        except AdapterError:  # another method's
            continue
        if not isinstance(key, FactorKey):
            whole.append(tensor.name.removeprefix(PREFIX))
        elif key.role == "a" and tensor.shape:
            counts[_within_layer(key.module), tensor.shape[0]] += 1
    return [TargetModule(name, count, rank) for (name, rank), count in sorted(counts.items())], whole


def _within_layer(module: str) -> str:
    """What a module is called in its layer: `attention.self.query` of `bert.encoder.layer.3.attention.self.query`."""
    segments = module.split(".")
    numbers = [place for place, segment in enumerate(segments) if segment.isdigit()]
    return ".".join(segments[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(segments) else module


def _importable(folder: Path, base: str | None) -> tuple[str | None, str | None, set[str] | None]:
    """Why not, what couldn't be checked, and the names of the base's modules."""
    try:
        names = check_peft_source(folder, base=base)
    except (TrainingError, files.FileError) as error:  # the folder itself has been read: it is about the base
        return None, str(error), None
    except ValueError as error:
        return str(error), None, None
    weights = [value for path, value in names.items() if path.endswith(("/kernel", "/embedding"))]
    modules = [name for value in weights for name in ((value,) if isinstance(value, str) else value)]
    return None, None, {name.rpartition(".")[2] for name in modules}


def _vllm(folder: Path, max_lora_rank: int, modules: set[str] | None) -> list[str]:
    try:
        return interop.vllm_problems(folder, max_lora_rank=max_lora_rank, modules=modules)
    except AdapterError as error:
        return [f"vLLM has LoRA only: {error}."]
