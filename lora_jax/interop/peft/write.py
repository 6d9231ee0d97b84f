"""From an adapted tree to a PEFT folder."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import AdapterError
from lora_jax.files import replacing, write_json, write_safetensors
from lora_jax.masks import label_params
from lora_jax.methods import DoRA, DoRAWeight, LoRA, LoRAWeight, Method
from lora_jax.methods.base import FROZEN
from lora_jax.methods.inserting_method import InsertingMethod
from lora_jax.methods.lora.starts import FROM_WEIGHT
from lora_jax.paths import leaves_by_path
from lora_jax.state import lasting_state
from lora_jax.text import listed
from lora_jax.types import DTypeLike, Leaf, Params, Uses
from lora_jax.weights import AdaptedWeight, is_adapted, is_traced

from ..layout import export_factors, is_embedding, leaf_layout, require_no_stack, weight_axes
from ..module_names import BIAS, ModuleTable, Names, kind
from ..stacks import Stacks
from .adapter_config import (
    CONFIG,
    SELECTION,
    WEIGHTS,
    PeftConfig,
    alpha_of,
    is_saved,
    listed_targets,
    scale_of,
    variants,
)
from .keys import factor_key, leaf_key
from .patterns import PatternError, Patterns, literal

# Heads that PEFT saves in full by itself, and looks for when it loads, whatever `modules_to_save` says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = (*_HEADS, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


class _Factored(NamedTuple):
    """One weight with factors: its module there, what else it is tied to, its rank and its alpha."""

    module: str
    tied_to: tuple[str, ...]
    node: LoRAWeight | DoRAWeight
    embedding: bool
    rank: int
    alpha: float


class _Whole(NamedTuple):
    """What is written in full: modules, biases beside them, and how PEFT is told."""

    entries: list[str]
    paths: list[str]
    bias: str


def export_peft(
    folder: str | os.PathLike[str],
    params: Params,
    method: Method,
    *,
    names: Names,
    base_name: str | None = None,
    task_type: str | None = None,
    uses: Uses | None = None,
    fan_in_fan_out: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    config: PeftConfig | None = None,
) -> Path:
    """Writes an adapter that `peft`, `transformers` and vLLM load.

    Writes `adapter_config.json` and `adapter_model.safetensors`; both are complete on disk before either takes its
    place. Targets are listed by their full names, and other ranks and alphas in `rank_pattern` and `alpha_pattern`.
    Leaves trained in full become `modules_to_save`, and biases `bias="lora_only"` where only those of the adapted
    modules are trained, else `bias="all"`. A leaf that is embedding and output at once goes out with
    `ensure_weight_tying`, by which PEFT changes both uses as one.

    Args:
        folder: Folder to write to; made if it doesn't exist.
        params: Trained tree from `attach`.
        method: `LoRA` or `DoRA` that it was trained with.
        names: `{leaf path: Hugging Face module}`, a bundled model's `names` or a table of your own, see
            `import_peft`; what is trained must be in it.
        base_name: PEFT's name of the base (`base_model_name_or_path`): a hub name or a folder.
        task_type: `"SEQ_CLS"`, `"CAUSAL_LM"`, …: with it PEFT knows the model's class, and with `"SEQ_CLS"` it expects
            the head in the file, so the head is written, trained or not.
        uses: Result of `trace_weights`; needed where a leaf that is written in full has more than two axes, or a
            weight is stored `(out, in)`, as Equinox does.
        fan_in_fan_out: Modules (their names, or what follows a dot in them) that store a weight as `(in, out)` there,
            GPT-2's `Conv1D`: `("c_attn", "c_proj", "c_fc")`. A bundled model's `names` say it already; for a table of
            your own it is asked for where a square weight is written in full, `()` if there are none.
        dtype: Dtype of the tensors; each leaf's own if `None`.
        config: Entries of another `adapter_config.json` to keep where the tree doesn't decide them, from
            `read_peft_config`: What was imported goes out as it came in.

    Returns:
        The folder.

    Raises:
        AdapterError: PEFT has no place for what is trained: another method, a stack of layers, a convolution; or a
            trained leaf has no name, values that are not finite, or a layout there that isn't told (see
            `fan_in_fan_out`).
        FileError: The files cannot be written.

    Warns:
        UserWarning: PEFT saves and trains modules as a whole; where that takes frozen leaves along, they are named.
            Their values are written as they are, so what is computed is the same. Or `params` holds state, such as
            batch statistics, which isn't written.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base = {"query": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("query",))
        >>> params = lj.attach(base, method, key=jax.random.key(0))
        >>> names = {"query/kernel": "layer.0.query", "query/bias": "layer.0.query"}
        >>> folder = lj.interop.export_peft(tempfile.mkdtemp(), params, method, names=names)
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if isinstance(method, InsertingMethod):
        raise AdapterError(
            f"{type(method).__name__} puts arrays into the layers that PEFT's adapters of weights have no place for: "
            "keep the folder that `lj.save_adapter` writes"
        )
    if not isinstance(method, LoRA):
        raise AdapterError(
            f"PEFT has no format for {type(method).__name__}, only for LoRA and DoRA: write what it changed with "
            "`export_delta`, or whole files after `lj.merge_params`"
        )
    if task_type is not None and task_type not in _TASKS:
        raise AdapterError(f"`task_type` must be one of {', '.join(_TASKS)} or None, got {task_type!r}")
    dora = isinstance(method, DoRA)
    found = variants(config or {})
    if config is not None and bool(config.get("use_dora")) != dora:
        found.append(f"`use_dora` is {config.get('use_dora')!r}, and the method is {type(method).__name__}")
    if found:
        raise AdapterError(f"`config` describes another adapter than this one: {'; '.join(found)}")
    leaves = leaves_by_path(params)
    partial = [path for path, leaf in leaves.items() if is_adapted(leaf) and _lacks_arrays(leaf)]
    if partial:
        raise AdapterError(
            f"`params` lacks base weights or factors, at {', '.join(partial[:5])}: pass `lj.combine(trainable, frozen)`"
        )
    if state := lasting_state(params):
        warnings.warn(
            f"`params` holds state, {listed(state, 4)}, which PEFT's format has no place for: it isn't written, and "
            "the exported adapter runs with the base's. `lj.save_adapter` saves state with the adapter.",
            stacklevel=2,
        )
    stacks = Stacks(names, leaves)
    leaves, uses = stacks.apart(leaves), stacks.uses(uses)
    table = ModuleTable(names, leaves, fan_in_fan_out)
    factored = {path: _factored(path, leaf, table, uses, method) for path, leaf in leaves.items() if is_adapted(leaf)}
    if not factored:
        raise AdapterError("`params` has no factors: pass the tree from `lj.attach`, not a merged one")
    dropouts = {target.node.dropout for target in factored.values()}
    if len(dropouts) > 1:
        raise AdapterError(f"`params` has factors with several dropouts, {sorted(dropouts)}, and PEFT has one")
    labels = stacks.apart(leaves_by_path(label_params(params, method)), lambda label, _: label)
    trained = [path for path, label in labels.items() if path not in factored and label != FROZEN]
    for path in trained:
        table.module(path)  # refuses what has no name
    kept = dict(config or {})
    task_type = kept.get("task_type") if task_type is None else task_type
    whole = _whole(trained, factored, table, task_type)

    targets = {target.module for target in factored.values()}
    shared = {module for target in factored.values() for module in target.tied_to}
    tensors: dict[str, np.ndarray] = {}
    for target in factored.values():
        a, b = export_factors(target.node)
        tensors[factor_key(target.module, "a", embedding=target.embedding)] = a
        tensors[factor_key(target.module, "b", embedding=target.embedding)] = b
        for other in target.tied_to:
            tensors[factor_key(other, "a", embedding=False)] = b.T
            tensors[factor_key(other, "b", embedding=False)] = a.T
        if isinstance(target.node, DoRAWeight):
            tensors[factor_key(target.module, "magnitude", embedding=None)] = np.asarray(target.node.magnitude).ravel()
    for path in whole.paths:
        for module in (table.module(path), *table.tied_to(path)):
            layout = leaf_layout(path, leaves[path], uses, in_out=table.stores_in_out(module))
            tensors[leaf_key(module, kind(path), wrapped=module in targets)] = layout.export(leaves[path])
    if dtype is not None:
        tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}
    _require_finite(tensors)

    description = {
        **kept,
        **_patterns(factored, method),
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": kept.get("base_model_name_or_path") if base_name is None else base_name,
        "inference_mode": True,
        "lora_dropout": dropouts.pop(),
        "use_rslora": method.scaling == "rank_stabilized",
        "use_dora": dora,
        "bias": whole.bias,
        "modules_to_save": whole.entries or None,
        "fan_in_fan_out": bool(kept.get("fan_in_fan_out")) or any(map(table.stores_in_out, targets)),
        "init_lora_weights": kept.get("init_lora_weights", True),
        **(_listed(sorted(targets | shared)) if shared else _selection(kept, targets, table, whole)),
    }
    tied = bool(shared) or any(table.tied_to(path) for path in whole.paths)
    if tied or "ensure_weight_tying" in kept:  # older versions of PEFT don't know the entry
        description["ensure_weight_tying"] = tied
    folder = Path(folder)
    with replacing(folder, (WEIGHTS, CONFIG)) as staging:
        write_safetensors(staging / WEIGHTS, tensors, {"format": "pt"})
        write_json(staging / CONFIG, dict(sorted(description.items())))
    return folder


