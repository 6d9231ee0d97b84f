"""What each tensor of a PEFT file is for, settled from the header before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lora_jax.adapters import AdapterError
from lora_jax.files import TensorInfo
from lora_jax.methods.base import is_trainable
from lora_jax.paths import shape_text
from lora_jax.types import Leaf, Uses
from lora_jax.weights import IN, OUT

from ..layout import Layout, factor_sizes, is_embedding, leaf_layout, weight_axes
from ..module_names import BIAS, WEIGHT, ModuleTable, kind
from .adapter_config import CONFIG, PeftConfig, is_saved, listed_targets
from .keys import FactorKey, LeafKey, factor_key, leaf_key, parse_key
from .patterns import PatternError, Patterns

_FLOATS = ("float32", "float16", "bfloat16")
_UNTIE = "Give each a leaf of its own: `lj.models.load(..., tie_word_embeddings=False)`"


class FactorTarget(NamedTuple):
    """A weight that gets factors: where they are in the file, and what they become."""

    a: str
    b: str
    magnitude: str | None
    axes: str
    rank: int
    alpha: float


class Plan(NamedTuple):
    """What each tensor of a file is for, settled before the first one is read."""

    targets: dict[str, FactorTarget]
    # Leaves that are replaced and trained: the tensor, and how it lies there.
    saved: dict[str, tuple[str, Layout]]
    # Tensors that must equal a leaf that stays as it is; pairs that must equal each other, or each other's transpose.
    copies: list[tuple[str, str, Layout]]
    twins: dict[str, str]
    mirrors: dict[str, str]


class Planner:
    """Decides from a file's header alone what each of its tensors is for."""

    def __init__(
        self,
        file: Path,
        header: Mapping[str, TensorInfo],
        config: PeftConfig,
        table: ModuleTable,
        leaves: Mapping[str, Leaf],
        uses: Uses | None,
    ) -> None:
        self.file, self.header, self.config, self.table = file, header, config, table
        self.leaves, self.uses = leaves, uses
        self.saved_entries = frozenset(config.get("modules_to_save") or ())
        self.ranks = Patterns(config.get("rank_pattern") or ())
        self.alphas = Patterns(config.get("alpha_pattern") or ())
        self.factors: dict[str, dict[str, FactorKey]] = {}
        self.others: list[tuple[str, LeafKey]] = []

    def plan(self) -> Plan:
        for name, info in self.header.items():
            key = parse_key(name, str(self.file))
            if str(info.dtype) not in _FLOATS:
                raise self.error(f"'{name}' is {info.dtype}, and one of {', '.join(_FLOATS)} is expected")
            if isinstance(key, FactorKey):
                self.factors.setdefault(key.module, {})[key.role] = key
            else:
                self.others.append((name, key))
        if self.config.get("ensure_weight_tying") and not self.table.ties:
            raise AdapterError(
                f"{self.file.parent / CONFIG} describes what can't be represented here: `ensure_weight_tying`: "
                "adapters shared by tied layers, and `names` has no leaf with two modules. Load the base with its head "
                "tied"
            )
        plan = Plan({}, {}, [], {}, {})
        for module in self.factors:
            path = self.table.path(module, WEIGHT)
            if path is not None and self.table.tied_to(path):
                self.share_factors(path, plan)
            if path is None or module == self.table.module(path):
                path, target = self.target(module)
                plan.targets[path] = target
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

    def share_factors(self, path: str, plan: Plan) -> None:
        """The factors of a tied leaf are those of its first module, and their transposes those of the others."""
        first, *others = self.require_shared(path)
        if self.config.get("use_dora"):
            raise self.error(
                f"`{path}` is {' and '.join((first, *others))} at once, and with `use_dora` each has magnitudes of its "
                f"own. {_UNTIE}"
            )
        lacking = [module for module in (first, *others) if module not in self.factors]
        if lacking:
            raise self.error(
                f"`{path}` is {first} and {', '.join(others)}, and there are no factors of {', '.join(lacking)}: "
                f"`ensure_weight_tying` of {CONFIG} has tied nothing. {_UNTIE}"
            )
        for other in others:
            for role, mirrored in (("a", "b"), ("b", "a")):
                name, own = factor_key(other, role, embedding=False), factor_key(first, mirrored, embedding=True)
                missing = [tensor for tensor in (name, own) if tensor not in self.header]
                if missing:
                    raise self.error(f"the factors of {first} and {other} are no pairs: '{missing[0]}' is missing")
                plan.mirrors[name] = own
            if self.alpha(other) != self.alpha(first):
                raise self.error(f"{first} and {other} are tied, and have two alphas by `alpha_pattern` of {CONFIG}")

    def require_shared(self, path: str) -> tuple[str, ...]:
        """The modules of a tied leaf, if what the adapter has for them can be one leaf's."""
        modules = self.table.module(path), *self.table.tied_to(path)
        if not self.config.get("ensure_weight_tying"):
            raise self.error(
                f"`{path}` is {' and '.join(modules)} at once, and PEFT changes each by itself, since {CONFIG} doesn't "
                f"say `ensure_weight_tying`. {_UNTIE}"
            )
        return modules

    def target(self, module: str) -> tuple[str, FactorTarget]:
        pair = self.factors[module]
        embedding = any(key.embedding for key in pair.values())
        a, b, magnitude = (factor_key(module, role, embedding=embedding) for role in ("a", "b", "magnitude"))
        missing = [name for name in (a, b) if name not in self.header]
        if missing:
            raise self.error(f"the factors of {module:.200} are no pair: '{missing[0]:.200}' is missing")
        has, dora = magnitude in self.header, bool(self.config.get("use_dora"))
        if has != dora:
            raise self.error(
                f"'{magnitude:.200}' is {'there' if has else 'missing'}, and `use_dora` of {CONFIG} is "
                f"{str(dora).lower()}: save or copy the adapter again"
            )
        path = self.leaf(module, WEIGHT, a)
        if self.is_saved(module):
            raise self.error(f"{module} has factors, and `modules_to_save` says that it is trained in full")
        labels = self.labels(path, module, embedding=embedding)
        rank = self.rank(path, module, a, b, labels)
        if dora:
            _, fan_out = factor_sizes(tuple(self.leaves[path].shape), labels)
            shape = self.header[magnitude].shape
            if shape != (fan_out,):
                raise self.error(
                    f"'{magnitude}' has the shape {shape}, expected {(fan_out,)} beside `{path}` {self.shape(path)}"
                )
        return path, FactorTarget(a, b, magnitude if dora else None, labels, rank, self.alpha(module))

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
        return weight_axes(path, leaf, self.uses)

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
        # A start from the weight goes out as twice its rank, and that is at most `min(in, out)`.
        most = max(fan_in, fan_out, 2 * min(fan_in, fan_out))
        if not 1 <= rank <= most:
            allowed = f"`{path}` {self.shape(path)} allows 1 to {most}"
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

    def sort(self, name: str, key: LeafKey, plan: Plan) -> None:
        module, part, holder = key
        wrapped, saved = module in self.factors, self.is_saved(module)
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
        if saved and self.table.tied_to(path):
            first, *_ = self.require_shared(path)
            if module != first:
                plan.twins[name] = leaf_key(first, part)
                return
        if saved or trains_bias:
            plan.saved[path] = name, layout
        else:
            plan.copies.append((path, name, layout))

    def is_saved(self, module: str) -> bool:
        """Whether a module, or one that it is tied to, is trained in full."""
        path = self.table.path(module, WEIGHT)
        modules = (module,) if path is None else (module, self.table.module(path), *self.table.tied_to(path))
        return any(is_saved(self.saved_entries, one) for one in modules)

    def layout(self, path: str, module: str, name: str) -> Layout:
        in_out = self.table.stores_in_out(module)
        try:
            layout = leaf_layout(path, self.leaves[path], self.uses, in_out=in_out)
        except AdapterError as error:
            raise self.error(f"'{name}': {error}") from None
        shape = self.header[name].shape
        if shape != layout.there:
            raise self.error(
                f"'{name}' has the shape {shape}, expected {layout.there} for `{path}` {self.shape(path)}"
                f"{layout.hint(shape, in_out)}"
            )
        return layout

    def require_complete(self, plan: Plan) -> None:
        modules = self.table.modules
        expected = [
            leaf_key(module, kind(path), wrapped=module in self.factors)
            for module in modules
            for path in self.table.leaves_of(module)
            if self.is_saved(module) or (kind(path) == BIAS and self.expects_bias(module))
        ]
        expected += [
            leaf_key(other, WEIGHT)
            for path, others in self.table.ties.items()
            for other in others
            if self.is_saved(other)
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
