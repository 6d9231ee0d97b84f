"""Every method beside a base of every dtype: it works, to the bound that the dtype allows, or `attach` refuses it.

The model casts its leaves to what it computes in, float32 or float64, so that what is compared is the rounding of the
merged weight alone: half a unit in the last place of each number, some `eps / 2` of the largest. What is merged wide
enough differs by float32's rounding, or float64's. Errors are relative to the largest value of what is compared.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.methods import Method
from lora_jax.methods.base import FROZEN
from lora_jax.paths import leaves_by_path
from lora_jax.weights import InsertedNode, MergedOnEntry, is_adapted

from .models_table import METHODS, Case, moved

# All weights are of one shape, so that each operation is compiled once a dtype; the laws have the others.
WIDTH = HIDDEN = CLASSES = 4
X = np.random.default_rng(3).normal(size=(2, 3, WIDTH))

# Between a weight merged into its own dtype and the factors beside it.
BOUNDS = {
    "float64": 1e-12,
    "float32": 1e-5,
    "bfloat16": 3e-2,
    "float16": 4e-3,
    "float8_e4m3fn": 0.2,
    "float8_e5m2": 0.4,
    "complex64": 1e-5,
    "int8": 1e-5,
}
EXACT = ("float64", "float32", "bfloat16", "float16")
# Which leaves have the dtype: all; the weights, with float32 for vectors and the head; or one that lies beside the
# model's own, which are float32.
COMBINATIONS = [("all", dtype) for dtype in BOUNDS]
COMBINATIONS += [(placement, dtype) for placement in ("weights", "beside") for dtype in BOUNDS if dtype not in EXACT]


def shapes() -> dict[str, tuple[int, ...]]:
    linear = {"attention/query": (WIDTH, WIDTH), "attention/key": (WIDTH, WIDTH), "attention/value": (WIDTH, WIDTH)}
    linear |= {"attention/output": (WIDTH, WIDTH), "mlp/up": (WIDTH, HIDDEN), "mlp/down": (HIDDEN, WIDTH)}
    found = {f"layers/0/{name}/kernel": shape for name, shape in linear.items()}
    found |= {f"layers/0/{name}/bias": shape[1:] for name, shape in linear.items()}
    found |= {"layers/0/norm/scale": (WIDTH,), "layers/0/norm/bias": (WIDTH,)}
    return found | {"head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,)}


def has_dtype(placement: str, path: str) -> bool:
    if placement == "weights":
        return path.endswith("kernel") and not path.startswith("head")
    return (path == "beside") == (placement == "beside")


def apply(params: Any, x: jax.Array) -> jax.Array:
    """A layer of attention and an MLP that reads what is inserted, in `x`'s dtype whatever the leaves'."""

    def usable(leaf: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(leaf):
            return (jnp.real(leaf) + jnp.imag(leaf)).astype(x.dtype)
        return leaf.astype(x.dtype) * (0.01 if jnp.issubdtype(leaf.dtype, jnp.integer) else 1.0)

    params = jax.tree.map(usable, {name: params[name] for name in ("layers", "head")})
    layer = params["layers"]["0"]

    def linear(part: Any, h: jax.Array) -> jax.Array:
        return h @ part["kernel"] + jnp.expand_dims(part["bias"], range(h.ndim - 1))

    def adapted(part: Any, h: jax.Array) -> jax.Array:
        if "adapter" not in part:
            return h
        return h + linear(part["adapter"]["up"], jax.nn.gelu(linear(part["adapter"]["down"], h)))

    attention = layer["attention"]
    query, key, value = (linear(attention[name], x) for name in ("query", "key", "value"))
    if "prefix" in attention:
        prefix = attention["prefix"]
        lead = x.shape[:1]
        key = jnp.concatenate([jnp.broadcast_to(prefix["key"], lead + prefix["key"].shape), key], 1)
        value = jnp.concatenate([jnp.broadcast_to(prefix["value"], lead + prefix["value"].shape), value], 1)
    mixed = jax.nn.softmax(query @ key.swapaxes(1, 2)) @ value
    x = x + adapted(attention, linear(attention["output"], mixed))
    x = x * layer["norm"]["scale"][None, None] + layer["norm"]["bias"][None, None]
    hidden = jnp.tanh(linear(layer["mlp"]["up"], x))
    x = x + adapted(layer["mlp"], linear(layer["mlp"]["down"], hidden))
    return linear(params["head"], x.mean(1))


@functools.cache
def row(placement: str, dtype: str) -> Case:
    rng = np.random.default_rng(1)
    rest = "float64" if dtype == "float64" else "float32"
    params: dict[str, Any] = {}
    for path, shape in {**shapes(), "beside": (3, 2)}.items():
        values = rng.normal(0, 0.6, shape)
        if path.endswith("scale"):
            values = 1 + values / 3
        if has_dtype(placement, path):
            if dtype == "complex64":
                values = values + 1j * rng.normal(0, 0.6, shape)
            leaf = jnp.asarray(np.round(60 * values) if dtype == "int8" else values).astype(dtype)
        else:
            leaf = jnp.asarray(values.astype(rest))
        at = params
        *modules, name = path.split("/")
        for module in modules:
            at = at.setdefault(module, {})
        at[name] = leaf
    return Case(
        name="dtypes",
        apply=apply,
        params=params,
        x=jnp.asarray(X.astype(rest)),
        targets=("query", "value", "up", "down"),
        head=("head",),
        dtype=jnp.dtype(dtype),
    )


def error(found: Any, wanted: Any) -> float:
    chex.assert_trees_all_equal_shapes(found, wanted)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    ]
    # NumPy's maximum, which NaN is, and not Python's, which passes over it.
    largest = np.max([np.abs(b).max() for _, b in pairs])
    return float(np.max([np.abs(a - b).max() for a, b in pairs]) / largest)


def refusal(placement: str, dtype: str, name: str) -> str | None:
    """The message that `attach` owes, by what the method does with the same tree in float32; `None` where it works."""
    if dtype in EXACT:
        return None
    twin = row(placement, "float32")
    method = twin.method(name)
    tree = lj.attach(twin.params, method, key=jax.random.key(0))
    leaves, labels = leaves_by_path(tree), leaves_by_path(lj.label_params(tree, method))
    bases = {path for path, leaf in leaves.items() if is_adapted(leaf) and not isinstance(leaf, InsertedNode)}
    factored = {path for path in bases if not isinstance(leaves[path], MergedOnEntry)}
    trained = bases - factored | {
        path for path, label in labels.items() if not is_adapted(leaves[path]) and label != FROZEN
    }
    concerned = {path for path in leaves if has_dtype(placement, path)}
    if dtype == "int8":  # no parameter: "all" passes it over where there are others; a name asks for it
        named_or_alone = placement == "all" or (bases and bases <= concerned)
        return r"int8|found no weight" if named_or_alone else None
    if name == "ia3":
        factored = set()
    refused = trained | factored if dtype == "complex64" else trained
    return rf"selects `[a-z0-9/]+` \([0-9, ]+\) {dtype}: " if refused & concerned else None


def test_the_table_has_every_method() -> None:
    ours = {cls for cls in Method.registry.values() if cls.__module__.startswith("lora_jax.")}
    assert ours == {type(row("all", "float32").method(name)) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("placement", "dtype"), COMBINATIONS)
def test_a_method_works_beside_a_dtype_or_attach_refuses(placement: str, dtype: str, name: str, tmp_path: Path) -> None:
    with jax.enable_x64(dtype == "float64"):
        message = refusal(placement, dtype, name)
        case = row(placement, dtype)
        if message is not None:
            with pytest.raises(lj.SelectionError, match=message):
                lj.attach(case.params, case.method(name), key=jax.random.key(0))
        else:
            (check_beside if placement == "beside" else check)(case, case.method(name), BOUNDS[dtype], tmp_path)


def check_beside(case: Case, method: lj.Method, bound: float, folder: Path) -> None:
    """A leaf that the method has nothing to do with: the same object throughout, and the base is known by it."""
    del bound
    params = lj.attach(case.params, method, key=jax.random.key(0))
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    f = lj.adapt(apply, on_materialize="silent")
    gradients = jax.grad(lambda trainable: f(lj.combine(trainable, frozen), case.x).sum())(trainable)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, trainable)
    tx = lj.make_optimizer(optax.adam(1e-2), lj.label_params(params, method))
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(tx.update, params, tx.init(params), params)[0], params)
    assert lj.merge_params(params)["beside"] is case.params["beside"]
    loaded = lj.load_adapter(lj.save_adapter(folder, params, method), case.params)
    chex.assert_trees_all_equal(loaded.params, params)


def check(case: Case, method: lj.Method, bound: float, folder: Path) -> None:
    """Attach, adapt, gradient, a step, merge, save, load and PEFT's format."""
    base, x = case.params, case.x
    exact = 1e-12 if x.dtype == jnp.float64 else 1e-5
    params = lj.attach(base, method, key=jax.random.key(0))
    f = lj.adapt(apply, on_materialize="silent")
    if not isinstance(method, lj.PrefixTuning):  # DoRA's magnitude is float32, whatever the base
        assert error(f(params, x), apply(base, x)) <= (1e-6 if isinstance(method, lj.DoRA) else exact)

    mask = lj.trainable_mask(params, method)
    params = moved(params, mask, seed=2)
    trainable, frozen = lj.partition(params, mask)

    def loss(trainable: Any, merge: bool) -> tuple[jax.Array, jax.Array]:
        tree = lj.combine(trainable, frozen)
        y = apply(lj.merge_params(tree, dtype=wide), x) if merge else f(tree, x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    # What is merged on entry has its base's dtype, and so its gradient; complex numbers stay complex.
    nodes = [leaf for leaf in leaves_by_path(params).values() if is_adapted(leaf)]
    wide = None if any(isinstance(leaf, MergedOnEntry) or jnp.iscomplexobj(leaf.base) for leaf in nodes) else x.dtype
    found, output = jax.grad(loss, has_aux=True)(trainable, False)
    wanted, merged_output = jax.grad(loss, has_aux=True)(trainable, True)
    chex.assert_trees_all_equal_dtypes(found, trainable)
    assert error(output, merged_output) <= exact
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trainable))  # of the gradient itself
    assert error(found, wanted) <= max(exact, 2 * rounding)
    assert error(output, apply(lj.merge_params(params), x)) <= bound
    assert error(output, apply(base, x)) > 1e-2  # what was trained matters

    whole = leaves_by_path(lj.merge_params(params))
    assert {path: (whole[path].shape, whole[path].dtype) for path in leaves_by_path(base)} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in leaves_by_path(base).items()
    }

    tx = lj.make_optimizer(optax.adam(1e-2), lj.label_params(params, method))
    updates, _ = tx.update(found, tx.init(trainable), trainable)
    after = optax.apply_updates(trainable, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, trainable)

    loaded = lj.load_adapter(lj.save_adapter(folder / "ours", params, method), base)
    chex.assert_trees_all_equal(loaded.params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, params)
    np.testing.assert_array_equal(f(loaded.params, x), output)

    names = {path: path.rpartition("/")[0].replace("/", ".") for path in shapes()}
    if not isinstance(method, lj.LoRA):
        with pytest.raises(lj.AdapterError, match="PEFT"):
            lj.interop.export_peft(folder / "peft", params, method, names=names)
        return
    lj.interop.export_peft(folder / "peft", params, method, names=names, fan_in_fan_out=())
    if x.dtype != jnp.float64:  # PEFT's own files have no float64
        theirs = lj.interop.import_peft(folder / "peft", base, names=names, fan_in_fan_out=())
        assert error(f(theirs.params, x), output) <= 1e-5


