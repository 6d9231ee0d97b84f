"""`TensorNames`: maps leaf paths to the names of tensors and modules in Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

_NUMBER = re.compile(r"(?<=[/.])\d+(?=[/.])")

# Norms in checkpoints converted from TensorFlow.
_OLD_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}

# Buffers in checkpoints of old versions, which aren't parameters.
_BUFFERS = re.compile(r"embeddings\.(position_ids|token_type_ids)")


def is_kernel(path: str) -> bool:
    """Whether the leaf at `path` is the weight of a linear layer, `(in, out)` here and `(out, in)` in PyTorch."""
    return path.endswith("/kernel")


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """A family's names in Hugging Face checkpoints.

    Attributes:
        modules: `{module path: Hugging Face module}`, with `{}` for the number of a layer.
        prefix: Attribute, with its dot, in which the task classes of transformers keep the model without its head.
        outside: Module paths that the task classes keep outside that attribute: heads.
        unused: Regular expression for the tensors of a checkpoint that no bundled model has, such as pretraining heads.
        is_transposed: Function that says whether the leaf at a path is the transpose of its tensor.

    Example:
        >>> modules = {"layers/{}/up": "layer.{}.dense", "head": "cls"}
        >>> table = TensorNames(modules=modules, prefix="m.", outside=("head",))
        >>> table.tensor("layers/3/up/kernel", prefix="m."), table.tensor("head/bias", prefix="m.")
        ('m.layer.3.dense.weight', 'cls.bias')
    """

    modules: Mapping[str, str]
    prefix: str
    outside: tuple[str, ...]
    unused: str = ""
    is_transposed: Callable[[str], bool] = is_kernel

    def module(self, path: str, *, prefix: str = "") -> str:
        """The Hugging Face module of the leaf at `path`.

        Args:
            path: Leaf path in a model of the family.
            prefix: Prefix of modules that aren't `outside`: the family's own in the task classes, none otherwise.
        """
        module = path.rpartition("/")[0]
        number = _NUMBER.search(module)
        name = self.modules[_NUMBER.sub("{}", module)].format(number.group() if number else "")
        return name if module.split("/")[0] in self.outside else prefix + name

    def tensor(self, path: str, *, prefix: str = "") -> str:
        """The Hugging Face tensor of the leaf at `path`."""
        return f"{self.module(path, prefix=prefix)}.{'bias' if path.endswith('/bias') else 'weight'}"

    def module_names(self, paths: Iterable[str], *, prefix: str) -> dict[str, str]:
        """`{leaf path: Hugging Face module}`."""
        return {path: self.module(path, prefix=prefix) for path in paths}

    def tops(self, head: str) -> frozenset[str]:
        """The first segments of the Hugging Face names of a top-level module's tensors."""
        return frozenset(name.split(".")[0] for path, name in self.modules.items() if path.split("/")[0] == head)

    def modern(self, tensors: Iterable[str]) -> dict[str, str]:
        """`{name in the class without a head: name in the checkpoint}`, without buffers and pretraining heads.

        Removes the prefix, and replaces the old `gamma` and `beta` by `weight` and `bias`. If two tensors would get the
        same name, the second keeps its own.
        """
        names: dict[str, str] = {}
        for tensor in tensors:
            name = tensor.removeprefix(self.prefix)
            for old, new in _OLD_SUFFIXES.items():
                if name.endswith(f"LayerNorm{old}"):
                    name = name.removesuffix(old) + new
            if not _BUFFERS.fullmatch(name) and not re.fullmatch(self.unused, name):
                names[tensor if name in names else name] = tensor
        return names

    def layer_count(self, names: Iterable[str]) -> int:
        """Number of layers, judged by the highest layer index in Hugging Face tensor names without the prefix."""
        numbers = (self._layer.match(name) for name in names)
        return max((int(number.group(1)) + 1 for number in numbers if number), default=0)

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        before = next(name.partition("{}")[0] for name in self.modules.values() if "{}" in name)
        return re.compile(re.escape(before) + r"(\d{1,9})\.")