def _factored(path: str, node: Leaf, table: ModuleTable, uses: Uses | None, method: LoRA) -> _Factored:
    if not isinstance(node, LoRAWeight | DoRAWeight):
        raise AdapterError(
            f"`{path}` is a {type(node).__name__}, and PEFT's format has a place for LoRA's factors only"
        )
    if is_traced(node):
        raise AdapterError(f"`{path}` is abstract: export outside of `jax.jit`")
    module = table.module(path)
    if table.tied_to(path) and not isinstance(node, LoRAWeight):
        raise AdapterError(
            f"`{path}` is {' and '.join((module, *table.tied_to(path)))} at once, and PEFT has magnitudes for each: "
            "leave it to LoRA, or give each a leaf of its own, `lj.models.load(..., tie_word_embeddings=False)`"
        )
    require_no_stack(path, node.axes)
    if node.ndim == 2 or path in (uses or {}):
        labels = weight_axes(path, node, uses)
        if labels != node.axes:
            raise AdapterError(
                f"the factors of `{path}` are labelled {node.axes!r}, and `uses` says {labels!r}: attach them with "
                "`uses` as well, so that `a` stands at the side of the inputs"
            )
    rank = node.one_pair().rank
    alpha = alpha_of(node.scale, rank, rank_stabilized=method.scaling == "rank_stabilized")
    if math.isclose(alpha, method.alpha, rel_tol=1e-9):
        alpha = _plain(method.alpha)
    if not alpha > 0:
        raise AdapterError(f"the scale of `{path}` is {node.scale!r}, and a positive one is expected")
    return _Factored(module, table.tied_to(path), node, is_embedding(path, uses), rank, alpha)


