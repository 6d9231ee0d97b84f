"""How a leaf lies in a Hugging Face checkpoint: transposes and head reshapes, from the labels of its axes.

There, a linear layer's weight is `(out, in)` and has two axes; here it is `(in, out)` as a rule, and either side may be
split into heads. Axes of one label are joined in the order in which the leaf has them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..adapters import AdapterError
from ..methods.lora.weight import LowRankWeight
from ..methods.weight_method import by_convention
from ..paths import is_weight_name, leaf_name, shape_text, words
from ..types import Leaf, Uses
from ..weights import IN, OUT, STACK

# Words of a leaf's name that say that it may be a table of embeddings.
_TABLES = frozenset({"embedding", "embeddings", "embed", "emb", "table"})


class Layout(NamedTuple):
    """One leaf's place in both worlds.

    Attributes:
        here: Shape in the tree.
        order: Axes of the leaf, in the order of the Hugging Face tensor.
        there: Shape of the tensor.
    """

    here: tuple[int, ...]
    order: tuple[int, ...]
    there: tuple[int, ...]

    def hint(self, shape: tuple[int, ...], in_out: bool | None) -> str:
        """What may be the reason that a tensor has this shape; ends a message."""
        if in_out is not None or len(shape) != 2 or shape != self.there[::-1]:
            return ""
        return ". If its module stores (in, out), as GPT-2's `Conv1D` does, name it in `fan_in_fan_out`"

    def export(self, array: Leaf) -> np.ndarray:
        """The Hugging Face tensor of a leaf."""
        return np.asarray(array).transpose(self.order).reshape(self.there)

    def restore(self, tensor: np.ndarray) -> np.ndarray:
        """The leaf of a Hugging Face tensor."""
        split = tensor.reshape([self.here[axis] for axis in self.order])
        return split.transpose(np.argsort(self.order))


def is_embedding(path: str, uses: Uses | None) -> bool:
    """Whether a leaf is a table of embeddings, which both sides keep as `(rows, d)`."""
    use = (uses or {}).get(path)
    return leaf_name(path) == "embedding" or (use is not None and use.op == "gather")


def weight_axes(path: str, leaf: Leaf, uses: Uses | None) -> str:
    """The labels of a weight's axes, from `uses` or by the convention `(in, out)`.

    Raises:
        AdapterError: They are unknown, or PEFT has no place for such a weight: a stack of layers, a convolution.
    """
    use = (uses or {}).get(path)
    shape = tuple(leaf.shape)
    if is_embedding(path, uses) and len(shape) == 2:
        return IN + OUT
    if by_convention(leaf, use):
        if leaf_name(path) == "weight":
            raise AdapterError(
                f"whether `{path}` {shape_text(leaf)} is stored (in, out) or (out, in), as Equinox does, can't be "
                f"told: {'label it in' if use is not None else 'pass'} `uses=lj.trace_weights(fn, params, ...)`"
            )
        return IN + OUT
    if use is None or use.labels is None or len(use.labels) != len(shape):
        way_out = "pass `uses=lj.trace_weights(fn, params, ...)`"
        if use is not None and use.labels is None:
            way_out = f"{use.reason}. Give its entry of `uses` labels by hand, as you did for `attach`"
        raise AdapterError(f"the roles of the axes of `{path}` {shape_text(leaf)} are unknown: {way_out}")
    if use.op == "conv_general_dilated":
        raise AdapterError(f"`{path}` is the kernel of a convolution, and only linear layers and embeddings exchange")
    require_no_stack(path, use.labels)
    return use.labels


def require_no_stack(path: str, labels: str) -> None:
    if STACK in labels:
        raise AdapterError(
            f"`{path}` is labelled {labels!r}, a stack of layers or experts, and Hugging Face has a module for each: "
            "unstack it first"
        )


def leaf_layout(path: str, leaf: Leaf, uses: Uses | None, *, in_out: bool | None = False) -> Layout:
    """How the whole leaf lies in a checkpoint.

    Args:
        path, leaf: Leaf with its path; of an adapted weight, its base is meant.
        uses: Result of `trace_weights`, needed for weights of more than two axes and those stored `(out, in)`.
        in_out: Whether the module there stores `(in, out)`, as the `Conv1D` of GPT-2 does; `None` if nobody has said.

    Raises:
        AdapterError: As `weight_axes`; or the leaf is square, so that its shape doesn't show a mistake, and `in_out` is
            `None`, or its name is a table's and `uses` doesn't tell what it is.
    """
    shape = tuple(leaf.shape)
    if not is_weight_name(path) or len(shape) < 2:  # biases and norms, though they may be split into heads
        return Layout(shape, tuple(range(len(shape))), (math.prod(shape),) if shape else ())
    labels = weight_axes(path, leaf, uses)
    inside, outside = ([axis for axis, own in enumerate(labels) if own == label] for label in (IN, OUT))
    fan_in, fan_out = factor_sizes(shape, labels)
    embedding = is_embedding(path, uses)
    if fan_in == fan_out > 1 and not embedding and path not in (uses or {}) and _TABLES & set(words(leaf_name(path))):
        raise AdapterError(
            f"`{path}` {shape_text(leaf)} is square and named as a table of embeddings, which both sides keep as "
            "(rows, d), or a weight of that name, which is transposed: pass `uses=lj.trace_weights(fn, params, ...)`"
        )
    if in_out is None and fan_in == fan_out > 1 and not embedding:
        raise AdapterError(
            f"`{path}` {shape_text(leaf)} is square, so its shape doesn't tell whether it is stored there as by "
            "`torch.nn.Linear`, (out, in), or as by GPT-2's `Conv1D`, (in, out): pass `fan_in_fan_out=()` if no module "
            'stores (in, out), else the names of those that do, such as `fan_in_fan_out=("c_attn", "c_proj")`'
        )
    first, second = (inside, outside) if in_out or embedding else (outside, inside)
    sizes = tuple(math.prod(shape[axis] for axis in axes) for axes in (first, second))
    return Layout(shape, (*first, *second), sizes)


def factor_sizes(shape: tuple[int, ...], labels: str) -> tuple[int, int]:
    """`(in, out)` of a weight: the products of the axes so labelled."""
    fan_in, fan_out = (
        math.prod(size for size, own in zip(shape, labels, strict=True) if own == label) for label in (IN, OUT)
    )
    return fan_in, fan_out


def export_factors(node: LowRankWeight) -> tuple[np.ndarray, np.ndarray]:
    """`A (r, in)` and `B (out, r)` as PEFT has them; of twice the rank where the factors started from the weight.

    Example:
        >>> import lora_jax as lj
        >>> node = lj.LoRAWeight(np.zeros((6, 2, 4)), np.ones((3, 6)), np.ones((3, 2, 4)), scale=1.0, axes="ioo")
        >>> [array.shape for array in export_factors(node)]
        [(3, 6), (8, 3)]
    """
    pair = node.one_pair()
    return np.asarray(pair.a).reshape(pair.rank, -1), np.asarray(pair.b).reshape(pair.rank, -1).T


def restore_factors(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """`a (r, in…)` and `b (r, out…)` as `LoRAWeight` has them; the inverse of `export_factors`."""
    inside, outside = ([size for size, own in zip(shape, labels, strict=True) if own == label] for label in (IN, OUT))
    rank = a.shape[0]
    return a.reshape(rank, *inside), b.T.reshape(rank, *outside)
