"""The table of names that the caller gives: which Hugging Face tensor each leaf is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..adapters import AdapterError
from ..paths import is_bias_name, nearest
from ..types import Leaf

WEIGHT, BIAS = "weight", "bias"

# `{leaf path: Hugging Face module}`. A leaf that is several modules there, an embedding tied to the output, has them
# all, the embedding first.
Names = Mapping[str, str | tuple[str, ...]]


class ModuleNames(dict[str, str | tuple[str, ...]]):
    """A table of names that says as well which modules store a weight as `(in, out)` there: a bundled model's.

    A plain dict made of it no longer says so, and then a square weight is refused rather than guessed.

    Args:
        names: `{leaf path: Hugging Face module}`.
        fan_in_fan_out: Those modules, by their names or by what follows a dot in them; empty if all are
            `torch.nn.Linear`, whose weight is `(out, in)`.

    Example:
        >>> names = ModuleNames({"up/kernel": "h.0.mlp.c_fc"}, fan_in_fan_out=("c_fc",))
        >>> names["up/kernel"], names.fan_in_fan_out
        ('h.0.mlp.c_fc', ('c_fc',))
    """

    def __init__(self, names: Names, *, fan_in_fan_out: Sequence[str]) -> None:
        super().__init__(names)
        self.fan_in_fan_out = tuple(fan_in_fan_out)


class ModuleTable:
    """Leaf paths and Hugging Face names, each found by the other.

    A module of PyTorch has at most one `weight` and one `bias`. A leaf that is named as biases are (`bias`, `b`,
    `q_bias`: see `paths.is_bias_name`) is the `bias` of its module, any other the `weight`.

    Args:
        names: `{leaf path: Hugging Face module}`; leaves that stay as they are may be missing. A leaf that is several
            modules there, as an embedding tied to the output is, has them in a tuple, the embedding first.
        leaves: Leaves of the tree by path.
        fan_in_fan_out: Modules that store a weight as `(in, out)` there, by their names or by what follows a dot in
            them; what `names` says of it if `None`.

    Raises:
        AdapterError: No such table, a path that the tree does not have, two leaves of one name; `fan_in_fan_out` is no
            list of names, has one that means no module, or contradicts `names`.

    Example:
        >>> table = ModuleTable({"dense/kernel": "layer.0.dense", "dense/bias": "layer.0.dense"},
        ...                   {"dense/kernel": ..., "dense/bias": ..., "norm/scale": ...})
        >>> table.tensor("dense/kernel"), table.path("layer.0.dense", BIAS), table.path("layer.0.norm", WEIGHT)
        ('layer.0.dense.weight', 'dense/bias', None)
        >>> tied = ModuleTable({"words/embedding": ("model.embed", "lm_head")}, {"words/embedding": ...})
        >>> tied.module("words/embedding"), tied.path("lm_head", WEIGHT), tied.tied_to("words/embedding")
        ('model.embed', 'words/embedding', ('lm_head',))
    """

    def __init__(self, names: Names, leaves: Mapping[str, Leaf], fan_in_fan_out: Sequence[str] | None = None) -> None:
        if not isinstance(names, Mapping) or not all(_modules_of(name) for name in names.values()):
            raise AdapterError(
                "`names` must map leaf paths to Hugging Face module names, such as "
                '{"layers/0/query/kernel": "encoder.layer.0.attention.self.query"}; '
                f"got {names!r:.200}"
            )
        unknown = [path for path in names if path not in leaves]
        if unknown:
            near = nearest(str(unknown[0]), leaves)
            raise AdapterError(
                f"`names` has `{unknown[0]}`, and the parameters have no such leaf. "
                f"Nearest: {', '.join(near) or 'none'}"
            )
        self._modules: dict[str, str] = {}
        self._tied: dict[str, tuple[str, ...]] = {}
        self._paths: dict[tuple[str, str], str] = {}
        for path, value in names.items():
            self._modules[path], *others = _modules_of(value)
            if others:
                self._tied[path] = tuple(others)
            for module in (self._modules[path], *others):
                key = module, kind(path)
                if key in self._paths:
                    raise AdapterError(
                        f"`names` gives {module}.{key[1]} to both `{self._paths[key]}` and `{path}`: a leaf has a name "
                        "of its own"
                    )
                self._paths[key] = path
        self._transposed = self._stored_in_out(names, fan_in_fan_out)

    def _stored_in_out(self, names: Names, said: Sequence[str] | None) -> frozenset[str] | None:
        """The entries that mean modules which store `(in, out)`; `None` if nobody has said."""
        known = frozenset(names.fan_in_fan_out) if isinstance(names, ModuleNames) else None
        if said is None:
            return known
        if isinstance(said, str) or not all(isinstance(entry, str) for entry in said):
            raise AdapterError(f'`fan_in_fan_out` must be a list of module names, such as ("c_attn",), got {said!r}')
        modules = {*self._modules.values(), *(other for others in self._tied.values() for other in others)}
        idle = [entry for entry in said if not any(selects({entry}, module) for module in modules)]
        if idle:
            raise AdapterError(
                f"`fan_in_fan_out` has {idle[0]!r}, and `names` has no such module. Nearest: {self.near(idle[0])}"
            )
        entries = frozenset(said)
        wrong = [
            module
            for module in sorted(modules)
            if known is not None and selects(known, module) != selects(entries, module)
        ]
        if wrong:
            raise AdapterError(
                f"`fan_in_fan_out` is {tuple(said)!r}, and `names` says otherwise of {', '.join(wrong[:5])}: "
                "leave it out"
            )
        return entries

    def stores_in_out(self, module: str) -> bool | None:
        """Whether a module stores a weight as `(in, out)`, as GPT-2's `Conv1D` does; `None` if nobody has said."""
        return None if self._transposed is None else selects(self._transposed, module)

    @property
    def modules(self) -> list[str]:
        """Every module, once, in the table's order; of a tied leaf the first."""
        return list(dict.fromkeys(self._modules.values()))

    @property
    def ties(self) -> Mapping[str, tuple[str, ...]]:
        """The tied leaves: what else each of them is."""
        return self._tied

    def tied_to(self, path: str) -> tuple[str, ...]:
        """What else a leaf is beside `module(path)`: nothing, unless it is tied."""
        return self._tied.get(path, ())

    def module(self, path: str) -> str:
        """The module of a leaf.

        Raises:
            AdapterError: `names` does not have it.
        """
        if path not in self._modules:
            raise AdapterError(f"`names` lacks `{path}`, which is trained: give its Hugging Face module")
        return self._modules[path]

    def tensor(self, path: str) -> str:
        """The name of a leaf's tensor: `module.weight` or `module.bias`. Raises as `module`."""
        return f"{self.module(path)}.{kind(path)}"

    def path(self, module: str, part: str) -> str | None:
        """The leaf that is `module.weight` or `module.bias`, if there is one."""
        return self._paths.get((module, part))

    def leaves_of(self, module: str) -> list[str]:
        """The leaves of a module: its weight and its bias, as far as the table has them."""
        return [self._paths[module, part] for part in (WEIGHT, BIAS) if (module, part) in self._paths]

    def biases(self) -> list[str]:
        """Every leaf that is a bias."""
        return [path for path in self._modules if kind(path) == BIAS]

    def near(self, module: str) -> str:
        """Modules that look like `module`, for a message."""
        segments = {name.replace(".", "/"): name for name in self.modules}
        return ", ".join(segments[name] for name in nearest(module.replace(".", "/"), segments)) or "none"


def _modules_of(value: object) -> tuple[str, ...]:
    """One name or several; nothing where it is neither."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, tuple | list) or not all(isinstance(name, str) and name for name in several):
        return ()
    return tuple(several)


def kind(path: str) -> str:
    """Which parameter of its module a leaf is: `"weight"` or `"bias"`."""
    return BIAS if is_bias_name(path) else WEIGHT


def selects(entries: Collection[str], module: str) -> bool:
    """Whether a list of names means a module, by PEFT's rule: the whole name, or what follows a dot in it.

    Args:
        entries: The names, best a set: then a long list costs no more than a short one.
        module: A module's name.

    Example:
        >>> selects({"query"}, "layer.0.query"), selects({"query"}, "layer.0.subquery")
        (True, False)
    """
    segments = module.split(".")
    return any(".".join(segments[start:]) in entries for start in range(len(segments)))
