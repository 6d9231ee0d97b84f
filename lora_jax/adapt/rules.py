"""What each primitive does when it meets an adapted weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import ConvSpec, DotSpec, FactoredWeight, RaggedDotSpec, TakeSpec, Unfactorable, wider
from . import control_flow, jax_compat
from .jax_compat import Equation, param
from .walk import Traced, Value, Walker

Rule: TypeAlias = Callable[[Walker, Equation, list[Value]], list[Value]]


def _only(operands: Sequence[Value], place: int) -> Traced:
    """The weight at `place`, which must be the only one among the operands."""
    if sum(isinstance(operand, Traced) for operand in operands) > 1 or not isinstance(operands[place], Traced):
        raise Unfactorable("it meets the weight in a place where only the merged array can stand")
    return operands[place]


# Where a weight does its work.


def _dot_general(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    left, right = operands
    weight_is_lhs = isinstance(left, Traced) and not isinstance(right, Traced)
    value, other = (left, right) if weight_is_lhs else (right, left)
    other = walker.materialize(other, eqn, "both operands are adapted weights")
    ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)) = param(eqn, "dimension_numbers")
    lhs, rhs = (tuple(lhs_contract), tuple(lhs_batch)), (tuple(rhs_contract), tuple(rhs_batch))
    mine, theirs = (lhs, rhs) if weight_is_lhs else (rhs, lhs)
    spec = DotSpec(
        *mine, *theirs, weight_is_lhs=weight_is_lhs, precision=param(eqn, "precision"), strategy=walker.matmul
    )
    _check_placement(eqn, value.node, other, spec)

    with jax_compat.context(eqn):
        run = jax_compat.Product(eqn.primitive, tuple(eqn.params.items()), weight_is_lhs)
        output = walker.counted(value).node.dot_general(other, spec, run)
    walker.factored(value, eqn)
    return [output]


def _check_placement(eqn: Equation, node: FactoredWeight, other: Value, spec: DotSpec) -> None:
    """Refuses what a mesh with explicit axes would: flattening split token axes, summing over devices unasked."""
    split, weight_split = jax_compat.explicit_dims(other), jax_compat.explicit_dims(node.base)
    if not split | weight_split:
        return
    tokens = [axis for axis in range(np.ndim(other)) if axis not in spec.other_contract + spec.other_batch]
    if split - set(tokens[:1]) or weight_split & set(spec.weight_contract) or param(eqn, "out_sharding") is not None:
        raise Unfactorable("it is split along explicit mesh axes, other than by the first token axis or the result")


def _gather(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    value, indices = _only(operands, 0), operands[1]
    numbers, mode = param(eqn, "dimension_numbers"), param(eqn, "mode")
    shape, sizes = value.node.shape, tuple(param(eqn, "slice_sizes"))
    # Where starts are clipped, that of an axis taken whole is 0 whatever it says: so `vmap` of `weight[index]` looks.
    clips = mode == lax.GatherScatterMode.CLIP
    indexed = [int(axis) for axis in numbers.start_index_map]  # `vmap` leaves NumPy integers there
    axes = [axis for axis in indexed if not (clips and sizes[axis] == shape[axis])]
    if (
        len(axes) != 1
        or tuple(1 if axis in axes else size for axis, size in enumerate(shape)) != sizes
        or not set(numbers.collapsed_slice_dims) <= set(axes)
        or numbers.operand_batching_dims
    ):
        raise Unfactorable("a gather that is no lookup of whole slices along one axis")
    (axis,) = axes
    place = indexed.index(axis)
    # A lookup that keeps its axis, of size one, is computed without and gets it back.
    kept = None if numbers.collapsed_slice_dims else numbers.offset_dims[axis]
    others = [dim for dim in numbers.offset_dims if dim != kept]
    offsets = tuple(dim if kept is None or dim < kept else dim - 1 for dim in others)

    def run(base: jax.Array) -> jax.Array:
        output = jax_compat.bind(eqn, base, indices)
        return output if kept is None else lax.squeeze(output, [kept])

    spec = TakeSpec(axis, offsets, mode)
    with jax_compat.context(eqn):
        output = value.node.take(indices[..., place : place + 1], spec, run)
        output = output if kept is None else lax.expand_dims(output, [kept])
    walker.factored(value, eqn)
    return [output]


def _conv(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    value, other = _only(operands, 1), operands[0]
    numbers = param(eqn, "dimension_numbers")
    if param(eqn, "feature_group_count") != 1 or param(eqn, "batch_group_count") != 1:
        raise Unfactorable("a grouped convolution")
    spec = ConvSpec(numbers.rhs_spec[0], numbers.out_spec[1], dict(eqn.params))
    with jax_compat.context(eqn):
        output = walker.counted(value).node.conv(other, spec, lambda base: jax_compat.bind(eqn, other, base))
    walker.factored(value, eqn)
    return [output]


def _ragged_dot(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    value, other, sizes = _only(operands, 1), operands[0], operands[2]
    numbers = param(eqn, "ragged_dot_dimension_numbers")
    (other_contract, weight_contract), batch = numbers.dot_dimension_numbers
    ragged, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    plain = (
        (ragged, tuple(other_contract), other.ndim) == ((0,), (1,), 2)
        and not any(batch)
        and param(eqn, "group_offset") is None
    )
    if not plain or len(weight_contract) != 1 or len(groups) != 1:
        raise Unfactorable("a ragged matmul other than of tokens by groups of one weight each")
    spec = RaggedDotSpec(weight_contract[0], groups[0], param(eqn, "precision"))
    with jax_compat.context(eqn):
        output = walker.counted(value).node.ragged_dot(
            other, sizes, spec, lambda base, other: jax_compat.bind(eqn, other, base, sizes)
        )
    walker.factored(value, eqn)
    return [output]


# Layout: the weight stays a weight.


def _layout(change: Callable[[FactoredWeight, Equation], FactoredWeight]) -> Rule:
    def rule(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
        del walker
        value = _only(operands, 0)
        with jax_compat.context(eqn):
            return [value._replace(node=change(value.node, eqn))]

    return rule


def _placed(node: FactoredWeight, eqn: Equation, changed: FactoredWeight) -> FactoredWeight:
    """The changed node, its base placed as the equation says where it says so (meshes with explicit axes)."""
    return changed if param(eqn, "sharding") is None else changed.with_base(jax_compat.bind(eqn, node.base))


def _transpose(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    return node.transpose(param(eqn, "permutation"))


def _reshape(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    if param(eqn, "dimensions") is not None:
        raise Unfactorable("a reshape that also transposes")
    return _placed(node, eqn, node.reshape(param(eqn, "new_sizes")))


def _squeeze(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    dimensions = param(eqn, "dimensions")
    return node.reshape([size for axis, size in enumerate(node.shape) if axis not in dimensions])


def _broadcast_in_dim(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    changed = node.broadcast_in_dim(param(eqn, "shape"), param(eqn, "broadcast_dimensions"))
    return _placed(node, eqn, changed)


def _slice(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    starts, limits = param(eqn, "start_indices"), param(eqn, "limit_indices")
    strides = param(eqn, "strides") or [1] * node.ndim

    def cutter(array: Value, axes: list[int | None]) -> Value:
        for dim, axis in enumerate(axes):
            if axis is not None and (starts[axis], limits[axis], strides[axis]) != (0, array.shape[dim], 1):
                array = lax.slice_in_dim(array, starts[axis], limits[axis], strides[axis], axis=dim)
        return array

    return node.cut(cutter)


def _rev(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    reversed_axes = param(eqn, "dimensions")

    def cutter(array: Value, axes: list[int | None]) -> Value:
        # Every array that has the axis turns around with it.
        return lax.rev(array, [dim for dim, axis in enumerate(axes) if axis in reversed_axes])

    return node.cut(cutter)


def _tile(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    reps = param(eqn, "reps")

    def cutter(array: Value, axes: list[int | None]) -> Value:
        return jnp.tile(array, [1 if axis is None else reps[axis] for axis in axes])

    return node.cut(cutter)


def _convert(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    dtype = param(eqn, "new_dtype")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unfactorable(f"a cast to {dtype}")
    # Factors stay float32: what is computed with them takes the activations' precision where it is used.
    return node.with_base(jax_compat.bind(eqn, node.base))


def _on_base(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    return node.with_base(jax_compat.bind(eqn, node.base))


def _stop_gradient(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    del eqn
    return node.each(lax.stop_gradient)


def _on_every_array(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    return node.each(lambda array: jax_compat.bind(eqn, array))


def _negate(node: FactoredWeight, eqn: Equation) -> FactoredWeight:
    return node.times(jnp.float32(-1)).with_base(jax_compat.bind(eqn, node.base))


def _dynamic_slice(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    value, starts = _only(operands, 0), operands[1:]
    sizes = param(eqn, "slice_sizes")

    def cutter(array: Value, axes: list[int | None]) -> Value:
        for dim, axis in enumerate(axes):
            # A slice of the whole axis starts at 0, whatever its start says: `dynamic_slice` clamps.
            if axis is not None and sizes[axis] != array.shape[dim]:
                array = lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], axis=dim)
        return array

    del walker
    with jax_compat.context(eqn):
        return [value._replace(node=value.node.cut(cutter))]


def _parts(node: FactoredWeight, axis: int, sizes: Sequence[int]) -> list[FactoredWeight]:
    """A node cut along one axis into parts of these sizes."""
    ends = np.cumsum(sizes)
    parts = []
    for start, end in zip(ends - np.asarray(sizes), ends, strict=True):

        def cutter(array: Value, axes: list[int | None], start: int = int(start), end: int = int(end)) -> Value:
            return lax.slice_in_dim(array, start, end, axis=axes.index(axis)) if axis in axes else array

        parts.append(node.cut(cutter))
    return parts


def _split(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    del walker
    value = _only(operands, 0)
    with jax_compat.context(eqn):
        return [
            value._replace(node=part)
            for part in _parts(value.node, param(eqn, "axis"), [int(size) for size in param(eqn, "sizes")])
        ]


def _unstack(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    del walker
    value, axis = _only(operands, 0), param(eqn, "axis")
    shape = value.node.shape
    with jax_compat.context(eqn):
        parts = _parts(value.node, axis, [1] * shape[axis])
        return [value._replace(node=part.reshape(shape[:axis] + shape[axis + 1 :])) for part in parts]


def _scalar_multiple(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    del walker
    place = next(index for index, operand in enumerate(operands) if isinstance(operand, Traced))
    value, other = _only(operands, place), operands[1 - place]
    divides = eqn.primitive.name == "div"
    if np.ndim(other) != 0 or (divides and place == 1):
        raise Unfactorable("elementwise arithmetic with more than a scalar")
    bases = [operand.node.base if isinstance(operand, Traced) else operand for operand in operands]
    with jax_compat.context(eqn):
        factor = jnp.asarray(other, wider(other.dtype, jnp.float32))
        node = value.node.times(1 / factor if divides else factor)
        return [value._replace(node=node.with_base(jax_compat.bind(eqn, *bases)))]


def _all_gather(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    del walker
    value, gathered, groups = _only(operands, 0), param(eqn, "all_gather_dimension"), param(eqn, "axis_index_groups")
    name = param(eqn, "axis_name")
    if not param(eqn, "tiled"):
        raise Unfactorable("an all-gather along a new axis")

    def cutter(array: Value, axes: list[int | None]) -> Value:
        # A factor without the axis is whole on every device already.
        if gathered not in axes:
            return array
        return lax.all_gather(array, name, axis_index_groups=groups, axis=axes.index(gathered), tiled=True)

    with jax_compat.context(eqn):
        return [value._replace(node=value.node.cut(cutter))]


def _optimization_barrier(walker: Walker, eqn: Equation, operands: list[Value]) -> list[Value]:
    del walker
    bases = [operand.node.base if isinstance(operand, Traced) else operand for operand in operands]
    with jax_compat.context(eqn):
        passed = jax_compat.bind(eqn, *bases)
    return [
        operand._replace(node=operand.node.with_base(base)) if isinstance(operand, Traced) else base
        for operand, base in zip(operands, passed, strict=True)
    ]


class RuleEntry(NamedTuple):
    """A rule and every parameter of its primitive that it takes into account, or that changes nothing for it."""

    rule: Rule
    params: frozenset[str]


def _rule(rule: Rule, params: str = "") -> RuleEntry:
    return RuleEntry(rule, frozenset(params.split()))


RULES: dict[str, RuleEntry] = {
    "dot_general": _rule(_dot_general, "dimension_numbers precision preferred_element_type out_sharding"),
    "gather": _rule(_gather, "dimension_numbers slice_sizes mode fill_value indices_are_sorted unique_indices"),
    "conv_general_dilated": _rule(
        _conv,
        "dimension_numbers window_strides padding lhs_dilation rhs_dilation feature_group_count batch_group_count "
        "precision preferred_element_type out_sharding",
    ),
    "ragged_dot_general": _rule(
        _ragged_dot, "ragged_dot_dimension_numbers precision preferred_element_type group_offset out_sharding"
    ),
    "transpose": _rule(_layout(_transpose), "permutation"),
    "reshape": _rule(_layout(_reshape), "new_sizes dimensions sharding"),
    "squeeze": _rule(_layout(_squeeze), "dimensions"),
    "broadcast_in_dim": _rule(_layout(_broadcast_in_dim), "shape broadcast_dimensions sharding"),
    "rev": _rule(_layout(_rev), "dimensions"),
    "slice": _rule(_layout(_slice), "start_indices limit_indices strides"),
    "dynamic_slice": _rule(_dynamic_slice, "slice_sizes"),
    "split": _rule(_split, "axis sizes"),
    "unstack": _rule(_unstack, "axis"),
    "tile": _rule(_layout(_tile), "reps"),
    "convert_element_type": _rule(_layout(_convert), "new_dtype weak_type sharding"),
    "mul": _rule(_scalar_multiple, "out_dtype"),
    "div": _rule(_scalar_multiple),
    "neg": _rule(_layout(_negate)),
    "sharding_constraint": _rule(_layout(_on_base), "sharding layout context_mesh unconstrained_dims"),
    "name": _rule(_layout(_on_base), "name"),
    "copy": _rule(_layout(_on_base)),
    "stop_gradient": _rule(_layout(_stop_gradient)),
    "pvary": _rule(_layout(_on_every_array), "axes"),
    "all_gather": _rule(_all_gather, "all_gather_dimension axis_name axis_size axis_index_groups tiled"),
    "optimization_barrier": _rule(_optimization_barrier),
    "jit": _rule(
        control_flow.jit_rule,
        "jaxpr name in_shardings out_shardings in_layouts out_layouts donated_invars compiler_options_kvs ctx_mesh "
        "inline keep_unused",
    ),
    "custom_jvp_call": _rule(control_flow.custom_jvp_rule, "call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros"),
    "remat2": _rule(control_flow.remat_rule, "jaxpr policy prevent_cse differentiated"),
    "scan": _rule(control_flow.scan_rule, "jaxpr length num_consts num_carry ft_in ft_out reverse unroll"),
    "while": _rule(control_flow.while_rule, "cond_jaxpr body_jaxpr cond_nconsts body_nconsts"),
    "cond": _rule(control_flow.cond_rule, "branches"),
    "shard_map": _rule(control_flow.shard_map_rule, "jaxpr mesh in_specs out_specs newly_manual_axes check_vma"),
}
