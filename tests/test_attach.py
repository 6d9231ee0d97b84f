from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

KEY = jax.random.key(0)


def base() -> Any:
    return {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.ones((4, 2))}}


def lora(**settings: Any) -> lj.LoRA:
    return lj.LoRA(**{"rank": 2, "alpha": 2, "targets": ("dense",), **settings})


def test_only_targets_and_heads_change() -> None:
    tree = base()
    params = lj.attach(tree, lora(also_train=("head",)), key=KEY)
    assert params["dense"]["kernel"].base is tree["dense"]["kernel"]
    assert params["dense"]["bias"] is tree["dense"]["bias"]
    assert params["head"]["kernel"] is not tree["head"]["kernel"]
    assert lj.detach(params)["dense"]["kernel"] is tree["dense"]["kernel"]
    assert lj.leaf_paths(tree) == lj.leaf_paths(params)


def test_methods_that_change_no_weight_copy_the_head_only() -> None:
    tree = base()
    for method in (lj.BitFit(also_train=("head",)), lj.Frozen(also_train=("head",))):
        params = lj.attach(tree, method, key=KEY)
        assert params["dense"]["kernel"] is tree["dense"]["kernel"]
        assert params["head"]["kernel"] is not tree["head"]["kernel"]


def test_detach_keeps_what_else_was_trained() -> None:
    params = lj.attach(base(), lora(), key=KEY)
    params["dense"]["bias"] = jnp.ones(4)
    assert lj.detach(params)["dense"]["bias"] is params["dense"]["bias"]


def test_a_target_that_matches_nothing() -> None:
    with pytest.raises(
        lj.SelectionError, match=r"`targets` entry 'dnese' matches no leaf. Nearest paths: dense/kernel"
    ):
        lj.attach(base(), lora(targets=("dnese",)), key=KEY)
    with pytest.raises(
        lj.SelectionError, match=r"`also_train` entry 'haed' matches no leaf. Nearest paths: head/kernel"
    ):
        lj.attach(base(), lora(also_train=("haed",)), key=KEY)


@pytest.mark.parametrize(
    ("tree", "target", "message"),
    [
        (base(), "dense/bias", r"'dense/bias' matches no weight, only dense/bias \(4,\)"),
        ({"table": jnp.ones((4, 4), jnp.int32)}, "table", r"matches no weight, only table \(4, 4\)"),
        ({"rate": 0.5}, "rate", "matches no weight, only rate float"),
        ({"heads": {"bias": jnp.ones((4, 4))}}, "heads", r"matches no weight, only heads/bias \(4, 4\)"),
    ],
)
def test_a_target_that_is_no_weight(tree: Any, target: str, message: str) -> None:
    with pytest.raises(lj.SelectionError, match=message):
        lj.attach(tree, lora(targets=(target,)), key=KEY)


def test_a_leaf_both_target_and_head() -> None:
    with pytest.raises(
        lj.SelectionError, match="`targets` and `also_train` both select dense/kernel: train it in full"
    ):
        lj.attach(base(), lora(also_train=("dense",)), key=KEY)


def test_a_rank_larger_than_the_weight_allows() -> None:
    with pytest.raises(
        ValueError, match=r"`rank` 5 is larger than `dense/kernel` allows: \(8, 4\) labelled 'io' is 8 in"
    ):
        lj.attach(base(), lora(rank=5), key=KEY)
    assert lj.attach(base(), lora(rank=4), key=KEY)["dense"]["kernel"].rank == 4
    with pytest.raises(ValueError, match="`rank` 5 is larger than `dense/kernel` allows"):
        lj.attach(base(), lora(rank_overrides={"dense": 5}), key=KEY)


def test_axes_whose_roles_are_unknown() -> None:
    tree = {"heads": jnp.ones((6, 2, 3))}
    with pytest.raises(ValueError, match=r"the roles of the axes of `heads` \(6, 2, 3\) are unknown.*: pass `uses="):
        lj.attach(tree, lora(targets=("heads",)), key=KEY)
    uses = lj.trace_weights(lambda params, x: jnp.einsum("td,dnh->tnh", x, params["heads"]), tree, jnp.ones((5, 6)))
    node = lj.attach(tree, lora(targets=("heads",)), key=KEY, uses=uses)["heads"]
    assert (node.axes, node.a.shape, node.b.shape) == ("ioo", (2, 6), (2, 2, 3))


