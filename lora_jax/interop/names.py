"""The table of names that the caller gives: which Hugging Face tensor each leaf is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..adapters import AdapterError
from ..paths import is_bias_name, nearest

WEIGHT, BIAS = "weight", "bias"

# `{leaf path: Hugging Face module}`. A leaf that is several modules there, an embedding tied to the output, has them
# all, the embedding first.
Names = Mapping[str, str | tuple[str, ...]]


class NameTable:
    """Leaf paths and Hugging Face names, each found by the other.

    A module of PyTorch has at most one `weight` and one `bias`. A leaf whose last segment is a bias's name (`bias`,
    `b`, `beta`, `offset`) is the `bias` of its module, any other the `weight`.

    Args:
        names: `{leaf path: Hugging Face module}`; leaves that stay as they are may be missing. A leaf that is several
            modules there, as an embedding tied to the output is, has them in a tuple, the embedding first.
        leaves: the tree's leaves by path.

    Raises:
        AdapterError: no such table, a path that the tree does not have, two leaves of one name.

    Example:
        >>> table = NameTable({"dense/kernel": "layer.0.dense", "dense/bias": "layer.0.dense"},
        ...                   {"dense/kernel": ..., "dense/bias": ..., "norm/scale": ...})
        >>> table.tensor("dense/kernel"), table.path("layer.0.dense", BIAS), table.path("layer.0.norm", WEIGHT)
        ('layer.0.dense.weight', 'dense/bias', None)
        >>> tied = NameTable({"words/embedding": ("model.embed", "lm_head")}, {"words/embedding": ...})
        >>> tied.module("words/embedding"), tied.path("lm_head", WEIGHT), tied.tied_to("words/embedding")
        ('model.embed', 'words/embedding', ('lm_head',))
    """

    def __init__(self, names: Names, leaves: Mapping[str, Any]) -> None:
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


def _modules_of(value: Any) -> tuple[str, ...]:
    """One name or several; nothing where it is neither."""
    several = (value,) if isinstance(value, str) else value
    good = isinstance(several, tuple | list) and all(isinstance(name, str) and name for name in several)
    return tuple(several) if good else ()


def kind(path: str) -> str:
    """Which parameter of its module a leaf is: `"weight"` or `"bias"`."""
    return BIAS if is_bias_name(path) else WEIGHT


def selects(entries: Collection[str], module: str) -> bool:
    """Whether a list of names means a module, by PEFT's rule: the whole name, or what follows a dot in it.

    Args:
        entries: the names, best a set: then a long list costs no more than a short one.
        module: a module's name.

    Example:
        >>> selects({"query"}, "layer.0.query"), selects({"query"}, "layer.0.subquery")
        (True, False)
    """
    segments = module.split(".")
    return any(".".join(segments[start:]) in entries for start in range(len(segments)))
