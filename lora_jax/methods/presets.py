"""Which weights of a tree a preset such as `"all-linear"` selects: by the bundled models' names, and by their uses.

The names are those of `lora_jax.models`. Another model may have only some of them, so a preset goes by names alone only
where no weight is left that might belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..paths import in_norm, listed, words
from ..selection import SelectionError, matches_entry
from ..types import HasShape, LeafPath, Uses
from .base import Leaves, is_weight

_FUSED, _GATE = "attention/query_key_value", "mlp/gate"
_PARTS = tuple(f"attention/{name}" for name in ("query", "key", "value"))
_ATTENTION = (*_PARTS, _FUSED, "attention/output")
_MLP = ("mlp/up", _GATE, "mlp/down")
PRESETS = {"attention": _ATTENTION, "mlp": _MLP, "all-linear": _ATTENTION + _MLP}

# Names that other libraries give to attention and MLP modules.
_KINDS = {"attention": ("attention", "attn"), "mlp": ("mlp", "ffn", "feedforward", "feed_forward")}
# Modules that map to the output's vocabulary or classes; `"all-linear"` leaves them alone, as PEFT does.
_OUTPUT_HEADS = ("lm_head", "head", "classifier", "score", "logits", "unembed", "output_projection")
_LINEAR = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_TABLES = frozenset({"emb", "token", "tokens", "pos", "position", "positional", "table", "mask"})


class Choice(NamedTuple):
    """Weights that a preset selects, and those that it can't select though they may be meant, with the reasons."""

    found: list[LeafPath]
    unusable: dict[LeafPath, str]


def choose(
    preset: str,
    names: Sequence[str],
    leaves: Leaves,
    heads: set[LeafPath],
    uses: Uses | None,
) -> Choice:
    """The weights that a preset selects.

    Without `uses` these are the bundled models' modules of that name. With it, `"all-linear"` is every weight of a
    matmul or convolution, and `"attention"` and `"mlp"` are, beside the bundled names, those within a module whose name
    says so (`self_attn`, `ffn`).

    Args:
        preset: Name of the preset.
        names: Names of the bundled models' modules that it stands for.
        leaves: The tree's leaves by path.
        heads: Paths of the leaves that are trained in full.
        uses: Uses of the weights, from `trace_weights`.

    Raises:
        SelectionError: It selects nothing; or only some of the model's names are the bundled ones, and weights are left
            that may be the rest. They are listed.
    """
    weights = {path: leaf for path, leaf in leaves.items() if path not in heads and is_weight(path, leaf)}
    named = [path for path in weights if _means(names, path)]
    if uses is None:
        found, unusable, taken = named, {}, set(named)
        left = [path for path, leaf in weights.items() if path not in taken and _may_be_linear(path, leaf)]
    else:
        linear = [path for path in weights if _is_linear(path, uses)]
        taken = set() if preset == "all-linear" else set(named)
        taken |= {path for path in linear if preset == "all-linear" or (preset in _KINDS and _kind(path) == preset)}
        found = [path for path in weights if path in taken]
        unusable = {
            path: uses[path].reason
            for path, leaf in weights.items()
            if path not in taken and path in uses and uses[path].labels is None and _may_be_linear(path, leaf)
        }
        left = [path for path in linear if path not in taken]
    if preset in _KINDS:
        unusable = {path: reason for path, reason in unusable.items() if _kind(path) == preset}
    elif preset != "all-linear":
        unusable = {}
    if not found:
        raise SelectionError(_nothing(preset, names, unusable, left, uses))
    rest = left if preset == "all-linear" else _rest(preset, names, named, found, left)
    if rest:
        raise SelectionError(
            f"`targets={preset!r}` knows the bundled models' names ({', '.join(names)}), and beside them this tree has "
            f"weights that may be meant as well, {listed(_patterns(rest))}: {_advice(preset)}"
        )
    return Choice(found, unusable)


def _rest(preset: str, names: Sequence[str], named: list[str], found: list[str], left: list[str]) -> list[str]:
    """Those of the weights left over that may belong to a preset of one kind.

    These are all in modules of its kind; and if only some of the bundled names are there, all with a name of no kind.
    """
    within = [path for path in left if preset in _KINDS and _kind(path) == preset]
    if within or len(found) > len(named) or not _lacking(names, named):
        return within
    return [path for path in left if not _means(PRESETS["all-linear"], path)]


def _lacking(names: Sequence[str], named: list[str]) -> list[str]:
    """Names that a bundled model would have and this tree lacks."""
    absent = [name for name in names if not any(matches_entry(path, name) for path in named)]
    instead = (_FUSED,) if _FUSED in absent else _PARTS
    return [name for name in absent if name not in (*instead, _GATE)]


def _nothing(preset: str, names: Sequence[str], unusable: Mapping[str, str], left: list[str], uses: Uses | None) -> str:
    if unusable:
        return f"`targets={preset!r}` found no weight that factors can stand beside. {reasons(unusable)}"
    if uses is not None and preset == "all-linear":
        return f"`targets={preset!r}` found no weight of a matmul or convolution in `uses`: name the modules"
    others = f". Weights that it has: {listed(_patterns(left))}" if left else ""
    return (
        f"`targets={preset!r}` knows the bundled models' names ({', '.join(names)}), and this tree has none of "
        f"them: {_advice(preset)}{others}"
    )


def reasons(unusable: Mapping[str, str]) -> str:
    """The end of a message: why a preset can't select some weights, and how to adapt them nevertheless."""
    shown = listed([f"{path}: {reason}" for path, reason in unusable.items()], most=5)
    return (
        f"By `uses`, {shown}. Named in `targets` they are adapted, and merged where they are used; a weight of more "
        "than two axes, or whose uses disagree, needs labels in `uses` for that"
    )


def _advice(preset: str) -> str:
    if preset in PRESETS:
        return 'name the modules, or pass `targets="all-linear"` with `uses=lj.trace_weights(fn, params, ...)`'
    return "name the modules, or say which they are by their own names"


def _patterns(paths: list[str]) -> list[str]:
    """Paths with `*` in place of layer numbers, without repetitions."""
    return list(dict.fromkeys(re.sub(r"(?<![^/])\d+(?![^/])", "*", path) for path in paths))


def _means(names: Sequence[str], path: str) -> bool:
    return any(matches_entry(path, name) for name in names)


def _kind(path: str) -> str | None:
    """Kind of the innermost module whose name tells it, `"attention"` or `"mlp"`."""
    for segment in reversed(path.lower().split("/")):
        for kind, names in _KINDS.items():
            if any(name in segment for name in names):
                return kind
    return None


def _is_linear(path: str, uses: Uses) -> bool:
    use = uses.get(path)
    linear = use is not None and use.labels is not None and use.op in _LINEAR
    return linear and not any(matches_entry(path, head) for head in _OUTPUT_HEADS)


def _may_be_linear(path: LeafPath, leaf: HasShape) -> bool:
    """Whether a weight looks like one of a matmul within the model, as far as its name and shape tell.

    Embeddings, heads, poolers and norms don't, and neither do vectors.
    """
    if "embed" in path.lower() or in_norm(path) or sum(size > 1 for size in leaf.shape) < 2:
        return False
    last = {word for segment in path.split("/")[-2:] for word in words(segment)}
    return not last & _TABLES and not any(matches_entry(path, head, below=True) for head in (*_OUTPUT_HEADS, "pooler"))
