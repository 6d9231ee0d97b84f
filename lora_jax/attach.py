"""From a base tree to one with factors, and back."""

from __future__ import annotations

import warnings

import jax

from .errors import ArgumentError
from .masks import copied
from .methods import Method
from .paths import flatten_with_paths, leaves_by_path, nearest, with_leaves, without_leaves
from .state import StateWarning, lost_state, marked_leaves
from .types import Leaf, Params, Uses
from .weights import InsertedNode, is_adapted


def attach(params: Params, method: Method, *, key: jax.Array, uses: Uses | None = None) -> Params:
    """A new tree in which the method's targets are adapted weights.

    At the start it stands for the same function: `adapt(f)(attach(p, …), x) == f(p, x)`. Each leaf's initial factors
    depend on `key` and on the leaf's path alone, so adding a target never changes another's start.

    Args:
        params: The base parameters, any pytree.
        method: What to train.
        key: Random key of the initial factors.
        uses: `{path: Use}` from `trace_weights`; needed where a target has more than two axes, and for presets on a
            model that isn't bundled. Without it, or where it says nothing of the axes, a two-axis weight is read as
            `(in, out)`, JAX's convention; a model that stores `(out, in)`, as Equinox does, trains
            the same function either way, with `a` and `b` in exchanged places.

    Warns:
        StateWarning: `params` holds state that a pure function would lose: of Flax NNX, batch statistics and the random
            streams of dropout. They are never trained; pass them apart.

    Returns:
        A tree like `params` with nodes (`LoRAWeight`) at the targets. Leaves of `also_train` are copied, so that
        donating them leaves the base whole; all others are the same objects.

    Raises:
        SelectionError: A selector matches nothing, or nothing suitable (state is never suitable); a leaf is both target
            and head.
        TypeError: A leaf is an array of another library, a Keras variable say; `key` is no random key.
        ValueError: A rank is larger than a weight allows; the roles of a weight's axes are unknown; a target has
            factors already; `uses` names a leaf that `params` does not have.

    Example:
        >>> import lora_jax as lj
        >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
        >>> tree = lj.attach(params, lj.LoRA(rank=2, alpha=2, targets=("dense",)), key=jax.random.key(0))
        >>> type(tree["dense"]["kernel"]).__name__, tree["dense"]["bias"] is params["dense"]["bias"]
        ('LoRAWeight', True)
    """
    leaves, marked = leaves_by_path(params), marked_leaves(params)
    adapted = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if adapted:
        raise ArgumentError(
            f"`params` has factors already, at {', '.join(adapted[:5])}: take them off with `lj.detach`, or fold "
            "them in with `lj.merge_params`, first"
        )
    unknown = [path for path in uses or () if path not in leaves]
    if unknown:
        near = nearest(unknown[0], leaves)
        raise ArgumentError(
            f"`uses` has `{unknown[0]}`, and `params` does not. Nearest paths: {', '.join(near) or 'none'}"
        )
    if lost := lost_state(params):
        warnings.warn(lost, StateWarning, stacklevel=2)
    changed = {path: copied(leaves[path]) for path in method.head(marked)}
    changed |= method.attach(marked, key=key, uses=uses)
    _, _, treedef = flatten_with_paths(params)
    tree = jax.tree.unflatten(treedef, [changed.get(path, leaf) for path, leaf in leaves.items()])
    return with_leaves(tree, {path: node for path, node in changed.items() if path not in leaves})


def detach(params: Params) -> Params:
    """Takes off what was attached: the base weights, and every other leaf as it is (trained biases stay trained).

    Example:
        >>> import lora_jax as lj
        >>> params = {"w": jnp.ones((4, 3))}
        >>> tree = lj.attach(params, lj.LoRA(rank=2, alpha=2, targets=("w",)), key=jax.random.key(0))
        >>> lj.detach(tree)["w"] is params["w"]
        True
    """
    if any(map(_is_inserted, leaves_by_path(params).values())):
        params = without_leaves(params, _is_inserted)
    return jax.tree.map(lambda leaf: leaf.base if is_adapted(leaf) else leaf, params, is_leaf=is_adapted)


def _is_inserted(leaf: Leaf) -> bool:
    return isinstance(leaf, InsertedNode)
