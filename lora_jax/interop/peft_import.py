"""From a PEFT folder to an adapted tree."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters import Adapter, AdapterError
from ..files import TensorInfo, read_safetensors, read_safetensors_header
from ..masks import label_params
from ..methods import LoRA, LoRAWeight
from ..methods.base import is_trainable, rooted
from ..paths import flatten_with_paths, leaves_by_path, shape_text
from ..weights import IN, OUT, is_adapted, placement
from .layout import Layout, axis_labels, factor_sizes, is_embedding, leaf_layout, restore_factors
from .names import BIAS, WEIGHT, NameTable, kind, selects
from .patterns import PatternError, Patterns
from .peft_config import (
    CONFIG,
    is_saved,
    listed_targets,
    read_peft_config,
    require_representable,
    scale_of,
    unknown_entries,
    weights_file,
)
from .peft_keys import FactorKey, LeafKey, factor_key, leaf_key, parse_key

_FLOATS = ("float32", "float16", "bfloat16")


class _Target(NamedTuple):
    """A weight that gets factors: where they are in the file, and what they become."""

    a: str
    b: str
    axes: str
    rank: int
    alpha: float


class _Plan(NamedTuple):
    """What each tensor of a file is for, settled before the first one is read."""

    targets: dict[str, _Target]
    # Leaves that are replaced and trained: the tensor, and how it lies there.
    saved: dict[str, tuple[str, Layout]]
    # Tensors that must equal a leaf that stays as it is, and pairs that must equal each other.
    copies: dict[str, tuple[str, Layout]]
    twins: dict[str, str]


def import_peft(
    folder: str | os.PathLike[str],
    base_params: Any,
    *,
    names: Mapping[str, str],
    uses: Mapping[str, Any] | None = None,
    base_name: str | None = None,
    fan_in_fan_out: Sequence[str] = (),
) -> Adapter:
    """Puts an adapter that PEFT saved onto a base of ours.

    `h = x W + (α/r) (x Aᵀ) B` is the same function on both sides; only names and layouts differ. PEFT's
    `lora_A.weight (r, in)` becomes `a (r, in…)`, its `lora_B.weight (out, r)` becomes `b (r, out…)`, split into heads
    where the weight is. Which weights have factors, and of what rank, is read off the tensors; no expression of
    `target_modules` is run.

    Everything in the folder is a claim. Names, shapes and dtypes are held against the base before a tensor is read, so
    memory stays within what the base's own shapes allow, and an error leaves nothing half done.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        base_params: the base's parameters; frozen leaves of the result are the same objects.
        names: `{leaf path: Hugging Face module}`, a bundled model's `names` or a table of your own. Leaves that the
            adapter doesn't touch may be missing.
        uses: from `trace_weights`, for weights of more than two axes, or stored `(out, in)`.
        base_name: the name of your base; if given, a folder that names another is refused. Only what follows the last
            `/` is compared, since PEFT writes the path that the base was loaded from.
        fan_in_fan_out: modules (their names, or what follows a dot in them) that store a whole weight as `(in, out)`
            there: GPT-2's `("c_attn", "c_proj", "c_fc")`. Matters for `modules_to_save` alone.

    Returns:
        `Adapter(params, method)`: the adapted tree, and the `LoRA` that labels it. What is trained is float32.

    Raises:
        AdapterError: the folder describes what can't be represented here (DoRA, single trained tokens, …), or doesn't
            fit the base; or a tensor is missing, unknown, misshapen, of another dtype or not finite. Each is named.
        FileError: a file is missing, truncated, corrupt, or leads out of the folder.

    Warns:
        UserWarning: entries of `adapter_config.json` that this lora_jax doesn't know. They are kept by
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
        the embeddings along at times). PEFT adapts the lookup of an embedding alone; a tied output embedding here is
        the same leaf, so it is adapted too: don't import an embedding's factors into a model that ties it.
    """
    folder = Path(folder)
    config, plan = _planned(folder, base_params, names, uses, base_name, fan_in_fan_out)
    leaves, file = leaves_by_path(base_params), weights_file(folder)

    tensors = read_safetensors(file, _file_names(plan))
    _require_finite(tensors, file)
    _require_equal(tensors, plan, leaves, file)
    replaced: dict[str, Any] = {
        path: _node(leaves[path], tensors, config, target) for path, target in plan.targets.items()
    }
    for path, (name, layout) in plan.saved.items():
        replaced[path] = _placed(layout.restore(tensors[name]), placement(leaves[path]))
    _, _, treedef = flatten_with_paths(base_params)
    params = jax.tree.unflatten(treedef, [replaced.get(path, leaf) for path, leaf in leaves.items()])
    method = _method(config, plan)
    label_params(params, method)  # a method that doesn't fit the tree would raise here
    if unknown := unknown_entries(config):
        warnings.warn(
            f"{folder / CONFIG} has entries that this lora_jax doesn't know: {', '.join(sorted(unknown)[:8])}. They "
            "are not applied; `export_peft(..., config=read_peft_config(folder))` keeps them.",
            stacklevel=2,
        )
    return Adapter(params, method)


def check_peft(
    folder: str | os.PathLike[str],
    base_params: Any,
    *,
    names: Mapping[str, str],
    uses: Mapping[str, Any] | None = None,
    base_name: str | None = None,
    fan_in_fan_out: Sequence[str] = (),
) -> list[str]:
    """Raises what `import_peft` would by config, names, dtypes and shapes; reads no tensor.

    Args:
        base_params: the base's parameters; shapes and dtypes (`jax.ShapeDtypeStruct`) will do.
        folder, names, uses, base_name, fan_in_fan_out: as for `import_peft`.

    Returns:
        The leaves that would get factors or other values.

    Raises:
        AdapterError, FileError: see `import_peft`.

    Example:
        >>> import lora_jax as lj, tempfile
        >>> base, names = {"dense": {"kernel": jnp.ones((4, 3))}}, {"dense/kernel": "encoder.dense"}
        >>> method = lj.LoRA(rank=2, alpha=4, targets=("dense",))
        >>> params = lj.attach(base, method, key=jax.random.key(0))
        >>> folder = lj.interop.export_peft(tempfile.mkdtemp(), params, method, names=names)
        >>> lj.interop.check_peft(folder, jax.eval_shape(lambda: base), names=names)
        ['dense/kernel']
    """
    _, plan = _planned(Path(folder), base_params, names, uses, base_name, fan_in_fan_out)
    return [*plan.targets, *plan.saved]


def _planned(
    folder: Path,
    base_params: Any,
    names: Mapping[str, str],
    uses: Mapping[str, Any] | None,
    base_name: str | None,
    fan_in_fan_out: Sequence[str],
) -> tuple[dict[str, Any], _Plan]:
    """The config, and what each tensor of the file is for."""
    config = read_peft_config(folder)
    require_representable(config, folder)
    _require_base(config, base_name, folder)
    leaves = leaves_by_path(base_params)
    adapted = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if adapted:
        raise AdapterError(
            f"`base_params` has factors already, at {', '.join(adapted[:5])}: pass the base, `lj.detach(params)`"
        )
    table = NameTable(names, leaves)
    file = weights_file(folder)
    return config, _Planner(file, read_safetensors_header(file), config, table, leaves, uses, fan_in_fan_out).plan()


class _Planner:
    """Decides from a file's header alone what each of its tensors is for."""

    def __init__(
        self,
        file: Path,
        header: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
        table: NameTable,
        leaves: Mapping[str, Any],
        uses: Mapping[str, Any] | None,
        fan_in_fan_out: Sequence[str],
    ) -> None:
        self.file, self.header, self.config, self.table = file, header, config, table
        self.leaves, self.uses, self.conv1d = leaves, uses, frozenset(fan_in_fan_out)
        self.saved_entries = frozenset(config.get("modules_to_save") or ())
        self.ranks = Patterns(config.get("rank_pattern") or ())
        self.alphas = Patterns(config.get("alpha_pattern") or ())
        self.factors: dict[str, dict[str, FactorKey]] = {}
        self.others: list[tuple[str, LeafKey]] = []

    def plan(self) -> _Plan:
        for name, info in self.header.items():
            key = parse_key(name, str(self.file))
            if str(info.dtype) not in _FLOATS:
                raise self.error(f"'{name}' is {info.dtype}, and one of {', '.join(_FLOATS)} is expected")
            if isinstance(key, FactorKey):
                self.factors.setdefault(key.module, {})[key.role] = key
            else:
                self.others.append((name, key))
        plan = _Plan(dict(self.target(module) for module in self.factors), {}, {}, {})
        if not plan.targets:
            raise self.error("it has no factor, so it is no LoRA")
        for name, key in self.others:
            self.sort(name, key, plan)
        self.require_complete(plan)
        return plan

    def error(self, message: str) -> AdapterError:
        return AdapterError(f"{self.file}: {message}")

    def leaf(self, module: str, part: str, name: str) -> str:
        path = self.table.path(module, part)
        if path is None:
            raise self.error(
                f"'{name:.200}' belongs to the {part} of {module:.200}, and `names` has no leaf for it. "
                f"Nearest modules: {self.table.near(module[:200])}"
            )
        if not is_trainable(path, self.leaves[path]):
            raise self.error(f"'{name}' belongs to `{path}`, which is no array of a floating type")
        return path

    # Factors.

    def target(self, module: str) -> tuple[str, _Target]:
        pair = self.factors[module]
        first = next(iter(pair.values()))
        a, b = (factor_key(module, role, embedding=first.embedding) for role in ("a", "b"))
        missing = [name for name in (a, b) if name not in self.header]
        if missing or len({key.embedding for key in pair.values()}) > 1:
            raise self.error(f"the factors of {module:.200} are no pair: '{(missing or [a])[0]:.200}' is missing")
        path = self.leaf(module, WEIGHT, a)
        if is_saved(self.saved_entries, module):
            raise self.error(f"{module} has factors, and `modules_to_save` says that it is trained in full")
        labels = self.labels(path, module, embedding=first.embedding)
        rank = self.rank(path, module, a, b, labels)
        return path, _Target(a, b, labels, rank, self.alpha(module))

    def labels(self, path: str, module: str, *, embedding: bool) -> str:
        leaf = self.leaves[path]
        if len(leaf.shape) < 2:
            raise self.error(f"{module} has factors, and `{path}` {shape_text(leaf)} is no weight of two axes or more")
        if embedding:
            if len(leaf.shape) != 2:
                raise self.error(f"{module} has an embedding's factors, and `{path}` has the shape {shape_text(leaf)}")
            return IN + OUT
        if is_embedding(path, self.uses):
            raise self.error(f"{module} has a linear layer's factors, and `{path}` is an embedding")
        return axis_labels(path, leaf, self.uses)

    def rank(self, path: str, module: str, a: str, b: str, labels: str) -> int:
        fan_in, fan_out = factor_sizes(tuple(self.leaves[path].shape), labels)
        for name, place, size, other in ((a, 1, fan_in, "(r, in)"), (b, 0, fan_out, "(out, r)")):
            shape = self.header[name].shape
            if len(shape) != 2 or shape[place] != size:
                expected = other.replace("in", str(fan_in)).replace("out", str(fan_out))
                raise self.error(
                    f"'{name}' has the shape {shape}, expected {expected} beside `{path}` {self.shape(path)}"
                )
        rank, ranks_of_b = self.header[a].shape[0], self.header[b].shape[1]
        if rank != ranks_of_b:
            raise self.error(f"the factors of {module} have two ranks, {rank} and {ranks_of_b}")
        if not 1 <= rank <= max(fan_in, fan_out):
            allowed = f"`{path}` {self.shape(path)} allows 1 to {max(fan_in, fan_out)}"
            raise self.error(f"the factors of {module} have the rank {rank}, and {allowed}")
        try:
            key = self.ranks.first(module)
        except PatternError:
            return rank  # the tensors say it as well
        said = self.config["r"] if key is None else self.config["rank_pattern"][key]
        if rank != said:
            where = "`r`" if key is None else f"`rank_pattern` {key!r}"
            raise self.error(f"the factors of {module} have the rank {rank}, and {where} of {CONFIG} says {said}")
        return rank

    def shape(self, path: str) -> str:
        return shape_text(self.leaves[path])

    def alpha(self, module: str) -> float:
        try:
            key = self.alphas.first(module)
        except PatternError as error:
            raise AdapterError(
                f"{self.file.parent / CONFIG}: the `alpha_pattern` {error}, and a stranger's expression isn't run: "
                f"write the names of the modules that it means, such as {module}"
            ) from None
        return self.config["lora_alpha"] if key is None else self.config["alpha_pattern"][key]

    # Whole leaves.

    def sort(self, name: str, key: LeafKey, plan: _Plan) -> None:
        module, part, holder = key
        wrapped, saved = module in self.factors, is_saved(self.saved_entries, module)
        if holder in ("original_module", "modules_to_save"):
            if not saved:
                raise self.error(f"'{name}' is of a module that `modules_to_save` doesn't have")
            self.layout(self.leaf(module, part, name), module, name)
            if holder == "modules_to_save":
                plan.twins[name] = leaf_key(module, part)
            return  # what the module was before has no part in what the adapter computes
        if wrapped != (holder == "base_layer"):
            raise self.error(
                f"'{name}' is not the name of that parameter: {module} has {'' if wrapped else 'no '}factors, so PEFT "
                f"has it as '{leaf_key(module, part, wrapped=wrapped)}'"
            )
        path = self.leaf(module, part, name)
        layout = self.layout(path, module, name)
        trains_bias = part == BIAS and (
            self.config["bias"] == "all" or (wrapped and self.config["bias"] == "lora_only")
        )
        if saved or trains_bias:
            plan.saved[path] = name, layout
        else:
            plan.copies[path] = name, layout

    def layout(self, path: str, module: str, name: str) -> Layout:
        leaf, stored = self.leaves[path], selects(self.conv1d, module)
        layout = leaf_layout(path, leaf, self.uses, conv1d=stored)
        shape = self.header[name].shape
        if shape != layout.there:
            raise self.error(f"'{name}' has the shape {shape}, expected {layout.there} for `{path}` {self.shape(path)}")
        square = len(shape) == 2 and shape[0] == shape[1] and not is_embedding(path, self.uses)
        if square and self.config.get("fan_in_fan_out") and not self.conv1d:
            raise self.error(
                f"whether '{name}' is stored (in, out) or (out, in) can't be told, since {CONFIG} says "
                "`fan_in_fan_out`: name the modules that store (in, out) in `fan_in_fan_out=`"
            )
        return layout

    def require_complete(self, plan: _Plan) -> None:
        modules = self.table.modules
        expected = [
            leaf_key(module, kind(path), wrapped=module in self.factors)
            for module in modules
            for path in self.table.leaves_of(module)
            if is_saved(self.saved_entries, module) or (kind(path) == BIAS and self.expects_bias(module))
        ]
        targets = listed_targets(self.config, modules) or ()
        expected += [
            factor_key(module, "a", embedding=is_embedding(path, self.uses))
            for module in targets
            if module not in self.factors and (path := self.table.path(module, WEIGHT)) is not None
        ]
        expected += plan.twins.values()
        missing = [name for name in expected if name not in self.header]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise self.error(
                f"it lacks {', '.join(missing[:5])}{more}, by what {CONFIG} says and `names` has: save or copy it again"
            )

    def expects_bias(self, module: str) -> bool:
        bias = self.config["bias"]
        return bias == "all" or (bias == "lora_only" and module in self.factors)