# Beside the table: every use of a weight in float64, and what floats of 8 bits and 16 can't hold.

USES = {
    "matmul": (lambda w, x: x @ w, (4, 3), "io", (5, 4)),
    "scaled": (lambda w, x: x @ (w * 0.7 / 3), (4, 3), "io", (5, 4)),
    "lookup": (lambda w, x: jnp.take(w, jnp.array([0, 2, 2]), axis=0) * x[0, 0], (4, 3), "io", (5, 4)),
    "convolution": (
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (3, 4, 2),
        "iio",
        (2, 5, 4),
    ),
    "ragged": (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (2, 4, 3), "sio", (5, 4)),
    "materialized": (lambda w, x: x @ jnp.sin(w), (4, 3), "io", (5, 4)),
}


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "vera", "ia3"])
@pytest.mark.parametrize("use", USES)
def test_beside_float64_nothing_is_computed_in_float32(use: str, name: str) -> None:
    """Adapted equals merged to float64's rounding, in values and in the gradient of the activations."""
    fn, shape, axes, x_shape = USES[use]
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        base = {"w": jnp.asarray(rng.normal(size=shape))}
        case = dataclasses.replace(row("all", "float64"), targets=("w",), head=())
        method = case.method(name)
        tree = lj.attach(base, method, key=jax.random.key(0), uses={"w": lj.Use(use, axes)})
        params = moved(tree, lj.trainable_mask(tree, method), seed=6)
        x = jnp.asarray(rng.normal(size=x_shape))

        def output(params: Any, x: jax.Array) -> jax.Array:
            return fn(params["w"], x)

        adapted = lj.adapt(output, on_materialize="silent")
        merged = lj.merge_params(params)
        assert error(adapted(params, x), output(merged, x)) <= 1e-12
        found, wanted = (
            jax.grad(lambda x, f=f, p=p: jnp.sin(f(p, x)).sum())(x) for f, p in ((adapted, params), (output, merged))
        )
        assert error(found, wanted) <= 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_under_strict_promotion(dtype: str, name: str) -> None:
    """Nothing promotes by accident, also with 64-bit numbers."""
    with jax.enable_x64(dtype == "float64"):
        case = row("all", dtype)
        method = case.method(name)
        with jax.numpy_dtype_promotion("strict"):
            params = lj.attach(case.params, method, key=jax.random.key(0))
            jax.eval_shape(lj.adapt(apply, on_materialize="silent"), params, case.x)
            jax.eval_shape(lj.merge_params, params)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3"])