@pytest.mark.parametrize("labels", ["io", "iox", "iooo"])
def test_labels_that_do_not_fit(labels: str) -> None:
    uses = {"heads": lj.Use("dot_general", labels)}
    with pytest.raises(
        ValueError, match=rf"`uses` labels `heads` \(6, 2, 3\) with '{labels}': one of i, o, s for each"
    ):
        lj.attach({"heads": jnp.ones((6, 2, 3))}, lora(targets=("heads",)), key=KEY, uses=uses)


def test_uses_of_another_tree() -> None:
    with pytest.raises(
        ValueError, match=r"`uses` has `dence/kernel`, and `params` does not. Nearest paths: dense/kernel"
    ):
        lj.attach(base(), lora(), key=KEY, uses={"dence/kernel": lj.Use("dot_general", "io")})


def test_a_tree_that_has_factors_already() -> None:
    params = lj.attach(base(), lora(), key=KEY)
    with pytest.raises(
        ValueError, match=r"`params` has factors already, at dense/kernel: take them off with `lj.detach`"
    ):
        lj.attach(params, lora(), key=KEY)


def test_older_random_keys_do_as_well() -> None:
    new, old = (lj.attach(base(), lora(), key=key) for key in (jax.random.key(3), jax.random.PRNGKey(3)))
    np.testing.assert_array_equal(new["dense"]["kernel"].a, old["dense"]["kernel"].a)


NO_KEYS = [0, 1.5, np.int64(3), "seed", jnp.ones(2), jax.random.split(KEY), jnp.zeros((2, 2), jnp.uint32)]


@pytest.mark.wrong_types
@pytest.mark.parametrize("key", NO_KEYS, ids=lambda key: type(key).__name__)
def test_what_is_no_random_key_is_refused(key: Any) -> None:
    message = r"`key` must be one random key, such as `jax.random.key\(0\)`, got"
    with pytest.raises(TypeError, match=message):
        lj.attach(base(), lora(), key=key)
    params = lj.attach(base(), lora(dropout=0.5), key=KEY)
    with pytest.raises(TypeError, match=message):
        lj.with_dropout(params, key)


@pytest.mark.wrong_types
def test_a_method_that_draws_nothing_asks_for_no_key() -> None:
    for method in (lj.BitFit(), lj.FullFineTune(), lj.RandomMask(size=2)):
        lj.attach(base(), method, key=None)  # type: ignore[arg-type]


class KerasLike:
    """A variable of Keras 3, as JAX sees it: it is converted where it is used as an array, and nowhere else."""

    def __init__(self, value: jax.Array):
        self._value = value

    value = property(lambda self: self._value)
    shape = property(lambda self: self._value.shape)
    dtype = property(lambda self: str(self._value.dtype))

    def __jax_array__(self) -> jax.Array:
        return self._value


class TensorLike:
    """A tensor of PyTorch, whose dtype is none of NumPy's."""

    shape, dtype = (8, 4), object()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.ones((8, 4), np.float32)


PUBLIC_FUNCTIONS = {
    "attach": lambda tree: lj.attach(tree, lora(), key=KEY),
    "label_params": lambda tree: lj.label_params(tree, lj.FullFineTune()),
    "trainable_mask": lambda tree: lj.trainable_mask(tree, lj.FullFineTune()),
    "partition": lambda tree: lj.partition(tree, jax.tree.map(lambda leaf: True, tree)),
    "merge_params": lj.merge_params,
    "detach": lj.detach,
    "trace_weights": lambda tree: lj.trace_weights(lambda tree, x: x @ tree["dense"]["kernel"], tree, jnp.ones((1, 8))),
    "save_adapter": lambda tree: lj.save_adapter("unused", tree, lj.BitFit()),
    "extract_lora": lambda tree: lj.extract_lora(tree, base(), targets=("dense",), rank=1),
    "extract_lora, tuned": lambda tree: lj.extract_lora(base(), tree, targets=("dense",), rank=1),
    "export_delta": lambda tree: lj.interop.export_delta("unused", tree, base(), names={}),
}


