"""State is told from parameters, in every library's way of keeping it: never trained, and not lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lora_jax as lj
from lora_jax import state as state_module
from lora_jax.files import read_safetensors
from lora_jax.paths import flatten_with_paths, is_random_key, leaves_by_path
from lora_jax.state import marked_leaves, state_paths
from lora_jax.weights import is_adapted

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4)) + 2


# Models, each with a weight `dense`, a batch norm `bn`, and state.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="bn")(x)
        calls = self.variable("cache", "calls", lambda: jnp.zeros(()))
        if train:
            calls.value += 1.0
        return x


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros(()))
        self.seen = nnx.Intermediate(jnp.zeros(()))
        self.codes = nnx.Variable(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1.0
        return self.dropout(self.bn(self.dense(x)))


class Equinox(eqx.Module):
    dense: eqx.nn.Linear
    bn: eqx.nn.BatchNorm

    def __init__(self) -> None:
        self.dense = eqx.nn.Linear(4, 4, key=KEY)
        self.bn = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch", momentum=0.5)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        return self.bn(self.dense(x), state)


def linen() -> Any:
    return Linen().init(KEY, X)


def linen_apply(variables: Any) -> jax.Array:
    return Linen().apply(variables, X)  # type: ignore[return-value]


def nnx_apply(state: Any) -> jax.Array:
    return nnx.merge(nnx.split(Net())[0], state)(X)


def nnx_pure() -> Any:
    return nnx.to_pure_dict(nnx.split(Net())[1])


def nnx_pure_apply(pure: Any) -> jax.Array:
    graph, state = nnx.split(Net())
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)(X)


def nnx_params() -> Any:
    return nnx.split(Net(), nnx.Param, ...)[1]


def nnx_params_apply(params: Any) -> jax.Array:
    graph, _, rest = nnx.split(Net(), nnx.Param, ...)
    return nnx.merge(graph, params, rest)(X)


def haiku() -> Any:
    """What `hk.transform_with_state` gives; Haiku itself is no dependency."""
    params = {"mlp/~/dense": {"w": jnp.eye(4), "b": jnp.zeros(4)}, "bn": {"scale": jnp.ones(4), "offset": jnp.zeros(4)}}
    mean = {"average": jnp.zeros(4), "hidden": jnp.zeros(4), "counter": jnp.zeros((), jnp.int32)}
    return {"params": params, "state": {"bn/~/mean_ema": mean, "bn/~/var_ema": {"average": jnp.ones(4)}}}


def haiku_merged() -> Any:
    return haiku()["params"] | haiku()["state"]


def haiku_apply(params: Any) -> jax.Array:
    params = params["params"] | params["state"] if "params" in params else params
    dense, bn = params["mlp/~/dense"], params["bn"]
    spread = params["bn/~/var_ema"]["average"][None] if "bn/~/var_ema" in params else 1.0
    return (X @ dense["w"] + dense["b"][None]) / jnp.sqrt(spread) * bn["scale"][None] + bn["offset"][None]


def equinox_with_state() -> Any:
    return dict(zip(("model", "carried"), eqx.nn.make_with_state(Equinox)(), strict=True))


def equinox_apply(tree: Any) -> jax.Array:
    model = tree["model"] if isinstance(tree, dict) else tree
    state = tree["carried"] if isinstance(tree, dict) else eqx.nn.State(Equinox())
    return jax.vmap(eqx.nn.inference_mode(model).dense)(X) + 0.0 * jax.tree.leaves(state)[0].sum().astype(X.dtype)


def train_state() -> Any:
    return TrainState.create(apply_fn=linen_apply, params={"dense": {"kernel": jnp.eye(4)}}, tx=optax.adam(1e-3))


def plain() -> Any:
    """As checkpoints of PyTorch and of Keras name it."""
    return {
        "dense": {"kernel": jnp.eye(4)},
        "bn": {"weight": jnp.ones(4), "running_mean": jnp.zeros(4), "running_var": jnp.ones(4)},
        "bn2": {"gamma": jnp.ones(4), "moving_mean": jnp.zeros(4), "moving_variance": jnp.ones(4)},
    }


def dense_apply(tree: Any) -> jax.Array:
    params: Any = tree.params if isinstance(tree, TrainState) else tree
    return X @ params["dense"]["kernel"]


class Case(NamedTuple):
    """A way to keep a model.

    Attributes:
        tree: what is passed to `attach`.
        apply: its function.
        state: the paths that are state.
        warns: whether its changes would be lost, so that `attach` warns.
        lasting: those of `state` that are saved with an adapter.
    """

    tree: Callable[[], Any]
    apply: Callable[[Any], jax.Array]
    state: set[str]
    warns: bool = False
    lasting: set[str] = set()  # noqa: RUF012, immutable here


STATISTICS = {"bn/mean", "bn/var"}
STREAM = {"dropout/rngs/count", "dropout/rngs/key"}
TYPED = STATISTICS | STREAM | {"calls", "seen", "codes"}
EMA = {f"bn/~/mean_ema/{name}" for name in ("average", "hidden", "counter")} | {"bn/~/var_ema/average"}
CASES = {
    "linen variables": Case(
        linen,
        linen_apply,
        {"batch_stats/bn/mean", "batch_stats/bn/var", "cache/calls"},
        lasting={"batch_stats/bn/mean", "batch_stats/bn/var"},
    ),
    "nnx split in two": Case(lambda: nnx.split(Net())[1], nnx_apply, TYPED, True, STATISTICS | {"codes"}),
    "nnx module": Case(Net, lambda model: model(X), TYPED, True, STATISTICS | {"codes"}),
    "nnx split in three": Case(nnx_params, nnx_params_apply, set()),
    "nnx as plain dicts": Case(nnx_pure, nnx_pure_apply, STATISTICS | STREAM, True, STATISTICS),
    "haiku params and state": Case(
        haiku, haiku_apply, {"state/" + path for path in EMA}, lasting={"state/" + path for path in EMA}
    ),
    "haiku merged": Case(haiku_merged, haiku_apply, EMA, lasting=EMA),
    "haiku params": Case(lambda: haiku()["params"], haiku_apply, set()),
    "equinox model": Case(lambda: eqx.nn.make_with_state(Equinox)()[0], equinox_apply, set()),
    "equinox model with its initial state": Case(
        Equinox,
        equinox_apply,
        {"bn/batch_counter/init", "bn/batch_state_index/init/0", "bn/batch_state_index/init/1"},
    ),
    "equinox model and state": Case(
        equinox_with_state,
        equinox_apply,
        {"carried/0", "carried/1/0", "carried/1/1"},
        lasting={"carried/0", "carried/1/0", "carried/1/1"},
    ),
    "train state": Case(
        train_state,
        dense_apply,
        {"step", "opt_state/0/count", "opt_state/0/mu/dense/kernel", "opt_state/0/nu/dense/kernel"},
    ),
    "plain names": Case(
        plain,
        dense_apply,
        plain_state := {"bn/running_mean", "bn/running_var", "bn2/moving_mean", "bn2/moving_variance"},
        lasting=plain_state,
    ),
}


def attached(case: Case, method: lj.Method) -> Any:
    tree = case.tree()
    if case.warns:
        with pytest.warns(lj.StateWarning, match=r"nnx.split\(model, nnx.Param, ...\)"):
            return lj.attach(tree, method, key=KEY)
    return lj.attach(tree, method, key=KEY)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree, those of its adapted weights too."""
    arrays = {}
    for path, leaf in leaves_by_path(tree).items():
        own = {f"{path}/{name}": array for name, array in vars(leaf).items()} if is_adapted(leaf) else {path: leaf}
        arrays |= {name: array for name, array in own.items() if isinstance(array, jax.Array)}
    return {
        path: np.asarray(jax.random.key_data(array) if is_random_key(array) else array)
        for path, array in arrays.items()
    }