def _require_base(config: Mapping[str, Any], base_name: str | None, folder: Path) -> None:
    named = config.get("base_model_name_or_path")
    if base_name is None or not named:
        return
    ours, theirs = (PurePosixPath(name.replace("\\", "/")).name for name in (base_name, named))
    if ours != theirs:
        raise AdapterError(
            f"{folder / CONFIG} names the base {named!r:.200}, and `base_name` is {base_name!r}: load the base that it "
            "was trained on, or leave `base_name` out"
        )


def _file_names(plan: _Plan) -> list[str]:
    names = [name for target in plan.targets.values() for name in (target.a, target.b)]
    names += [name for leaves in (plan.saved, plan.copies) for name, _ in leaves.values()]
    return names + list(plan.twins)


def _require_finite(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    broken = [name for name, array in tensors.items() if not np.isfinite(array.astype(np.float32)).all()]
    if broken:
        raise AdapterError(f"{file} is not usable: NaN or infinity in {', '.join(broken[:5])}")


def _require_equal(tensors: Mapping[str, np.ndarray], plan: _Plan, leaves: Mapping[str, Any], file: Path) -> None:
    for name, other in plan.twins.items():
        if tensors[name].shape != tensors[other].shape or not np.array_equal(tensors[name], tensors[other]):
            raise AdapterError(f"{file}: '{name}' and '{other}' are one parameter, and have two values")
    for path, (name, layout) in plan.copies.items():
        base, tensor = layout.export(leaves[path]), tensors[name]
        # One of the two may have been rounded to the other's dtype.
        same = np.array_equal(tensor.astype(base.dtype), base) or np.array_equal(base.astype(tensor.dtype), tensor)
        if not same:
            raise AdapterError(
                f"{file}: '{name}' is another value of `{path}`, which {CONFIG} says isn't trained: load the base that "
                "the adapter was trained on, or put the module into `modules_to_save`"
            )


def _node(base: Any, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], target: _Target) -> LoRAWeight:
    scale = scale_of(target.alpha, target.rank, rank_stabilized=bool(config.get("use_rslora")))
    node = LoRAWeight(base, None, None, scale=scale, axes=target.axes, dropout=float(config["lora_dropout"]))
    places = node.placements()
    a, b = restore_factors(tensors[target.a], tensors[target.b], tuple(base.shape), target.axes)
    return dataclasses.replace(node, a=_placed(a, places.get("a")), b=_placed(b, places.get("b")))


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    # A copy: a JAX array on the CPU may otherwise be a view of NumPy's memory, which can't be donated.
    placed = jnp.array(array, jnp.float32, copy=True)
    return placed if sharding is None else jax.device_put(placed, sharding)


def _method(config: Mapping[str, Any], plan: _Plan) -> LoRA:
    r, alpha = config["r"], config["lora_alpha"]
    return LoRA(
        rank=r,
        alpha=alpha,
        targets=rooted(list(plan.targets)),
        also_train=rooted(list(plan.saved)),
        dropout=config["lora_dropout"],
        scaling="rank_stabilized" if config.get("use_rslora") else "standard",
        rank_overrides={f"/{path}": target.rank for path, target in plan.targets.items() if target.rank != r},
        alpha_overrides={f"/{path}": target.alpha for path, target in plan.targets.items() if target.alpha != alpha},
    )
