"""From a PEFT folder to an adapted tree."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from lora_jax.adapters import Adapter, AdapterError
from lora_jax.files import read_safetensors, read_safetensors_header, read_together
from lora_jax.masks import label_params
from lora_jax.methods import DoRA, DoRAWeight, LoRA, LoRAWeight
from lora_jax.methods.base import rooted
from lora_jax.paths import flatten_with_paths, leaves_by_path
from lora_jax.types import Leaf, Params, Uses
from lora_jax.weights import OUT, is_adapted, placement

from ..layout import restore_factors
from ..module_names import ModuleTable, Names
from ..stacks import Stacks, stack_weights
from .adapter_config import (
    CONFIG,
    WEIGHTS,
    PeftConfig,
    read_peft_config,
    require_representable,
    scale_of,
    unknown_entries,
    weights_file,
)
from .read_plan import FactorTarget, Plan, Planner


class _Planned(NamedTuple):
    """A folder held against a base, by its config and its header."""

    config: PeftConfig
    stacks: Stacks
    parts: dict[str, Leaf]
    plan: Plan


def import_peft(
    folder: str | os.PathLike[str],
    base_params: Params,
    *,
    names: Names,
    uses: Uses | None = None,
    base_name: str | None = None,
    fan_in_fan_out: Sequence[str] | None = None,
) -> Adapter:
    """Puts an adapter that PEFT saved onto a base of ours.

    `h = x W + (α/r) (x Aᵀ) B` is the same function on both sides; only names and layouts differ. PEFT's
    `lora_A.weight (r, in)` becomes `a (r, in…)`, its `lora_B.weight (out, r)` becomes `b (r, out…)`, split into heads
    where the weight is. Which weights have factors, and of what rank, is read off the tensors; no expression of
    `target_modules` is run.

    Everything in the folder is a claim. Names, shapes and dtypes are held against the base before a tensor is read, so
    memory stays within what the base's own shapes allow, and an error leaves nothing half done.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base_params: Base parameters; frozen leaves of the result are the same objects.
        names: `{leaf path: Hugging Face module}`, a bundled model's `names` or a table of your own. Leaves that the
            adapter doesn't touch may be missing. An embedding that is the output as well has both modules, in a
            tuple. Of layers that are stacked for a scan, `names` has the single ones, `layers/0/…`: their factors are
            stacked too.
        uses: Result of `trace_weights`, needed for weights of more than two axes, or stored `(out, in)`.
        base_name: Name of your base; if given, a folder that names another is refused. Only what follows the last
            `/` is compared, since PEFT writes the path that the base was loaded from.
        fan_in_fan_out: See `export_peft`. Matters for weights that are in the file in full, `modules_to_save`, alone.

    Returns:
        `Adapter(params, method)`: the adapted tree, and the `LoRA` or `DoRA` that labels it. What is trained is
        float32.

    Raises:
        AdapterError: The folder describes what can't be represented here (QALoRA, single trained tokens, …), or doesn't
            fit the base; or a tensor is missing, unknown, misshapen, of another dtype or not finite. Each is named.
        FileError: A file is missing, truncated, corrupt, or leads out of the folder.

    Warns:
        UserWarning: Entries of `adapter_config.json` that this lora_jax doesn't know. They are kept by
            `export_peft(..., config=read_peft_config(folder))`.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, names = {"dense": {"kernel": jnp.ones((4, 3))}}, {"dense/kernel": "encoder.dense"}
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("dense",))
        >>> params = lj.attach(base, method, key=jax.random.key(0))
        >>> folder = lj.interop.export_peft(tempfile.mkdtemp(), params, method, names=names)
        >>> lj.interop.import_peft(folder, base, names=names).method.targets
        ('/dense/kernel',)

    Deviations:
        PEFT lets a tensor that it doesn't expect pass; here it is refused, unless it equals the base's own (PEFT saves
        the embeddings along at times). Where an embedding is tied to the output, PEFT adapts one of the two uses,
        which one leaf can't hold, unless `ensure_weight_tying` shares the factors: so that is read, and else refused.
    """
    folder = Path(folder)
    adapter, config = read_together(
        folder,
        (WEIGHTS, CONFIG),
        lambda: _import(folder, base_params, _planned(folder, base_params, names, uses, base_name, fan_in_fan_out)),
    )
    if unknown := unknown_entries(config):
        warnings.warn(
            f"{folder / CONFIG} has entries that this lora_jax doesn't know: {', '.join(sorted(unknown)[:8])}. They "
            "are not applied; `export_peft(..., config=read_peft_config(folder))` keeps them.",
            stacklevel=2,
        )
    return adapter


def _import(folder: Path, base_params: Params, planned: _Planned) -> tuple[Adapter, PeftConfig]:
    config, stacks, parts, plan = planned
    leaves, file = leaves_by_path(base_params), weights_file(folder)

    tensors = read_safetensors(file, _file_names(plan))
    _require_finite(tensors, file)
    _require_equal(tensors, plan, parts, file)
    nodes = {path: _node(parts[path], tensors, config, target) for path, target in plan.targets.items()}
    saved = {path: layout.restore(tensors[name]) for path, (name, layout) in plan.saved.items()}
    replaced = stacks.together(nodes, lambda path, members: stack_weights(leaves[path], members))
    for path, array in stacks.together(saved, lambda _, members: np.stack(members)).items():
        replaced[path] = _placed(array, placement(leaves[path]))
    _, _, treedef = flatten_with_paths(base_params)
    params = jax.tree.unflatten(treedef, [replaced.get(path, leaf) for path, leaf in leaves.items()])
    method = _method(config, plan, stacks)
    label_params(params, method)  # a method that doesn't fit the tree would raise here
    return Adapter(params, method), config


def check_peft(
    folder: str | os.PathLike[str],
    base_params: Params,
    *,
    names: Names,
    uses: Uses | None = None,
    base_name: str | None = None,
    fan_in_fan_out: Sequence[str] | None = None,
) -> list[str]:
    """Raises what `import_peft` would raise because of the config, names, dtypes or shapes; reads no tensor.

    Args:
        base_params: Base parameters; shapes and dtypes (`jax.ShapeDtypeStruct`) will do.
        folder, names, uses, base_name, fan_in_fan_out: Same as for `import_peft`.

    Returns:
        The leaves that would get factors or other values.

    Raises:
        AdapterError, FileError: See `import_peft`.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, names = {"dense": {"kernel": jnp.ones((4, 3))}}, {"dense/kernel": "encoder.dense"}
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("dense",))
        >>> params = lj.attach(base, method, key=jax.random.key(0))
        >>> folder = lj.interop.export_peft(tempfile.mkdtemp(), params, method, names=names)
        >>> lj.interop.check_peft(folder, jax.eval_shape(lambda: base), names=names)
        ['dense/kernel']
    """
    planned = _planned(Path(folder), base_params, names, uses, base_name, fan_in_fan_out)
    return planned.stacks.wholes([*planned.plan.targets, *planned.plan.saved])


def _planned(
    folder: Path,
    base_params: Params,
    names: Names,
    uses: Uses | None,
    base_name: str | None,
    fan_in_fan_out: Sequence[str] | None,
) -> _Planned:
    config = read_peft_config(folder)
    require_representable(config, folder)
    _require_base(config, base_name, folder)
    leaves = leaves_by_path(base_params)
    adapted = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if adapted:
        raise AdapterError(
            f"`base_params` has factors already, at {', '.join(adapted[:5])}: pass the base, `lj.detach(params)`"
        )
    stacks = Stacks(names, leaves)
    parts = stacks.apart(leaves)
    table, file = ModuleTable(names, parts, fan_in_fan_out), weights_file(folder)
    header = read_safetensors_header(file)
    plan = Planner(file, header, config, table, parts, stacks.uses(uses)).plan()
    try:
        stacks.together(plan.targets, _require_alike)
        stacks.together(plan.saved, lambda *_: None)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from None
    return _Planned(config, stacks, parts, plan)


def _require_alike(path: str, targets: Sequence[FactorTarget]) -> None:
    """What a stack has once has to be that of every layer."""
    found = dict.fromkeys(f"rank {target.rank} and alpha {target.alpha}" for target in targets)
    if len(found) > 1:
        raise AdapterError(
            f"`{path}` is one leaf for {len(targets)} layers, and their factors differ, {', '.join(found)}: use a tree "
            "with its layers side by side (`lj.models.unstack_layers`)"
        )


def _require_base(config: PeftConfig, base_name: str | None, folder: Path) -> None:
    named = config.get("base_model_name_or_path")
    if base_name is None or not named:
        return
    ours, theirs = (PurePosixPath(name.replace("\\", "/")).name for name in (base_name, named))
    if ours != theirs:
        raise AdapterError(
            f"{folder / CONFIG} names the base {named!r:.200}, and `base_name` is {base_name!r}: load the base that it "
            "was trained on, or leave `base_name` out"
        )


def _file_names(plan: Plan) -> list[str]:
    names = [name for target in plan.targets.values() for name in (target.a, target.b, target.magnitude) if name]
    names += [name for name, _ in plan.saved.values()] + [name for _, name, _ in plan.copies]
    return [*names, *plan.twins, *plan.mirrors]


def _require_finite(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(f"{file} is not usable: NaN or infinity in {', '.join(broken[:5])}")


def _require_equal(tensors: Mapping[str, np.ndarray], plan: Plan, leaves: Mapping[str, Leaf], file: Path) -> None:
    for name, other in plan.twins.items():
        if tensors[name].shape != tensors[other].shape or not np.array_equal(tensors[name], tensors[other]):
            raise AdapterError(f"{file}: '{name}' and '{other}' are one parameter, and have two values")
    for name, other in plan.mirrors.items():
        if not np.array_equal(tensors[name], tensors[other].T):
            raise AdapterError(f"{file}: '{name}' and '{other}' are tied, and one isn't the other's transpose")
    for path, name, layout in plan.copies:
        base, tensor = layout.export(leaves[path]), tensors[name]
        # One of the two may have been rounded to the other's dtype.
        same = np.array_equal(tensor.astype(base.dtype), base) or np.array_equal(base.astype(tensor.dtype), tensor)
        if not same:
            raise AdapterError(
                f"{file}: '{name}' is another value of `{path}`, which {CONFIG} says isn't trained: load the base that "
                "the adapter was trained on, or put the module into `modules_to_save`"
            )


def _node(
    base: Leaf, tensors: Mapping[str, np.ndarray], config: PeftConfig, target: FactorTarget
) -> LoRAWeight | DoRAWeight:
    kind = DoRAWeight if target.magnitude else LoRAWeight
    scale = scale_of(target.alpha, target.rank, rank_stabilized=bool(config.get("use_rslora")))
    node = kind.bare(base, scale=scale, axes=target.axes, dropout=float(config["lora_dropout"]))
    places = node.placements()
    a, b = restore_factors(tensors[target.a], tensors[target.b], tuple(base.shape), target.axes)
    arrays = {"a": a, "b": b}
    if target.magnitude:
        arrays["magnitude"] = tensors[target.magnitude].reshape([base.shape[axis] for axis in node.places(OUT)])
    return dataclasses.replace(node, **{name: _placed(array, places.get(name)) for name, array in arrays.items()})


def _placed(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    # A copy: a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
    placed = jnp.array(array, jnp.float32, copy=True)
    return placed if sharding is None else jax.device_put(placed, sharding)


def _method(config: PeftConfig, plan: Plan, stacks: Stacks) -> LoRA:
    r, alpha = config["r"], config["lora_alpha"]
    targets = {stacks.whole(path): target for path, target in plan.targets.items()}
    kind = DoRA if config.get("use_dora") else LoRA
    return kind(
        rank=r,
        alpha=alpha,
        targets=rooted(list(targets)),
        also_train=rooted(stacks.wholes(plan.saved)),
        dropout=config["lora_dropout"],
        scaling="rank_stabilized" if config.get("use_rslora") else "standard",
        rank_overrides={f"/{path}": target.rank for path, target in targets.items() if target.rank != r},
        alpha_overrides={f"/{path}": target.alpha for path, target in targets.items() if target.alpha != alpha},
    )