LORA = lj.LoRA(rank=2, alpha=2, targets=("dense",))


@pytest.mark.parametrize("name", CASES)
def test_state_is_recognized_and_a_warning_says_where_it_would_be_lost(name: str) -> None:
    case = CASES[name]
    assert state_paths(case.tree()) == case.state
    attached(case, LORA)


METHODS = [lj.FullFineTune(), lj.RandomMask(size=0.5), lj.RandomSubspace(dimension=3), lj.BitFit(), lj.NormTuning()]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, id=f"{name}-{type(method).__name__}")
        for name, case in CASES.items()
        # The last two trees have no biases, or no norms.
        for method in (LORA, *(METHODS[:3] if case.tree in (train_state, plain) else METHODS))
    ],
)
def test_state_is_never_trained(name: str, method: lj.Method) -> None:
    case = CASES[name]
    labels = leaves_by_path(lj.label_params(attached(case, method), method))
    assert {labels[path] for path in case.state} <= {"frozen"}
    assert any(set(jax.tree.leaves(label)) != {"frozen"} for label in labels.values())


@pytest.mark.parametrize("method", [LORA, lj.FullFineTune()], ids=["LoRA", "FullFineTune"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_leaves_state_and_an_adapter_brings_it_back(name: str, method: lj.Method, tmp_path: Path) -> None:
    """All in one: attach, label, a step of AdamW, state that moves, save, load onto the base as it was."""
    case = CASES[name]
    params = attached(case, method)
    before = by_path(params)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    tx = lj.make_optimizer(optax.adamw(0.1, weight_decay=0.5), lj.label_params(params, method))

    def loss(trainable: Any) -> jax.Array:
        return (lj.adapt(case.apply)(lj.combine(trainable, frozen)) ** 2).mean()

    updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
    params = lj.combine(optax.apply_updates(trainable, updates), frozen)  # type: ignore[type-var]
    after = by_path(params)
    moved = {path for path in after if (after[path] != before[path]).any()}
    assert moved
    assert not moved & case.state

    # What the function's own code may do to it.
    paths, leaves, treedef = flatten_with_paths(params)
    moves = [path in case.lasting and leaf.dtype != bool for path, leaf in zip(paths, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, [leaf + 1 if own else leaf for leaf, own in zip(leaves, moves, strict=True)])
    folder = lj.save_adapter(tmp_path, params, method)
    loaded = lj.load_adapter(folder, case.tree()).params
    chex.assert_trees_all_equal(by_path(loaded), by_path(params))
    np.testing.assert_array_equal(lj.adapt(case.apply)(loaded), lj.adapt(case.apply)(params))
    # An adapter loads onto a base whose state has moved: it is the same base.
    for path in case.state - {"step"}:
        assert path not in json.loads((folder / "lora_jax_adapter.json").read_text())["base"]


# Naming state.


@pytest.mark.parametrize(
    ("tree", "entry", "message"),
    [
        (
            linen,
            "batch_stats",
            r"'batch_stats' matches no trainable leaf, only batch_stats/bn/mean \(4,\) \(state: L",
        ),
        (
            lambda: nnx.split(Net())[1],
            "bn/mean",
            r"only bn/mean \(4,\) \(state: nnx.BatchStat\). State is changed by",
        ),
        (lambda: nnx.split(Net())[1], "codes", r"only codes \(3,\) \(state: nnx.Variable\)"),
        (haiku_merged, "mean_ema", r"only bn/~/mean_ema/average \(4,\) \(state: batch statistics\)"),
        (equinox_with_state, "carried", r"only carried/0 \(\) \(state: equinox.nn.State\)"),
    ],
)
def test_state_that_is_named_is_refused(tree: Any, entry: str, message: str) -> None:
    for method in (lj.Frozen(also_train=(entry,)), lj.FullFineTune(targets=(entry,))):
        with pytest.raises(lj.SelectionError, match=message):
            lj.label_params(tree(), method)


def test_a_module_that_is_named_is_trained_without_its_state() -> None:
    method = lj.LoRA(rank=2, alpha=2, targets=("dense",), also_train=("bn",))
    labels = leaves_by_path(lj.label_params(attached(CASES["nnx split in two"], method), method))
    assert {path for path, label in labels.items() if label == "head"} == {"bn/scale", "bn/bias"}
    labels = leaves_by_path(lj.label_params(lj.attach(linen(), method, key=KEY), method))
    assert {path for path, label in labels.items() if label == "head"} == {"params/bn/scale", "params/bn/bias"}
    seen: list[Any] = []
    lj.label_params(linen(), lj.Frozen(also_train=lambda path, leaf: bool(seen.append(leaf)) or "bn" in path))
    assert all(isinstance(leaf, jax.Array) for leaf in seen), "a callable sees the leaves themselves"


def test_layers_of_a_collection_of_state_are_no_layers_of_the_model() -> None:
    layers = {f"Block_{number}": {"scale": jnp.ones(2)} for number in range(3)}
    labels = lj.label_params({"params": layers, "batch_stats": layers}, lj.TopLayers(count=1))
    assert labels["params"]["Block_2"] == {"scale": "full"}
    assert set(jax.tree.leaves(labels["batch_stats"])) == {"frozen"}


def test_state_is_no_weight_that_a_look_at_the_function_finds() -> None:
    """Keys that a cache holds are multiplied with as weights are."""
    tree = {"params": {"query": jnp.eye(4)}, "cache": {"cached_key": jnp.ones((4, 4))}}
    uses = lj.trace_weights(lambda tree, x: x @ tree["params"]["query"] @ tree["cache"]["cached_key"], tree, X)
    assert list(uses) == ["params/query"]
    method = lj.LoRA(rank=1, alpha=1, targets="all-linear")
    assert type(lj.attach(tree, method, key=KEY, uses=uses)["cache"]["cached_key"]) is not lj.LoRAWeight


# What is no state.


@pytest.mark.parametrize(
    "tree",
    [
        {"policy": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        {"params": {"normal": {"mean": jnp.zeros(2), "var": jnp.ones(2), "bias": jnp.zeros(2)}}},
        {"encoder": {"state": jnp.ones(2), "cache": jnp.ones(2), "steps": jnp.ones(2)}},
        {"layer": {"params": jnp.ones(2), "stats": jnp.ones(2)}},
        {"normal": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        {"prior": {"mean": jnp.zeros(2), "var": jnp.ones(2), "scale": jnp.ones(2)}},
    ],
)
def test_parameters_with_a_name_of_state_are_trained(tree: Any) -> None:
    assert set(jax.tree.leaves(lj.label_params(tree, lj.FullFineTune()))) == {"full"}


def test_every_kind_of_nnx_param_is_a_parameter() -> None:
    class Scale(nnx.Param):
        pass

    class Count(nnx.Variable):
        pass

    state = nnx.State({"mean": Scale(jnp.ones(2)), "cache": nnx.LoRAParam(jnp.ones(2)), "var": Count(jnp.ones(2))})
    assert state_paths(state) == {"var"}


def test_a_collection_of_an_unknown_name_is_said_to_be_trained() -> None:
    """It may be a head beside Linen's `params`, or state that a module has named as it likes."""
    tree = {"params": {"dense": {"kernel": jnp.eye(4)}}, "codebook": {"usage": jnp.ones(4)}}
    for method in (lj.FullFineTune(), lj.RandomSubspace(dimension=2)):
        with pytest.warns(lj.StateWarning, match="trains codebook/usage: `codebook` stands beside `params`, where"):
            lj.label_params(lj.attach(tree, method, key=KEY), method)
    module = nnx.State({"params": {"w": nnx.Param(jnp.ones(2))}, "head": {"w": nnx.Param(jnp.ones(2))}})
    assert set(jax.tree.leaves(lj.label_params(module, lj.FullFineTune()))) == {"full"}, "no collections, no warning"
    named = lj.label_params(tree, lj.FullFineTune(also_train=("codebook",)))
    assert named["codebook"]["usage"] == "head"
    assert lj.label_params(tree, lj.FullFineTune(targets=("dense",)))["codebook"]["usage"] == "frozen"


# State that is threaded, as the recipe does.


def threaded() -> tuple[Any, Any, Any]:
    graph, params, state = nnx.split(Net(), nnx.Param, ...)
    return graph, params, state


def run(graph: Any, params: Any, state: Any, *, train: bool) -> tuple[jax.Array, Any]:
    model = nnx.merge(graph, params, state)
    (model.train if train else model.eval)()
    return model(X), nnx.state(model, nnx.Not(nnx.Param))


def test_threaded_state_moves_and_comes_back_with_the_adapter(tmp_path: Path) -> None:
    graph, base, initial = threaded()
    params, state = lj.attach(base, LORA, key=KEY), initial
    step = jax.jit(lj.adapt(lambda params, state: run(graph, params, state, train=True)))
    first, state = step(params, state)
    second, state = step(params, state)
    assert (first != second).any(), "each call drops other elements"
    lj.save_adapter(tmp_path, params, LORA, state=state)

    _, base, initial = threaded()
    loaded = lj.load_adapter(tmp_path, base, state=initial)
    chex.assert_trees_all_equal(by_path(loaded.state), by_path(state))
    chex.assert_trees_all_equal_structs(loaded.state, state)
    predict = lj.adapt(lambda params, state: run(graph, params, state, train=False)[0])
    np.testing.assert_array_equal(predict(loaded.params, loaded.state), predict(params, state))
    assert (predict(loaded.params, initial) != predict(params, state)).any()
    third = [step(params, state)[0], step(loaded.params, loaded.state)[0]]
    np.testing.assert_array_equal(*third)


@pytest.mark.parametrize(
    "state",
    [
        {"batch_stats": {"bn": {"mean": jnp.ones(4)}}},
        {"counts": jnp.arange(3), "on": jnp.array(True), "least": jnp.array(jnp.inf), "none": None},
        eqx.nn.make_with_state(Equinox)()[1],
        {"keys": jax.random.split(KEY, 3), "other": jax.random.key(1, impl="rbg"), "old": jax.random.PRNGKey(2)},
        jnp.ones((2, 2), jnp.bfloat16),
        {},
    ],
    ids=["linen", "numbers", "equinox", "keys", "one array", "none"],
)
def test_state_apart_comes_back_as_it_was(state: Any, tmp_path: Path) -> None:
    base = {"dense": {"kernel": jnp.eye(4)}, "state": {"least": jnp.ones(2)}}
    folder = lj.save_adapter(tmp_path, lj.attach(base, LORA, key=KEY), LORA, state=state)
    blank = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf), state
    )
    params, method, loaded = lj.load_adapter(folder, base, state=blank)
    chex.assert_trees_all_equal_structs(loaded, state)
    chex.assert_trees_all_equal_dtypes(loaded, state)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert (ours == theirs).all()
    assert list(lj.save_adapter(tmp_path / "again", params, method, state=loaded).iterdir())
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (folder / "adapter.safetensors").read_bytes()


def test_state_that_is_forgotten_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = {"dense": {"kernel": jnp.eye(4)}}
    params = lj.attach(base, LORA, key=KEY)
    state = {"bn": {"mean": jnp.ones(4), "key": KEY}}
    with_state = lj.save_adapter(tmp_path / "with", params, LORA, state=state)
    without = lj.save_adapter(tmp_path / "without", params, LORA)
    with pytest.raises(lj.AdapterError, match=r"was saved with state, bn/key, bn/mean: pass a tree of its structure"):
        lj.load_adapter(with_state, base)
    with pytest.raises(lj.AdapterError, match=r"differ at bn/key, bn/mean. It was saved without any: leave `state`"):
        lj.load_adapter(without, base, state=state)
    with pytest.raises(lj.AdapterError, match=r"they differ at bn/var"):
        lj.load_adapter(with_state, base, state={"bn": state["bn"] | {"var": jnp.ones(4)}})
    with pytest.raises(lj.AdapterError, match=r"state `bn/mean` has the shape \(4,\), and that of `state` has \(3,\)"):
        lj.load_adapter(with_state, base, state={"bn": state["bn"] | {"mean": jnp.ones(3)}})
    with pytest.raises(lj.AdapterError, match=r"cannot be saved: NaN or infinity in /state/bn/mean"):
        lj.save_adapter(tmp_path / "broken", params, LORA, state={"bn": {"mean": jnp.full(4, jnp.nan)}})
    with pytest.raises(lj.AdapterError, match=r"`state` has Python numbers, at steps: make them arrays"):
        lj.save_adapter(tmp_path / "numbers", params, LORA, state={"steps": 7, "mean": jnp.ones(4)})
    description = json.loads((with_state / "lora_jax_adapter.json").read_text())
    (with_state / "lora_jax_adapter.json").write_text(json.dumps(description | {"state": {"bn": 1}}))
    with pytest.raises(lj.AdapterError, match=r"`state` must be a list of tensor names, got"):
        lj.load_adapter(with_state, base, state=state)


@pytest.mark.parametrize("collection", ["state", "buffers", "batch_stats"])
def test_a_random_key_among_state_in_the_tree_is_no_reason_not_to_save(collection: str, tmp_path: Path) -> None:
    base = {"params": {"dense": {"kernel": jnp.eye(4)}}, collection: {"key": KEY, "mean": jnp.ones(2)}}
    folder = lj.save_adapter(tmp_path, lj.attach(base, LORA, key=KEY), LORA)
    fresh = base | {collection: {"key": jax.random.key(9), "mean": jnp.zeros(2)}}
    loaded = lj.load_adapter(folder, fresh).params[collection]
    assert loaded["mean"].tolist() == [1, 1]
    assert loaded["key"] == fresh[collection]["key"]  # no state that lasts: the base's own


def test_an_adapter_with_its_state_in_the_tree_says_where_it_belongs(tmp_path: Path) -> None:
    tree = {"dense": {"kernel": jnp.eye(4)}, "bn": {"running_mean": jnp.ones(2), "weight": jnp.ones(2)}}
    folder = lj.save_adapter(tmp_path, lj.attach(tree, LORA, key=KEY), LORA)
    base = {"dense": tree["dense"], "bn": {"weight": jnp.ones(2)}}
    with pytest.raises(lj.AdapterError, match=r"the state `bn/running_mean` in its tree.*save it again with `stat"):
        lj.load_adapter(folder, base)


def test_linen_statistics_that_are_written_back_come_with_the_adapter(tmp_path: Path) -> None:
    params = lj.attach(linen(), LORA, key=KEY)
    train = lj.adapt(lambda variables, x: Linen().apply(variables, x, train=True, mutable=["batch_stats", "cache"]))
    _, moved = train(params, X)
    params = {**params, **moved}
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, LORA), linen()).params
    chex.assert_trees_all_equal(loaded["batch_stats"], moved["batch_stats"])
    assert loaded["cache"]["calls"] == 0, "a cache is no result of training"
    np.testing.assert_array_equal(lj.adapt(linen_apply)(loaded), lj.adapt(linen_apply)(params))


def test_statistics_of_two_full_models_come_with_the_extracted_lora(tmp_path: Path) -> None:
    base, moved = linen(), linen()
    moved["params"]["dense"]["kernel"] = base["params"]["dense"]["kernel"] + jnp.ones((4, 4))
    moved["batch_stats"]["bn"]["mean"] = jnp.ones(4)
    found = lj.extract_lora(base, moved, targets=("dense",), rank=1)
    assert found.carried == ["batch_stats/bn/mean"]
    assert found.method.also_train == ()
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, found.params, found.method), base).params
    assert loaded["batch_stats"]["bn"]["mean"].tolist() == [1] * 4
    dropped = lj.extract_lora(base, moved, targets=("dense",), rank=1, rest="drop")
    assert dropped.params["batch_stats"]["bn"]["mean"].tolist() == [0] * 4
    with pytest.raises(ValueError, match="has other values at `batch_stats/bn/mean`"):
        lj.extract_lora(base, moved, targets=("dense",), rank=1, rest="error")


