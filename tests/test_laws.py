"""The laws of the core (docs/design.md), over the table of models, in float32 and bfloat16, jitted and not.

Errors are maximum norms relative to the largest value of the tree. Float32: 1e-5, some hundred roundings. Bfloat16:
3e-2, for a merged weight is rounded to 8 bits before it is used, and a factored one never is.

Each law has been seen to fail, when

1   `b` starts at 1e-3 instead of zero;
2   the low-rank matmul forgets `scale`; so does the lookup;
3   merging asks for the base's sharding where JAX chose it (compiles anew), or returns float32 for bfloat16; a number
    drawn at random is a static part of the node (swapping compiles);
4   `partition` copies frozen leaves; `load_adapter` rounds to bfloat16;
5   `partition` does not copy trained leaves (donation deletes the base's); the mask is true everywhere; `lora_b` gets
    `set_to_zero`;
6   the optimizer is the transformation itself, without labels;
7   a matmul with a node is one with its merged weight (autodiff then forms `in x out`), by shapes and by FLOPs;
8   `a` starts at zero and `b` does not; norms' scales count as biases;
9   the rule for lookups is missing;
10  keys come from Python's `hash` of the path; every leaf draws with the same key.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.methods.base import FROZEN
from lora_jax.paths import flatten_with_paths, leaves_by_path
from lora_jax.weights import is_adapted

from .models_table import TABLE, case
from .tiny_encoders import write_tiny

# In full for LoRA and BitFit, on two models for every other method; where weights change, one has stacks of them.
PAIRS = [(name, method) for name in TABLE for method in ("lora", "bitfit")]
PAIRS += [(name, method) for name in ("plain", "nnx_mlp") for method in ("full", "frozen")]
RELATIVES = ("pissa", "lora_fa", "dora", "ia3", "vera")
PAIRS += [(name, method) for name in ("plain", "linen_scanned") for method in RELATIVES]
PAIRS += [("linen_scanned", "random_entries"), ("linen_scanned", "subspace")]
PAIRS += [("plain", "random_rows"), ("plain", "structured_subspace")]
# Models that have norms, and layers.
PAIRS += [("nnx_attention", "norms"), ("bert", "norms"), ("equinox", "top_layers"), ("bert", "top_layers")]

# What inserts arrays works on the bundled models; on decoders, stacked or not, in tests/methods/test_inserted.py.
INSERTING = ("houlsby", "pfeiffer", "prefix", "direct_prefix")
FOLDED = list(PAIRS)
PAIRS += [("bert", method) for method in INSERTING]

every_pair = pytest.mark.parametrize(("name", "method"), PAIRS)


def with_bfloat16(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Float32 for every pair, bfloat16 beside it on one model."""
    cases = [(name, method, "float32") for name, method in pairs]
    cases += [(name, method, "bfloat16") for name, method in pairs if name == "plain"]
    return pytest.mark.parametrize(("name", "method", "dtype"), cases)


every_model = pytest.mark.parametrize("name", TABLE)
in_each_dtype = pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [(name, dtype, "lora") for name in TABLE for dtype in ("float32", "bfloat16")]
    + [
        (name, dtype, method)
        for name, dtype in (("plain", "float32"), ("plain", "bfloat16"), ("linen_scanned", "float32"))
        for method in RELATIVES
    ]
    + [("bert", dtype, method) for dtype in ("float32", "bfloat16") for method in ("houlsby", "pfeiffer")],
)
with_a_prefix = [("bert", dtype, method) for dtype in ("float32", "bfloat16") for method in ("prefix", "direct_prefix")]
# Every operation is compiled alone, which takes its time: one model of each way to write one, bfloat16 on one.
unjitted = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", "float32"),
        ("plain", "bfloat16"),
        ("nnx_mlp", "float32"),
        ("linen_scanned", "float32"),
        ("equinox", "float32"),
    ],
)


def error(found: Any, wanted: Any) -> float:
    """The largest difference of two trees, relative to the largest value of the second."""
    chex.assert_trees_all_equal_shapes(found, wanted)
    found, wanted = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (found, wanted))
    largest = max(np.abs(leaf).max() for leaf in wanted)
    return max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) / largest