@pytest.mark.parametrize("make", [KerasLike, lambda value: TensorLike()], ids=["keras", "torch"])
@pytest.mark.parametrize("function", PUBLIC_FUNCTIONS)
def test_arrays_of_other_libraries_are_refused_by_path_and_type(
    function: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = base()
    tree["dense"]["kernel"] = make(tree["dense"]["kernel"])
    message = r"`dense/kernel` must be a JAX or NumPy array, got a tests (Keras|Tensor)Like: convert such leaves first"
    with pytest.raises(TypeError, match=message):
        PUBLIC_FUNCTIONS[function](tree)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_put_on_no_foreign_base(tmp_path: Path) -> None:
    lj.save_adapter(tmp_path, lj.attach(base(), lora(), key=KEY), lora())
    foreign = jax.tree.map(KerasLike, base())
    with pytest.raises(TypeError, match=r"`dense/bias` must be a JAX .*\(for a Keras variable, `leaf.value`\)"):
        lj.load_adapter(tmp_path, foreign)
    plain = jax.tree.map(lambda leaf: leaf.value, foreign)
    assert lj.load_adapter(tmp_path, plain).params["dense"]["kernel"].rank == 2


def test_attach_to_shapes_alone() -> None:
    shapes = jax.eval_shape(base)
    tree = jax.eval_shape(lambda: lj.attach(shapes, lora(), key=KEY))
    assert tree["dense"]["kernel"].a.shape == (2, 8)


def test_factors_lie_where_the_axes_of_the_base_lie() -> None:
    """Each factor is split along the axes that it shares with a sharded base; values do not depend on it."""
    mesh = jax.make_mesh((2,), ("x",))
    for spec, a_spec, b_spec in (
        (jax.P("x", None), jax.P(None, "x"), jax.P(None, None)),
        (jax.P(None, "x"), jax.P(None, None), jax.P(None, "x")),
    ):
        sharding = jax.NamedSharding(mesh, spec)
        node = lj.attach({"w": jax.device_put(jnp.ones((8, 4)), sharding)}, lora(targets=("w",)), key=KEY)["w"]
        assert node.a.sharding.is_equivalent_to(jax.NamedSharding(mesh, a_spec), 2)
        assert node.b.sharding.is_equivalent_to(jax.NamedSharding(mesh, b_spec), 2)
        plain = lj.attach({"w": jnp.ones((8, 4))}, lora(targets=("w",)), key=KEY)["w"]
        np.testing.assert_allclose(node.a, plain.a, rtol=1e-6)
    stacked = jax.device_put(jnp.ones((2, 8, 4)), jax.NamedSharding(mesh, jax.P("x")))
    uses = {"w": lj.Use("dot_general", "sio")}
    node = lj.attach({"w": stacked}, lora(targets=("w",)), key=KEY, uses=uses)["w"]
    assert node.a.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("x")), 3)


def test_a_base_on_another_device_keeps_its_factors_there() -> None:
    second = jax.devices()[1]
    node = lj.attach({"w": jax.device_put(jnp.ones((8, 4)), second)}, lora(targets=("w",)), key=KEY)["w"]
    assert node.a.devices() == node.b.devices() == {second}


# What is compiled.