def test_a_lookup_in_floats_of_8_bits_is_rounded_once(dtype: str, name: str) -> None:
    """The table's rows come in its own dtype, so the sum is rounded to it; not each of its terms."""
    base = {"w": jnp.asarray(np.random.default_rng(7).normal(size=(6, 4)), dtype)}
    case = dataclasses.replace(row("all", "float32"), targets=("w",), head=())
    method = lj.IA3(targets=("w",), feedforward=()) if name == "ia3" else case.method(name)
    tree = lj.attach(base, method, key=jax.random.key(0))
    params = moved(tree, lj.trainable_mask(tree, method), seed=8)
    found = lj.adapt(lambda p: jnp.take(p["w"], jnp.arange(6), axis=0), on_materialize="error")(params)
    wanted = lj.merge_params(params, dtype=jnp.float32)["w"]
    assert found.dtype == dtype
    assert (np.abs(np.asarray(found, np.float32) - wanted) <= float(jnp.finfo(dtype).eps) * np.abs(wanted) + 0.02).all()


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", "65504"), ("float8_e4m3fn", "448"), ("float8_e5m2", "57344")]
)
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_merged_number_beyond_the_dtype_is_refused(dtype: str, largest: str, name: str) -> None:
    """It would be infinity, or NaN; wider it is right, and under `jit` nobody can look."""
    base = {"w": jnp.full((4, 3), 0.9 * float(jnp.finfo(dtype).max)).astype(dtype)}
    case = dataclasses.replace(row("all", "float32"), targets=("w",), head=())
    tree = lj.attach(base, case.method(name), key=jax.random.key(0))
    mask = lj.trainable_mask(tree, case.method(name))
    params = jax.tree.map(lambda leaf, trained: leaf + 200.0 if trained else leaf, tree, mask)
    with pytest.raises(
        ValueError, match=rf"cannot merge `w` into {dtype}: a merged number is larger than its largest, {largest}"
    ):
        lj.merge_params(params)
    with pytest.raises(ValueError, match=f"into {dtype}"):
        lj.merge_params({"w": params["w"].with_base(base["w"].astype(jnp.float32))}, dtype=dtype)
    assert np.isfinite(np.asarray(lj.merge_params(params, dtype=jnp.float32)["w"])).all()
    lj.merge_params(tree)
    jax.jit(lj.merge_params)(params)