def loss_of(output: jax.Array) -> jax.Array:
    """Cross entropy with fixed classes: its gradient reaches every logit."""
    classes = jnp.arange(output.shape[0]) % output.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(output.astype(jnp.float32), classes).mean()


def split(params: Any, method: lj.Method) -> lj.Partition:
    return lj.partition(params, lj.trainable_mask(params, method))


class Outcome(NamedTuple):
    """What a function computes of a split tree: its output, and the gradient of a loss for every trainable leaf."""

    output: jax.Array
    gradients: Any


def outcome_of(apply: Callable[..., jax.Array]) -> Callable[..., Outcome]:
    def run(trainable: Any, frozen: Any, x: jax.Array) -> Outcome:
        def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
            output = apply(lj.combine(trainable, frozen), x)
            return loss_of(output), output

        gradients, output = jax.grad(loss, has_aux=True)(trainable)
        return Outcome(output, gradients)

    return run


# Compiled once for all laws: a second trace, for whatever adapter or merged tree, is an error (law 3).


def traced_once(fn: Callable[..., Any], *row: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fn(*args)

    run.__name__ = "_".join([fn.__name__, *row])  # by which chex tells functions apart
    return jax.jit(chex.assert_max_traces(run, n=1))


def adapted(name: str, dtype: str = "float32", method: str = "lora") -> Callable[..., Outcome]:
    return _adapted(name, dtype, method)


@functools.cache
def _adapted(name: str, dtype: str, method: str) -> Callable[..., Outcome]:
    run = outcome_of(lj.adapt(case(name, dtype).apply, on_materialize="error"))
    return traced_once(run, "adapted", name, dtype, method)


@functools.cache
def merged(name: str, dtype: str, method: str) -> Callable[..., Outcome]:
    apply = case(name, dtype).apply
    return traced_once(outcome_of(lambda params, x: apply(lj.merge_params(params), x)), "merged", name, dtype, method)


@functools.cache
def plain(name: str, dtype: str) -> Callable[..., jax.Array]:
    """The model as it is, jitted and called once on the base."""
    row = case(name, dtype)
    apply = traced_once(row.apply, "plain", name, dtype)
    apply(row.params, row.x)
    return apply


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """What XLA compiles within the block, by the name of the event."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Law 1.


@in_each_dtype
def test_law_1_attaching_changes_nothing(name: str, dtype: str, method: str) -> None:
    """At the start `adapt(f)(attach(p), x) == f(p, x)`."""
    row = case(name, dtype)
    chosen = row.method(method)
    found = adapted(name, dtype, method)(*split(row.attach(chosen), chosen), row.x).output
    wanted = plain(name, dtype)(row.params, row.x)
    assert found.dtype == wanted.dtype
    assert error(found, wanted) <= row.error()


@unjitted
def test_law_1_bit_for_bit_without_jit(name: str, dtype: str) -> None:
    """Where the same kernels run, which under `jit` XLA's fusion decides, not a bit changes; dropout is off."""
    row = case(name, dtype)
    params = row.attach(row.lora(dropout=0.5))
    found = lj.adapt(row.apply, on_materialize="error")(params, row.x)
    np.testing.assert_array_equal(found, row.apply(row.params, row.x))


# Law 2.


@in_each_dtype
def test_law_2_adapted_equals_merged(name: str, dtype: str, method: str) -> None:
    check_law_2(name, dtype, method)


@pytest.mark.parametrize(("name", "dtype", "method"), with_a_prefix)
def test_law_2_of_prefixes(name: str, dtype: str, method: str) -> None:
    """They have no law 1: whatever they start from, tokens attend to them, and the function isn't the base's."""
    check_law_2(name, dtype, method)


def check_law_2(name: str, dtype: str, method: str) -> None:
    """`adapt(f)(p, x) == f(merge_params(p), x)` with B not zero, and so do the gradients of every trainable leaf.

    Bfloat16 gradients: 1e-1, for the rounding of merged weights enters twice, in the activations and in the way back.
    """
    row = case(name, dtype)
    chosen = row.method(method)
    params = row.trained(chosen)
    found = adapted(name, dtype, method)(*split(params, chosen), row.x)
    wanted = merged(name, dtype, method)(*split(params, chosen), row.x)
    assert error(found.output, wanted.output) <= row.error()
    assert error(found.gradients, wanted.gradients) <= (1e-1 if dtype == "bfloat16" else 1e-5)
    chex.assert_trees_all_equal_dtypes(found.gradients, split(params, chosen).trainable)
    # The law would hold for factors that nobody uses: they matter.
    assert error(plain(name, dtype)(lj.detach(params), row.x), wanted.output) > 0.05


@unjitted
def test_law_2_without_jit(name: str, dtype: str) -> None:
    """As above, every operation alone."""
    row = case(name, dtype)
    params = row.trained(row.lora())
    found = lj.adapt(row.apply, on_materialize="error")(params, row.x)
    assert error(found, row.apply(lj.merge_params(params), row.x)) <= row.error()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_law_2_holds_under_strict_dtype_promotion(dtype: str) -> None:
    """Nothing in the core promotes a dtype by accident: a model that can be traced under strict promotion still can."""
    row = case("plain", dtype)
    trainable, frozen = split(row.trained(row.lora()), row.lora())
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(outcome_of(lj.adapt(row.apply, on_materialize="error")), trainable, frozen, row.x)
        jax.eval_shape(lambda: row.apply(lj.merge_params(lj.combine(trainable, frozen)), row.x))


# Law 3.


@with_bfloat16(FOLDED)
def test_law_3_merged_parameters_run_in_the_program_of_the_base(name: str, method: str, dtype: str) -> None:
    """`merge_params` returns the base's structure, shapes, dtypes and shardings; a jitted `f` compiles nothing new."""
    row = case(name, dtype)
    apply, base = plain(name, dtype), row.params
    whole = lj.merge_params(row.trained(row.method(method)))
    chex.assert_trees_all_equal_structs(whole, base)
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, base)
    assert jax.tree.map(lambda leaf: leaf.sharding, whole) == jax.tree.map(lambda leaf: leaf.sharding, base)
    with counted_compilations() as compiled:
        result = apply(whole, row.x)
    assert not compiled
    assert error(result, apply(base, row.x)) > 1e-3


