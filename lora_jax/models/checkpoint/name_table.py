"""The two names of every parameter: its leaf path here, and its tensor in a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

_NUMBER = re.compile(r"(?<=[/.])\d+(?=[/.])")

# Norms in checkpoints converted from TensorFlow.
_OLD_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}

# In checkpoints of old versions, and no parameters.
_BUFFERS = re.compile(r"embeddings\.(position_ids|token_type_ids)")


def is_kernel(path: str) -> bool:
    """Whether the leaf at `path` is a linear layer's weight: `(in, out)` here, `(out, in)` in `torch.nn.Linear`."""
    return path.endswith("/kernel")


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """The names of a family.

    Attributes:
        modules: `{module here: module there}`, with `{}` for the number of a layer.
        prefix: the attribute, with its dot, in which the task classes of transformers keep the model without head.
        outside: modules here that the task classes keep beside that attribute, heads.
        unused: a regular expression for tensors that checkpoints hold and no model here has, the heads of pretraining.
        is_transposed: whether the leaf at a path is the transpose of its tensor.

    Example:
        >>> table = NameTable(modules={"layers/{}/up": "layer.{}.dense", "head": "cls"}, prefix="m.", outside=("head",))
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
            path: a leaf path of a model of the family.
            prefix: of what isn't `outside`: the table's own in the task classes, nothing in the class without head.
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
        """The first segments that the names of the tensors of a top-level module here have there."""
        return frozenset(name.split(".")[0] for path, name in self.modules.items() if path.split("/")[0] == head)

    def modern(self, tensors: Iterable[str]) -> dict[str, str]:
        """`{name as in the class without head: name in the checkpoint}`, for the tensors that mean something.

        Takes the prefix off, `gamma` and `beta` for what is now `weight` and `bias`, and leaves out buffers and
        pretraining heads. Where two tensors would get one name, the later is found under its own.
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
        """One more than the highest number of a layer in Hugging Face tensor names without the prefix."""
        numbers = (self._layer.match(name) for name in names)
        return max((int(number.group(1)) + 1 for number in numbers if number), default=0)

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        before = next(name.partition("{}")[0] for name in self.modules.values() if "{}" in name)
        return re.compile(re.escape(before) + r"(\d{1,9})\.")