def _lacks_arrays(node: AdaptedWeight) -> bool:
    return any(getattr(node, name) is None for name in ("base", *node.saved) if name not in node.optional)


def _whole(
    trained: Sequence[str], factored: Mapping[str, _Factored], table: ModuleTable, task_type: str | None
) -> _Whole:
    """Which modules PEFT must save in full, and which biases beside them, so that every trained leaf is written."""
    targets = {target.module for target in factored.values()}
    heads = {module for path in trained if kind(path) != BIAS and (module := table.module(path)) not in targets}

    # Several modules of one head are named by it: so PEFT names them itself.
    implied = _HEADS.get(task_type or "", ())
    found = {entry for entry in implied if any(is_saved({entry}, module) for module in table.modules)}
    if implied and not found:
        raise AdapterError(
            f"with `task_type={task_type!r}` PEFT looks for a head, {' or '.join(implied)}, and `names` has none: name "
            "its leaves, or leave `task_type` out"
        )
    # PEFT knows a tied embedding by the name of what it is tied to.
    tied = {other for path in trained for other in table.tied_to(path)}
    entries = {_entry(module) for module in heads} | found | tied
    saved = [module for module in table.modules if is_saved(entries, module)]
    both = sorted(targets.intersection(saved))
    if both:
        raise AdapterError(
            f"{', '.join(both)} would be trained in full by PEFT as well, since the name ends like an entry of "
            f"`modules_to_save`, {', '.join(sorted(entries))}: train it by factors or in full"
        )
    rest = [path for path in trained if table.module(path) not in saved]
    bias = "none" if not rest else "lora_only" if all(table.module(path) in targets for path in rest) else "all"
    paths = [path for module in saved for path in table.leaves_of(module)]
    if bias != "none":
        paths += [
            path
            for path in table.biases()
            if table.module(path) not in saved and (bias == "all" or table.module(path) in targets)
        ]
    along = sorted(set(paths) - set(trained))
    if along:
        more = f" and {len(along) - 5} more" if len(along) > 5 else ""
        warnings.warn(
            f"PEFT saves and trains modules as a whole (`modules_to_save`) and biases together (`bias`): these frozen "
            f"leaves are written as they are, and would be trained there: {', '.join(along[:5])}{more}",
            stacklevel=3,
        )
    return _Whole(sorted(entries), paths, bias)