@pytest.mark.parametrize("method", INSERTING)
def test_law_3_what_is_inserted_stays_and_the_base_is_as_it_was(method: str) -> None:
    """`merge_params` leaves plain arrays in the inserted places, and the base's leaves with their shapes and dtypes."""
    row = case("bert")
    whole = leaves_by_path(lj.merge_params(row.trained(row.method(method))))
    base = leaves_by_path(row.params)
    assert {path: (whole[path].shape, whole[path].dtype) for path in base} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in base.items()
    }
    inserted = [path for path in whole if path not in base]
    assert inserted
    assert all(re.search("/(adapter/(down|up)|prefix)/", path) for path in inserted)
    assert not any(map(is_adapted, whole.values()))


@every_pair
def test_law_3_adapters_are_swapped_without_compiling(name: str, method: str) -> None:
    """Nor does a jitted `adapt(f)` for another adapter of the same method."""
    row = case(name)
    chosen = row.method(method)
    apply = adapted(name, method=method)
    first = apply(*split(row.trained(chosen), chosen), row.x).output
    other = split(row.trained(chosen, seed=2), chosen)
    with counted_compilations() as compiled:
        second = apply(*other, row.x).output
    assert not compiled
    assert error(second, first) > 1e-3


# Law 4.


@with_bfloat16(PAIRS)
def test_law_4_inverse_pairs(name: str, method: str, dtype: str, tmp_path: Any) -> None:
    """`combine` undoes `partition`, `detach` undoes `attach`, `load_adapter` undoes `save_adapter`: exactly."""
    row = case(name, dtype)
    chosen = row.method(method)
    params = row.trained(chosen)
    trainable, frozen = split(params, chosen)
    chex.assert_trees_all_equal(lj.combine(trainable, frozen), params)
    chex.assert_trees_all_equal_structs(lj.combine(trainable, frozen), params)
    whole = {id(leaf) for leaf in jax.tree.leaves(params)}
    assert all(id(leaf) in whole for leaf in jax.tree.leaves(frozen))

    chex.assert_trees_all_equal(lj.detach(row.attach(chosen)), row.params)
    chex.assert_trees_all_equal_structs(lj.detach(row.attach(chosen)), row.params)

    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, chosen), row.params)
    chex.assert_trees_all_equal(loaded.params, params)
    chex.assert_trees_all_equal_structs(loaded.params, params)
    chex.assert_trees_all_equal_dtypes(loaded.params, params)
    assert lj.label_params(loaded.params, loaded.method) == lj.label_params(params, chosen)