PLACES: dict[str, Any] = {
    "where JAX likes": lambda: None,
    "on a device": lambda: jax.devices()[1],
    "split": lambda: jax.NamedSharding(
        jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("x", None)
    ),
}
METHODS: dict[str, Any] = {
    **{init: lora(targets=r".*kernel", init=init) for init in ("gaussian", "kaiming", "pissa", "orthogonal")},
    "DoRA": lj.DoRA(rank=2, alpha=2, targets=r".*kernel"),
    "VeRA": lj.VeRA(rank=2, targets=r".*kernel"),
    "IA3": lj.IA3(targets=r".*kernel", feedforward=()),
    "BitFit": lj.BitFit(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_compiled_is_shared_by_targets_of_equal_shapes(method: str, place: str, tmp_path: Any) -> None:
    """All that a tree of one layer needs is compiled then; a tree of five of the same shapes compiles nothing more."""
    chosen, where = METHODS[method], PLACES[place]()

    def layers(count: int) -> Any:
        arrays = {"kernel": np.full((6, 4), 0.5, np.float32), "bias": np.ones(4, np.float32)}
        specs = {"kernel": where, "bias": jax.devices()[1] if place == "on a device" else None}
        one = {name: jnp.asarray(array) for name, array in arrays.items()}
        one = {name: one[name] if specs[name] is None else jax.device_put(one[name], specs[name]) for name in one}
        return {f"layer{index}": one for index in range(count)}

    def life(base: Any) -> None:
        tree = lj.attach(base, chosen, key=KEY)
        lj.merge_params(tree)
        lj.detach(tree)
        lj.partition(tree, lj.trainable_mask(tree, chosen))
        names = {path: path.rpartition("/")[0] for path in lj.leaf_paths(base)}
        count = len(base)
        lj.load_adapter(lj.save_adapter(tmp_path / f"{count}", tree, chosen), base)
        if isinstance(chosen, lj.LoRA):
            folder = lj.interop.export_peft(tmp_path / f"peft{count}", tree, chosen, names=names)
            lj.interop.import_peft(folder, base, names=names)

    life(layers(1))
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        life(layers(5))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_factors_of_a_committed_base_start_as_others_do() -> None:
    for init in ("gaussian", "kaiming", "pissa", "orthogonal"):
        weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        free = lj.attach({"w": jnp.asarray(weight)}, lora(targets=("w",), init=init), key=KEY)["w"]
        held = lj.attach({"w": jax.device_put(weight, jax.devices()[1])}, lora(targets=("w",), init=init), key=KEY)["w"]
        np.testing.assert_allclose(np.asarray(held.a), np.asarray(free.a), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(held.b), np.asarray(free.b), rtol=1e-5, atol=1e-6)


# The forgotten `adapt`.


def used_as_array(node: Any) -> dict[str, Any]:
    x = jnp.ones((3, 8))
    return {
        "x @ w": lambda: x @ node,
        "w @ x": lambda: node @ x.T,
        "w + 1": lambda: node + 1,
        "1 - w": lambda: 1 - node,
        "w // 2": lambda: node // 2,
        "-w": lambda: -node,
        "w > 0": lambda: node > 0,
        "w[0]": lambda: node[0],
        "w.T": lambda: node.T,
        "w.astype": lambda: node.astype(jnp.bfloat16),
        "bool(w)": lambda: bool(node),
        "iter(w)": lambda: list(node),
        "jnp.dot": lambda: jnp.dot(x, node),
        "jnp.einsum": lambda: jnp.einsum("td,do->to", x, node),
        "jnp.asarray": lambda: jnp.asarray(node),
        "np.asarray": lambda: np.asarray(node),
        "jit": lambda: jax.jit(lambda node: x @ node)(node),
    }


@pytest.mark.parametrize("use", used_as_array(None))
def test_a_forgotten_adapt_is_explained(use: str) -> None:
    node = lj.attach(base(), lora(), key=KEY)["dense"]["kernel"]
    with pytest.raises(
        TypeError, match=r"a LoRAWeight of shape \(8, 4\) was used as an array: wrap the function .*`lj.ada"
    ):
        used_as_array(node)[use]()


def test_a_node_answers_what_a_shape_is_asked_for() -> None:
    node = lj.attach(base(), lora(), key=KEY)["dense"]["kernel"]
    assert (node.shape, node.ndim, node.size, node.dtype) == ((8, 4), 2, 32, jnp.float32)


def test_a_node_may_hold_anything() -> None:
    """Pytree functions put labels, booleans, `None` and shapes where arrays stood."""
    node = lj.attach(base(), lora(), key=KEY)["dense"]["kernel"]
    for value in ("label", True, None, object(), jax.ShapeDtypeStruct((), jnp.float32)):
        assert jax.tree.map(lambda leaf, value=value: value, node).a is value
    assert dataclasses.replace(node, a="x").a == "x"