# Adapters of versions that took state for parameters.


@pytest.mark.parametrize(
    "method",
    [
        LORA,
        lj.LoRA(rank=2, alpha=2, targets=("dense",), also_train=("bn",)),
        lj.FullFineTune(),
        lj.RandomMask(size=0.5),
        lj.RandomSubspace(dimension=3),
    ],
    ids=["lora", "head", "full", "mask", "subspace"],
)
@pytest.mark.parametrize("tree", [linen, nnx_pure], ids=["linen", "nnx"])
def test_earlier_adapters_load_with_what_they_hold(
    tree: Callable[[], Any], method: lj.Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(state_module, "_kinds", lambda tree: {})
        params = lj.attach(tree(), method, key=KEY)
        mask = lj.trainable_mask(params, method)
        params = jax.tree.map(lambda leaf, moves: leaf + 0.5 if moves else leaf, params, mask)
        folder = lj.save_adapter(tmp_path, params, method)
    assert "state" not in json.loads((folder / "lora_jax_adapter.json").read_text())
    loaded = lj.load_adapter(folder, tree())
    merged = by_path(lj.merge_params(loaded.params))
    chex.assert_trees_all_equal(merged, by_path(lj.merge_params(params)))
    again = lj.load_adapter(lj.save_adapter(tmp_path / "again", *loaded), tree())
    kept = {path: array for path, array in by_path(lj.merge_params(again.params)).items() if path != "cache/calls"}
    chex.assert_trees_all_equal(kept, {path: merged[path] for path in kept})


def test_without_state_an_adapter_is_written_as_before(tmp_path: Path) -> None:
    base = {"dense": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
    folder = lj.save_adapter(tmp_path, lj.attach(base, LORA, key=KEY), LORA)
    assert set(json.loads((folder / "lora_jax_adapter.json").read_text())) == {
        "format",
        "version",
        "method",
        "adapted",
        "tensors",
        "sha256",
        "base",
        "checksum",
    }
    assert sorted(read_safetensors(folder / "adapter.safetensors")) == ["dense/kernel/a", "dense/kernel/b"]


def test_marks_never_get_into_a_tree() -> None:
    for name, case in CASES.items():
        for method in (LORA, lj.RandomMask(size=0.5)):
            params = attached(case, method)
            assert not any(type(leaf).__name__ == "StateLeaf" for leaf in jax.tree.leaves(params)), name
        assert marked_leaves(case.tree()).keys() == leaves_by_path(case.tree()).keys()