# Laws 5 and 6.


@every_pair
def test_law_5_frozen_leaves_stay_and_the_others_move(name: str, method: str) -> None:
    """After steps, frozen leaves are bit-identical, and every leaf that had a gradient has moved; the base is whole.

    As the README trains: the trainable part and the optimizer's state are donated at each step.
    """
    row = case(name)
    chosen = row.method(method)
    params = row.attach(chosen)
    base, before = jax.tree.map(np.array, (row.params, params))
    trainable, frozen = split(params, chosen)
    tx = lj.make_optimizer(optax.adam(1e-2), lj.label_params(params, chosen))

    @functools.partial(jax.jit, donate_argnames=("trainable", "state"))
    def update(trainable: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state, had_gradient = tx.init(trainable), jax.tree.map(lambda leaf: False, trainable)
    for _ in range(3):
        gradients = adapted(name, method=method)(trainable, frozen, row.x).gradients
        had_gradient = jax.tree.map(lambda had, g: had or bool(np.any(g)), had_gradient, gradients)
        trainable, state = update(trainable, state, gradients)
    after = lj.combine(trainable, frozen)

    mask = jax.tree.leaves(lj.trainable_mask(after, chosen))
    changed = [bool((np.asarray(a) != b).any()) for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    assert not any(moved for moved, trained in zip(changed, mask, strict=True) if not trained)
    moved = [moved for moved, trained in zip(changed, mask, strict=True) if trained]
    assert moved == jax.tree.leaves(had_gradient)
    assert sum(moved) >= len(moved) - 1  # a key bias may have no gradient at all, see law 8
    chex.assert_trees_all_equal(row.params, base)


@every_pair
def test_law_6_nothing_exists_for_a_frozen_leaf(name: str, method: str, tmp_path: Any) -> None:
    """Neither gradient nor optimizer state nor byte on disk: every count is that of the trainable numbers.

    A factor that is frozen at its start is no part of the base: it is on disk, and has neither of the others.
    """
    row = case(name)
    chosen = row.method(method)
    params = row.attach(chosen)
    labels = lj.label_params(params, chosen)
    trainable, frozen = split(params, chosen)
    count = lj.count_params(params, labels)

    gradients = jax.eval_shape(outcome_of(lj.adapt(row.apply)), trainable, frozen, row.x).gradients
    mask = lj.trainable_mask(params, chosen)
    assert [path for path, leaf in _named(gradients)] == [path for path, trained in _named(mask) if trained]
    assert _size(gradients) == count.trainable

    # Adam: two moments for each trained number, one count for each label; the frozen label has no state at all.
    tx = lj.make_optimizer(optax.adam(1e-3), labels)
    counts = len(set(jax.tree.leaves(labels)) - {FROZEN})
    for tree in (trainable, params):
        state = jax.eval_shape(tx.init, tree)
        assert _size(state) == 2 * count.trainable + counts
        updates, _ = jax.eval_shape(tx.update, tree, state, tree)
        chex.assert_trees_all_equal_shapes(updates, tree)

    folder = lj.save_adapter(tmp_path, params, chosen)
    starts = _frozen_factors(params, chosen)
    written = count.bytes + sum(array.nbytes for array in starts)
    header = 8 + 200 * (len(jax.tree.leaves(trainable)) + len(starts))
    assert written <= (folder / "adapter.safetensors").stat().st_size <= written + header
    assert bool(starts) == (method in ("pissa", "lora_fa"))


def _frozen_factors(params: Any, method: lj.Method) -> list[Any]:
    nodes = jax.tree.leaves(params, is_leaf=is_adapted)
    labels = jax.tree.leaves(lj.label_params(params, method), is_leaf=is_adapted)
    return [
        getattr(node, name)
        for node, label in zip(nodes, labels, strict=True)
        if is_adapted(node)
        for name in node.saved
        if getattr(label, name) == FROZEN
    ]


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Law 7.

TOKENS, RANK = 96, 4
SIZES = (160, 320, 288, 224)  # no two alike, none that a reshape of another would give


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for layer in params:
        x = jax.nn.relu(x @ layer["kernel"] + jnp.expand_dims(layer["bias"], range(x.ndim - 1)))
    return x


@functools.cache
def compiled_step(method: lj.Method) -> Any:
    """A training step over three linear layers, compiled and never run, so that sizes can be honest."""
    layers = itertools.pairwise(SIZES)
    base = [{"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)} for inputs, outputs in layers]
    params = lj.attach(base, method, key=jax.random.key(0))
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    apply = lj.adapt(mlp, on_materialize="error")

    def step(trainable: Any, frozen: Any, x: jax.Array) -> Any:
        grads = jax.grad(lambda trainable: jnp.sum(apply(lj.combine(trainable, frozen), x) ** 2))(trainable)
        return jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, trainable, grads)

    x = jax.ShapeDtypeStruct((8, TOKENS // 8, SIZES[0]), jnp.float32)
    return jax.jit(step).lower(trainable, frozen, x).compile()


def weight_gradients(program: str) -> set[Any]:
    """Shapes of the weights that some dot of a compiled program, or a library call in its place, has as its result."""
    shapes = [
        tuple(sorted(map(int, dims.split(","))))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call|fusion)\(", program)
    ]
    weights = {tuple(sorted(pair)) for pair in itertools.pairwise(SIZES)}
    return weights & set(shapes)


def test_law_7_the_step_has_no_dot_of_the_shape_of_a_weight() -> None:
    """No dot of the compiled LoRA step contracts tokens into an `in x out` result; in full fine-tuning each does."""
    lora = compiled_step(lj.LoRA(rank=RANK, alpha=RANK, targets=("kernel",))).as_text()
    assert "dot" in lora
    assert not weight_gradients(lora)
    assert not weight_gradients(compiled_step(lj.BitFit()).as_text())
    for method in relatives():
        assert not weight_gradients(compiled_step(method).as_text()), method
    assert len(weight_gradients(compiled_step(lj.FullFineTune()).as_text())) == 3


def relatives() -> tuple[lj.Method, ...]:
    """The other methods that change weights, each over all three layers."""
    common: Any = {"rank": RANK, "alpha": RANK, "targets": ("kernel",)}
    return (
        lj.LoRA(**common, init="pissa"),
        lj.LoRA(**common, freeze_a=True),
        lj.DoRA(**common),
        lj.IA3(targets=("kernel",), feedforward=("/1/kernel",)),
        lj.VeRA(rank=4 * RANK, targets=("kernel",)),
    )


def test_law_7_the_relatives_need_no_more_than_their_formulas() -> None:
    """As below. Factors of twice the rank cost twice as much; a frozen `a`, and VeRA's, has no gradient, which saves
    2·r·in. DoRA's norms take 2·r·in·out for `a W` and 2·in·out for `‖W‖²`, once, and its scale 3 operations an output
    and token, forward and backward; (IA)³'s as many, at the output or the input."""
    pairs = list(itertools.pairwise(SIZES))
    inputs, outputs, products = SIZES[:-1], SIZES[1:], sum(i * o for i, o in pairs)
    chain = 2 * TOKENS * (2 * products - SIZES[0] * SIZES[1])

    def path(rank: int, *, a_learns: bool = True) -> int:
        return 2 * TOKENS * rank * ((3 if a_learns else 2) * sum(inputs) + 3 * sum(outputs) - SIZES[0])

    formulas = (
        chain + path(2 * RANK),
        chain + path(RANK, a_learns=False),
        chain + path(RANK) + 2 * (RANK + 1) * products + 3 * TOKENS * sum(outputs),
        chain + 3 * TOKENS * (outputs[0] + inputs[1] + outputs[2]),
        chain + path(4 * RANK, a_learns=False),
    )
    for method, formula in zip(relatives(), formulas, strict=True):
        flops = compiled_step(method).cost_analysis()["flops"]
        assert 0.99 * formula <= flops <= 1.05 * formula, (method, flops / formula)


def test_law_7_the_step_needs_no_more_than_its_formula() -> None:
    """FLOPs by XLA's count. For each `in x out` weight and token, multiplications and additions:

    forward 2·in·out, gradient of the input 2·in·out but for the first layer; LoRA adds 6·r·(in + out): two products
    forward, four backward, of which the first layer needs no gradient of its input (-2·r·in). Full fine-tuning adds
    2·in·out. What is no matmul (biases, relu, the update, the loss) is linear in activations and parameters: 5 % here
    at most.
    """
    pairs = list(itertools.pairwise(SIZES))
    products = sum(inputs * outputs for inputs, outputs in pairs)
    chain = 2 * TOKENS * (2 * products - SIZES[0] * SIZES[1])
    lora = chain + 2 * TOKENS * RANK * (3 * sum(map(sum, pairs)) - SIZES[0])
    full = chain + 2 * TOKENS * products
    for method, formula in (
        (lj.LoRA(rank=RANK, alpha=RANK, targets=("kernel",)), lora),
        (lj.BitFit(), chain),
        (lj.FullFineTune(), full),
    ):
        flops = compiled_step(method).cost_analysis()["flops"]
        assert formula <= flops <= 1.05 * formula, (method, flops / formula)


# Law 8.


@every_model
def test_law_8_at_the_start_b_learns_and_a_does_not(name: str) -> None:
    """d/dA is 0 at the start and d/dB is not."""
    row = case(name)
    gradients = adapted(name)(*split(row.attach(row.lora()), row.lora()), row.x).gradients
    nodes = {path: leaf for path, leaf in leaves_by_path(gradients).items() if isinstance(leaf, lj.LoRAWeight)}
    assert nodes
    for path, node in nodes.items():
        assert not np.any(node.a), path
        assert np.abs(node.b).max() > 1e-6, path


@pytest.mark.parametrize(
    ("name", "key_bias", "query_bias"),
    [
        ("plain", "attention/key/bias", "attention/query/bias"),
        ("nnx_attention", "attention/key/bias", "attention/query/bias"),
        ("linen", "attention/key/bias", "attention/query/bias"),
        ("equinox", "attention/key_proj/bias", "attention/query_proj/bias"),
        ("bert", "encoder/layers/0/attention/key/bias", "encoder/layers/0/attention/query/bias"),
    ],
)
def test_law_8_the_key_bias_has_no_gradient(name: str, key_bias: str, query_bias: str) -> None:
    """In softmax attention the key bias adds the same to every score of a row: it has no gradient but rounding."""
    row = case(name)
    outcome = adapted(name, method="bitfit")(*split(row.params, row.bitfit()), row.x)
    gradients = leaves_by_path(outcome.gradients)
    assert np.abs(gradients[query_bias]).max() > 1e-4
    assert np.abs(gradients[key_bias]).max() <= 1e-5 * np.abs(gradients[query_bias]).max() + 1e-7


BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def bert_shapes(sizes: dict[str, int]) -> Any:
    """BERT's parameters with the pooler and two classes, without their memory."""
    from lora_jax.models.families.bert import BertConfig
    from lora_jax.models.model import skeleton

    settings: Any = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, **sizes}
    config = BertConfig(**settings)
    return skeleton(config, task="classification", num_labels=2).params


@pytest.mark.parametrize(
    ("sizes", "biases", "percent"), [(BERT_BASE, 102_912, 0.09), (BERT_LARGE, 272_384, 0.08)], ids=["base", "large"]
)
def test_law_8_counts_of_bitfit_are_those_of_the_paper(sizes: dict[str, int], biases: int, percent: float) -> None:
    """A layer has 7 biases of the hidden size (4 of attention, 2 norms, MLP-down) and MLP-up's; then two more."""
    params = bert_shapes(sizes)
    width, mlp_width, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    assert biases == layers * (7 * width + mlp_width) + 2 * width  # of the embeddings' norm and the pooler
    count = lj.count_params(params, lj.label_params(params, lj.BitFit(also_train=("classifier",))))
    assert count.per_label["bias"].params == biases
    assert round(100 * biases / count.total, 2) == percent
    assert count.trainable == biases + 2 * width + 2


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (lj.NormTuning(), 25 * 2 * 768),  # two norms a layer, one of the embeddings; scale and shift
        (lj.TopLayers(count=2), 2 * (4 * (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768 + 4 * 768)),
        (lj.FullFineTune(targets=("attention/query",)), 12 * 768 * 768 + 12 * 768),
    ],
)
def test_law_8_the_count_of_a_selection_is_its_formula(method: lj.Method, formula: int) -> None:
    params = bert_shapes(BERT_BASE)
    assert lj.count_params(params, lj.label_params(params, method)).trainable == formula


def test_law_8_the_count_of_lora_is_its_formula() -> None:
    """r·(in + out) for each matrix: 294,912 for r = 8 on query and value of a 12-layer, 768-wide encoder."""
    params = bert_shapes(BERT_BASE)
    method = lj.LoRA(rank=8, alpha=8, targets=("query", "value"))
    tree = jax.eval_shape(lambda: lj.attach(params, method, key=jax.random.key(0)))
    count = lj.count_params(tree, lj.label_params(tree, method))
    assert count.trainable == 294_912 == 12 * 2 * 8 * (768 + 768)
    assert count.per_label["lora_a"] == count.per_label["lora_b"] == (147_456, 4 * 147_456)
    assert count.total == 109_483_778 + 294_912


# Law 9.


@pytest.mark.parametrize("task", [None, "classification", "regression"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_law_9_nothing_is_merged_in_the_bundled_models(family: str, task: Any, tmp_path: Any) -> None:
    """`adapt(model.apply, on_materialize="error")` passes with factors at every weight, dropout and masks included."""
    outputs: Any = {"num_labels": 3} if task == "classification" else {}
    model = lj.models.load(write_tiny(tmp_path, family, hidden=8, heads=2), task=task, **outputs)
    weights = [path for path, leaf in leaves_by_path(model.params).items() if leaf.ndim >= 2]
    method = lj.LoRA(rank=1, alpha=1, targets=[f"/{path}" for path in weights], dropout=0.1)

    def keyed() -> Any:
        return lj.with_dropout(lj.attach(model.params, method, key=jax.random.key(0)), jax.random.key(1))

    params, ids = jax.eval_shape(keyed), jnp.ones((2, 6), jnp.int32)
    inputs, dropout_key = (ids, ids, 0 * ids), jax.random.key(2)
    apply = lj.adapt(functools.partial(model.apply, dropout_key=dropout_key), on_materialize="error")
    jax.eval_shape(apply, params, *inputs)
    rows = lj.explain(model.apply, params, *inputs, dropout_key=dropout_key)
    assert not rows.materialized
    assert {row.path for row in rows} == set(weights)


# Law 10.

FACTORS = "e2feab9f846e8f44"


def factors(params: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    node = leaves_by_path(params)[path]
    return np.asarray(node.a), np.asarray(node.b)


@every_model
def test_law_10_factors_depend_on_key_path_and_method_alone(name: str) -> None:
    """Attached twice, or with other targets beside, a leaf starts with the same factors; with another key, others."""
    row = case(name)
    first, again, other_key = row.attach(row.lora()), row.attach(row.lora()), row.attach(row.lora(), seed=1)
    chex.assert_trees_all_equal(first, again)
    adapted = [path for path, leaf in leaves_by_path(first).items() if is_adapted(leaf)]
    for path in adapted:
        alone = row.attach(row.lora(targets=(f"/{path}",)))
        for one, same in zip(factors(alone, path), factors(first, path), strict=True):
            np.testing.assert_array_equal(one, same)
        assert (factors(other_key, path)[0] != factors(first, path)[0]).any()
    starts = [factors(first, path)[0].ravel()[:4].tolist() for path in adapted]
    assert len({tuple(start) for start in starts}) == len(starts)  # no two leaves share a draw


def test_law_10_factors_are_the_same_on_every_run() -> None:
    """The digest below is that of another process, on another day."""
    params = {"dense": {"kernel": jnp.zeros((6, 4))}, "other": jnp.zeros((3, 3))}
    tree = lj.attach(params, lj.LoRA(rank=2, alpha=2, targets=("dense",)), key=jax.random.key(7))
    a, _ = factors(tree, "dense/kernel")
    digest = hashlib.sha256(np.round(a.astype(np.float64), 5).tobytes()).hexdigest()[:16]
    assert digest == FACTORS


def test_the_table_has_no_two_leaves_alike() -> None:
    """What the laws rest on: every model's leaves are distinct and far from zero, so that a swap or a loss shows."""
    for name in TABLE:
        paths, leaves, _ = flatten_with_paths(case(name).params)
        values = [float(np.abs(leaf).sum()) for leaf in leaves]
        assert min(values) > 0.05, paths[int(np.argmin(values))]
        assert len(set(values)) == len(values)
