"""What vLLM refuses in a PEFT folder, or computes otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping

from ..adapters import AdapterError
from ..errors import ArgumentError
from ..files import read_safetensors_header
from .peft.adapter_config import PeftConfig, read_peft_config, scale_of, variants, weights_file
from .peft.keys import FactorKey, LeafKey, parse_key
from .peft.patterns import PatternError, Patterns

# What `--max-lora-rank` accepts; 16 unless it is set.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_problems(
    folder: str | os.PathLike[str], *, max_lora_rank: int = 16, modules: Collection[str] | None = None
) -> list[str]:
    """Why vLLM wouldn't serve an adapter, or would serve another function than PEFT's; each as one sentence.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`. No tensor is read.
        max_lora_rank: Value of vLLM's `--max-lora-rank`: one of 1, 8, 16, 32, 64, 128, 256, 320 and 512.
        modules: Last segments of the modules that the served model can adapt, `{"q_proj", "v_proj", …}`; targets
            aren't checked if `None`, since they depend on the model.

    Returns:
        The problems; empty if there are none.

    Raises:
        AdapterError, FileError: The folder can't be read, see `read_peft_config` and `import_peft`.
        ValueError: `max_lora_rank` isn't a value that vLLM accepts.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, names = {"q": {"kernel": jnp.ones((32, 32))}}, {"q/kernel": "model.layers.0.self_attn.q_proj"}
        >>> method = lj.LoRA(rank=20, alpha=20, targets=("q",))
        >>> params = lj.attach(base, method, key=jax.random.key(0))
        >>> folder = lj.interop.export_peft(tempfile.mkdtemp(), params, method, names=names)
        >>> lj.interop.vllm_problems(folder)
        ['The rank is 20, and vLLM takes up to 16: start it with `--max-lora-rank 32`.']
        >>> lj.interop.vllm_problems(folder, max_lora_rank=32)
        []

    Reference:
        vLLM, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, `vllm/lora/layers/base_linear.py` and
        `vllm/config/lora.py`. Read, not run. `PEFTHelper` drops the entries of `adapter_config.json` that it doesn't
        have, `rank_pattern` and `alpha_pattern` among them; ranks follow from the tensors, and `lora_alpha / r` (or
        `/ √r`) is the scale of all. So patterns do no harm where every module's scale is that one.
    """
    if max_lora_rank not in RANKS:
        raise ArgumentError(f"`max_lora_rank` must be one of {', '.join(map(str, RANKS))}, got {max_lora_rank!r}.")
    config = read_peft_config(folder)
    file = weights_file(folder)
    header = read_safetensors_header(file)
    found = variants(config)
    if config.get("use_dora"):
        found.append("`use_dora`: DoRA, whose magnitudes vLLM doesn't have")
    problems = [f"vLLM has plain LoRA only, and this is {variant}." for variant in found]
    if config.get("modules_to_save"):
        saved = ", ".join(config["modules_to_save"][:5])
        problems.append(f"`modules_to_save` is {saved}, and vLLM takes no module trained in full.")
    if config["bias"] != "none":
        problems.append(f"`bias` is {config['bias']!r}, and vLLM takes no trained biases.")
    if config.get("ensure_weight_tying"):
        problems.append("`ensure_weight_tying` is set, and vLLM doesn't read it.")
    if "target_modules" not in config:
        problems.append("`target_modules` is missing, and vLLM reads it.")
    factors, whole = [], []
    for name in header:
        try:
            key = parse_key(name, str(file))
        except AdapterError as error:
            problems.append(f"{str(error).removeprefix(f'{file}: ')}.")
            continue
        if isinstance(key, FactorKey) and key.role == "magnitude" and not config.get("use_dora"):
            problems.append(f"'{name}' is DoRA's, and vLLM has plain LoRA only.")
        (factors if isinstance(key, FactorKey) else whole).append((name, key))
    ranks = {key.module: header[name].shape[0] for name, key in factors if key.role == "a" and header[name].shape}
    problems += _scales(config, ranks)
    problems += _ranks(config["r"], [header[name].shape for name, key in factors if key.role == "a"], max_lora_rank)
    rest = [name for name, key in whole if not (isinstance(key, LeafKey) and key.holder == "base_layer")]
    if rest and not config.get("modules_to_save") and config["bias"] == "none":
        problems.append(f"vLLM takes factors only, and the file has {', '.join(rest[:5])}.")
    if modules is not None:
        targets = sorted({key.module for _, key in factors if key.module.rpartition(".")[2] not in modules})
        if targets:
            problems.append(f"The model doesn't adapt {', '.join(targets[:5])}{_more(len(targets) - 5)}.")
    return problems


def _scales(config: PeftConfig, ranks: Mapping[str, int]) -> list[str]:
    """Modules that vLLM would scale by another number than PEFT: it has one number for all, by `lora_alpha` and `r`."""
    set_here = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if not set_here:
        return []
    rank_stabilized = bool(config.get("use_rslora"))
    alphas = Patterns(config.get("alpha_pattern") or ())
    everywhere = scale_of(config["lora_alpha"], config["r"], rank_stabilized=rank_stabilized)
    said, other = " and ".join(f"`{name}`" for name in set_here), []
    for module, rank in ranks.items():
        try:
            key = alphas.first(module)
        except PatternError as error:
            return [f"Whether vLLM would scale {module} as PEFT does can't be told: in `alpha_pattern`, {error}."]
        alpha = config["lora_alpha"] if key is None else config["alpha_pattern"][key]
        if rank and not math.isclose(scale_of(alpha, rank, rank_stabilized=rank_stabilized), everywhere, rel_tol=1e-6):
            other.append(module)
    if not other:
        return []
    return [
        f"By {said}, PEFT scales {', '.join(other[:5])}{_more(len(other) - 5)} by another number than {everywhere:g}, "
        "and vLLM, which doesn't read them, everything by it: it would compute another function."
    ]


def _ranks(r: int, shapes: list[tuple[int, ...]], most: int) -> list[str]:
    rank = max([r, *(shape[0] for shape in shapes if shape)])
    if rank <= most:
        return []
    enough = next((size for size in RANKS if size >= rank), None)
    if enough is None:
        return [f"The rank is {rank}, and vLLM takes up to {RANKS[-1]}: export it with a lower rank."]
    return [f"The rank is {rank}, and vLLM takes up to {most}: start it with `--max-lora-rank {enough}`."]


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