def test_complex_numbers_stay_complex() -> None:
    params = lj.attach(
        {"w": jnp.ones((3, 2), jnp.complex64)}, lj.IA3(targets=("w",), feedforward=()), key=jax.random.key(0)
    )
    assert lj.merge_params(params)["w"].dtype == jnp.complex64
    with pytest.raises(ValueError, match="cannot merge `w` into float32, for it is complex: leave `dtype` out"):
        lj.merge_params(params, dtype=jnp.float32)


START = r"the start of `w`'s `{}` isn't finite, since the weight holds NaN, infinity, or numbers whose squares exceed"


PISSA = lj.LoRA(rank=1, alpha=1, targets=("w",), init="pissa")
OTHERS = (
    (dataclasses.replace(PISSA, init="orthogonal"), "[ab]"),
    (lj.DoRA(rank=1, alpha=1, targets=("w",)), "magnitude"),
    (lj.DoRA(rank=1, alpha=1, targets=("w",), init="pissa"), "[ab]"),
)


@pytest.mark.parametrize(
    ("method", "array", "value"),
    [(method, array, value) for method, array in ((PISSA, "[ab]"), *OTHERS) for value in (np.nan, np.inf)]
    + [(PISSA, "[ab]", 3e38), (OTHERS[1][0], "magnitude", 3e38)],
)
def test_a_start_from_a_weight_that_is_not_finite_is_refused(method: lj.Method, array: str, value: float) -> None:
    """One such number would be in every factor; the base's function would be lost, and nothing would say so."""
    params = {"w": jnp.ones((4, 3)).at[1, 2].set(value), "other": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=START.format(array)):
        lj.attach(params, method, key=jax.random.key(0))
    lj.attach(params, dataclasses.replace(method, targets=("other",)), key=jax.random.key(0))
    jax.eval_shape(lambda p: lj.attach(p, method, key=jax.random.key(0)), params)  # abstract: nobody can look