def _entry(module: str) -> str:
    head = module.partition(".")[0]
    return head if head in ("classifier", "score") else module


def _patterns(factored: Mapping[str, _Factored], method: LoRA) -> dict[str, object]:
    """`r`, `lora_alpha` and the exceptions from them."""
    targets = list(factored.values())
    rank, alpha = int(method.rank), _plain(method.alpha)
    if method.init in FROM_WEIGHT:  # the scale stays, of factors of twice the rank
        stabilized = method.scaling == "rank_stabilized"
        scale = scale_of(method.alpha, method.rank, rank_stabilized=stabilized)
        rank, alpha = 2 * rank, alpha_of(scale, 2 * rank, rank_stabilized=stabilized)
    modules = {module: target for target in targets for module in (target.module, *target.tied_to)}
    ranks = {module: target.rank for module, target in modules.items() if target.rank != rank}
    alphas = {module: target.alpha for module, target in modules.items() if target.alpha != alpha}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _keys(ranks, list(modules)),
        "alpha_pattern": _keys(alphas, list(modules)),
    }


def _plain(number: float) -> float:
    """As JSON has it: PEFT expects a whole number where it is one."""
    return int(number) if float(number).is_integer() else float(number)


def _keys(values: Mapping[str, object], modules: Collection[str]) -> dict[str, object]:
    """A pattern of PEFT's with these values; as names, or anchored where a name would mean another module as well."""
    try:
        patterns = Patterns(values)
        plain = all(patterns.first(module) == (module if module in values else None) for module in modules)
    except PatternError:
        plain = False
    return dict(values) if plain else {literal(module): value for module, value in values.items()}


def _selection(kept: PeftConfig, targets: Collection[str], table: ModuleTable, whole: _Whole) -> dict[str, object]:
    """`target_modules` and what else chooses targets: those of `kept` if they mean the same, else full names."""
    chosen = {**kept, "modules_to_save": whole.entries}
    if set(listed_targets(chosen, table.modules) or ()) == set(targets):
        return {name: kept.get(name) for name in SELECTION}
    listed = _listed(sorted(targets))
    if set(listed_targets({**chosen, **listed}, table.modules) or ()) != set(targets):
        # One name is the end of another: an expression for whole names tells them apart.
        return _listed("|".join(map(re.escape, sorted(targets))))
    return listed


def _listed(targets: list[str] | str) -> dict[str, object]:
    """Targets, and nothing else that chooses among them."""
    return {**dict.fromkeys(SELECTION), "target_modules": targets}


def _require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(
            f"cannot export: NaN or infinity in {', '.join(broken[:5])}; go back to an earlier checkpoint, or leave "
            "`dtype` out if it is too narrow"
        )