# Files.


def test_a_finite_float64_is_finite(tmp_path: Path) -> None:
    """Beyond float32's range, too: in our files, PEFT's and a delta's."""
    with jax.enable_x64(True):
        base = {"w": jnp.ones((3, 2)), "bias": jnp.full(2, 1e300)}
        lora = lj.LoRA(rank=1, alpha=1, targets=("w",), also_train=("bias",))
        params = lj.attach(base, lora, key=jax.random.key(0))
        names = {"w": "m", "bias": "m"}
        loaded = lj.load_adapter(lj.save_adapter(tmp_path / "ours", params, lora), base)
        assert loaded.params["bias"].tolist() == [1e300, 1e300]
        lj.interop.export_peft(tmp_path / "peft", params, lora, names=names)
        whole = {**base, "bias": base["bias"] * 2}
        lj.interop.export_delta(tmp_path / "delta", whole, base, names=names)
        assert lj.interop.apply_delta(tmp_path / "delta", base, names=names)["bias"].tolist() == [2e300, 2e300]


def test_float64_is_not_loaded_as_float32(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        base = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        lj.save_adapter(tmp_path / "ours", base, lj.BitFit())
        whole = {**base, "bias": base["bias"] * 2}
        lj.interop.export_delta(tmp_path / "delta", whole, base, names={"w": "m", "bias": "m"})
    narrow = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    message = (
        r"`(m\.)?bias` is float64, and JAX's 64-bit numbers are switched off: call `jax.config.update\(\"jax_enable"
    )
    with pytest.raises(lj.AdapterError, match=message):
        lj.load_adapter(tmp_path / "ours", narrow)
    with pytest.raises(lj.AdapterError, match=message):
        lj.interop.apply_delta(tmp_path / "delta", narrow, names={"w": "m", "bias": "m"}, check_base="ignore")


# Low rank out of full models.


def test_a_complex_change_has_no_low_rank() -> None:
    """Half of it would be lost, and the reported error would be that of the other half."""
    rng = np.random.default_rng(9)
    real = {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "other": jnp.ones(3)}
    turned = real["w"].astype(jnp.complex64) + jnp.complex64(1j) * jnp.outer(jnp.arange(5.0), jnp.arange(4.0)).astype(
        jnp.complex64
    )
    base = {**real, "w": real["w"].astype(jnp.complex64)}
    for before in (base, real):
        with pytest.raises(lj.SelectionError, match=r"selects `w` \(5, 4\) complex64: .*factors are real"):
            lj.extract_lora(before, {**before, "w": turned}, targets=("w",), rank=1)
    changed = {**real, "w": real["w"] + 1, "other": real["other"].astype(jnp.complex64) + 1j}
    with pytest.raises(
        ValueError, match=r"""`other` changed, and can't be trained, since it is complex64.*`rest="drop"`"""
    ):
        lj.extract_lora(real, changed, targets=("w",), rank=1)
    with pytest.raises(lj.SelectionError, match=r"`tuned_params` selects `other` \(3,\) complex64"):
        lj.extract_lora(real, changed, targets=("w",), also_train=("other",), rank=1)
    assert lj.extract_lora(real, changed, targets=("w",), rank=1, rest="drop").dropped == ["other"]
    node = lj.LoRAWeight(turned, jnp.ones((2, 5)), jnp.full((2, 4), 1j, jnp.complex64), scale=1.0, axes="io")
    with pytest.raises(ValueError, match="`w` is complex64, and only real factors can be given another rank"):
        lj.truncate_lora({"w": node}, lj.LoRA(rank=2, alpha=2, targets=("w",)), rank=1)


def test_a_difference_of_float64_models_is_float64() -> None:
    """A change that float32 would round away from the weights is found, and large numbers stay finite."""
    rng = np.random.default_rng(10)
    with jax.enable_x64(True):
        base = {"w": jnp.asarray(1 + rng.normal(size=(6, 5)) / 9), "big": jnp.full((6, 5), 1e200)}
        delta = 1e-9 * np.outer(rng.normal(size=6), rng.normal(size=5))
        found = lj.extract_lora(base, {**base, "w": base["w"] + delta}, targets=("w",), rank=1)
        assert error(found.params["w"].delta(), delta) <= 1e-5  # the rounding of the sum, 2e-16 of 1
        assert found.fits["w"].error <= 1e-5
