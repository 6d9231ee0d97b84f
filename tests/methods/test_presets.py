"""What presets take of trees whose names aren't the bundled models', and of weights that have no room for the rank."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import lora_jax as lj
from lora_jax.paths import leaves_by_path

KEY = jax.random.key(0)
D = 4


def kernel(*shape: int) -> Any:
    return {"kernel": jnp.ones(shape or (D, D)), "bias": jnp.ones((shape or (D, D))[-1])}


def norm() -> Any:
    return {"scale": jnp.ones(D), "bias": jnp.ones(D)}


def vit() -> Any:
    """The names of transformers' Flax ViT: half of them are the bundled models', by chance."""
    layer = {
        "attention": {
            "attention": {name: kernel() for name in ("query", "key", "value")},
            "output": {"dense": kernel()},
        },
        "intermediate": {"dense": kernel(D, 8)},
        "output": {"dense": kernel(8, D)},
        "layernorm_before": norm(),
    }
    return {
        "embeddings": {
            "cls_token": jnp.ones((1, 1, D)),
            "position_embeddings": jnp.ones((1, 5, D)),
            "patch_embeddings": {"projection": kernel(3, D)},
        },
        "encoder": {"layer": {"0": layer, "1": layer}},
        "pooler": {"dense": kernel()},
        "classifier": kernel(D, 2),
    }


def vit_apply(params: Any, x: jax.Array) -> jax.Array:
    def linear(x: jax.Array, p: Any) -> jax.Array:
        return x @ p["kernel"] + p["bias"][(None,) * (x.ndim - 1)]

    x = linear(x, params["embeddings"]["patch_embeddings"]["projection"]) + params["embeddings"]["position_embeddings"]
    for layer in params["encoder"]["layer"].values():
        h = x * layer["layernorm_before"]["scale"][None, None]
        q, k, v = (linear(h, layer["attention"]["attention"][name]) for name in ("query", "key", "value"))
        x = x + linear(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v, layer["attention"]["output"]["dense"])
        x = x + linear(jnp.tanh(linear(x, layer["intermediate"]["dense"])), layer["output"]["dense"])
    return linear(jnp.tanh(linear(x[:, 0], params["pooler"]["dense"])), params["classifier"])


def adapted(tree: Any) -> list[str]:
    """The modules with factors, of the first layer alone."""
    paths = [path for path, leaf in leaves_by_path(tree).items() if lj.weights.is_adapted(leaf)]
    return [path.removesuffix("/kernel") for path in paths if "/1/" not in path]


def attach(params: Any, targets: str = "all-linear", uses: Any = None, **settings: Any) -> Any:
    method = lj.LoRA(**{"rank": 1, "alpha": 1, "targets": targets, **settings})
    return lj.attach(params, method, key=KEY, uses=uses)


ATTENTION = ["encoder/layer/0/attention/attention/" + name for name in ("key", "query", "value")]
ATTENTION += ["encoder/layer/0/attention/output/dense"]
MLP = ["encoder/layer/0/intermediate/dense", "encoder/layer/0/output/dense"]


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        ("all-linear", ["attention/output/dense", "intermediate/dense", "output/dense"]),
        ("attention", ["attention/output/dense"]),
    ],
)
def test_another_models_names_are_refused_where_they_are_a_part(targets: str, left: list[str]) -> None:
    expected = ", ".join(f"encoder/layer/*/{name}/kernel" for name in left)
    with pytest.raises(lj.SelectionError) as refused:
        attach(vit(), targets)
    assert f"`targets={targets!r}` knows the bundled models' names" in str(refused.value)
    assert f"weights that may be meant as well, {expected}: name the modules, or pass `targets=" in str(refused.value)


def test_what_another_model_has_none_of_is_refused_with_what_it_has() -> None:
    with pytest.raises(
        lj.SelectionError, match=r"this tree has none of them: .* Weights that it has: encoder/layer/\*"
    ):
        attach(vit(), "mlp")


def test_with_uses_the_graph_decides() -> None:
    params = vit()
    uses = lj.trace_weights(vit_apply, params, jnp.ones((1, 5, 3)))
    patches = ["embeddings/patch_embeddings/projection"]
    assert adapted(attach(params, uses=uses)) == [*patches, *ATTENTION, *MLP, "pooler/dense"]
    assert adapted(attach(params, "attention", uses)) == ATTENTION
    with pytest.raises(lj.SelectionError, match="this tree has none of them: name the modules, or pass"):
        attach(params, "mlp", uses)


def test_ia3_takes_no_half_of_its_preset() -> None:
    """Keys and values without the MLP's vector is another method; so with the graph, which knows no keys."""
    params = vit()
    for uses in (None, lj.trace_weights(vit_apply, params, jnp.ones((1, 5, 3)))):
        with pytest.raises(
            lj.SelectionError, match=r"`targets='keys-values-mlp'` .* may be meant as well, .*intermedia"
        ):
            lj.attach(params, lj.IA3(), key=KEY, uses=uses)


@pytest.mark.parametrize(
    "method", [lj.DoRA(rank=1, alpha=1, targets="attention"), lj.VeRA(rank=1, targets="all-linear")]
)
def test_relatives_of_lora_refuse_likewise(method: Any) -> None:
    with pytest.raises(lj.SelectionError, match="weights that may be meant as well"):
        lj.attach(vit(), method, key=KEY)


def test_the_kind_of_a_module_is_told_by_its_name_too() -> None:
    """transformers' Flax Llama: other names throughout, which only the graph tells to be linear."""
    names = [f"self_attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    params = {f"layers_0/{name}": kernel() for name in names} | {"ln/w": jnp.ones((2, D)), "lm_head": kernel()}
    uses = {f"{path}/kernel": lj.Use("dot_general", "io") for path in (*params, "lm_head") if path != "ln/w"}
    assert adapted(attach(params, "attention", uses)) == sorted(f"layers_0/{name}" for name in names[:4])
    assert adapted(attach(params, "mlp", uses)) == sorted(f"layers_0/{name}" for name in names[4:])


@pytest.mark.parametrize(
    ("more", "targets", "left"),
    [
        # An attention module with something more than a bundled model's.
        ({"attention/gate": kernel()}, "attention", "attention/gate/kernel"),
        ({"cross_attn/query": kernel()}, "attention", "cross_attn/query/kernel"),
        ({"mlp/experts/wi": kernel(2, D, D)}, "mlp", "mlp/experts/wi/kernel"),
        ({"conv/depthwise": kernel(3, 1, D)}, "all-linear", "conv/depthwise/kernel"),
        ({"time/Dense_0": kernel()}, "all-linear", "time/Dense_0/kernel"),
    ],
)
def test_what_is_left_beside_bundled_names(more: dict[str, Any], targets: str, left: str) -> None:
    params = bundled() | more
    with pytest.raises(lj.SelectionError, match=f"may be meant as well, {left}: "):
        attach(params, targets)
    attach(params, "mlp" if targets == "attention" else "attention")


def test_a_part_under_its_own_name_outside_is_found_missing() -> None:
    params = {path: leaf for path, leaf in bundled().items() if path != "attention/output"} | {"o_proj": kernel()}
    uses = {f"{path}/kernel": lj.Use("dot_general", "io") for path in params if path.startswith(("att", "mlp", "o_"))}
    for known in (None, uses):
        with pytest.raises(lj.SelectionError, match="may be meant as well, o_proj/kernel: "):
            attach(params, "attention", known)
    assert adapted(attach(params, "mlp")) == ["mlp/down", "mlp/up"]
    del params["o_proj"]  # nothing is left that could be it
    assert adapted(attach(params)) == ["attention/key", "attention/query", "attention/value", "mlp/down", "mlp/up"]


def bundled() -> Any:
    """One layer of a bundled model's names, with what isn't a weight of a matmul within the model."""
    names = [f"attention/{name}" for name in ("query", "key", "value", "output")] + ["mlp/up", "mlp/down"]
    return {name: kernel() for name in names} | {
        "word_embeddings": jnp.ones((7, D)),
        "decoder_pos": jnp.ones((1, 5, D)),
        "register_tokens": jnp.ones((3, D)),
        "layers/attention/norm": {"weight": jnp.ones((2, D))},
        "layer_scale": jnp.ones((1, D)),
        "q_bias": jnp.ones((2, D)),
        "pooler/dense": kernel(),
        "classifier/dense": kernel(),
        "lm_head": kernel(),
    }


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 6), ("attention", 4), ("mlp", 2)])
def test_tables_heads_and_vectors_are_not_left_over(targets: str, count: int) -> None:
    assert len(adapted(attach(bundled(), targets))) == count


def test_a_head_is_not_left_over() -> None:
    params = bundled() | {"task": kernel()}
    with pytest.raises(lj.SelectionError, match="may be meant as well, task/kernel: "):
        attach(params)
    assert len(adapted(attach(params, also_train=("task",)))) == 6


# Weights that the graph shows, and that factors can't stand beside.


def masked(params: Any, x: jax.Array) -> jax.Array:
    return x @ jnp.where(jnp.eye(D) > 0, params["w"]["kernel"], 0)


def test_nothing_that_can_be_adapted_is_refused_with_the_reasons() -> None:
    params = {"w": kernel()}
    uses = lj.trace_weights(masked, params, jnp.ones((2, D)))
    with pytest.raises(
        lj.SelectionError,
        match=r"`targets='all-linear'` found no weight that factors can stand beside. By `uses`, w/kernel: merged by "
        r"select_n at .*test_presets.*: there is no rule for this operation. Named in `targets` they are",
    ):
        attach(params, uses=uses)


def test_nothing_linear_is_refused() -> None:
    uses = lj.trace_weights(lambda p, x: x * p["gain"][None], {"gain": jnp.ones(D)}, jnp.ones((2, D)))
    with pytest.raises(
        lj.SelectionError, match="found no weight of a matmul or convolution in `uses`: name the modules"
    ):
        attach({"gain": jnp.ones(D)}, uses=uses)


def test_weights_left_out_beside_others_are_said() -> None:
    """A masked one, one whose uses conflict, and a grouped convolution."""

    def apply(params: Any, x: jax.Array) -> Any:
        y = masked(params, x) @ params["v"]["kernel"]
        outer = jnp.einsum("t,df->tdf", x[:, 0], params["twice"]["kernel"])
        numbers = ("NWC", "WIO", "NWC")
        z = jax.lax.conv_general_dilated(
            x[None], params["conv"]["kernel"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=D
        )
        return y, outer, x @ params["twice"]["kernel"], z

    params = {"w": kernel(), "v": kernel(), "twice": kernel(), "conv": kernel(3, 1, D)}
    uses = lj.trace_weights(apply, params, jnp.ones((2, D)))
    with pytest.warns(UserWarning, match="`targets='all-linear'` leaves out weights that .*Named in `targets`") as told:
        tree = attach(params, uses=uses)
    assert adapted(tree) == ["v"]
    message = str(told[0].message)
    assert "w/kernel: merged by select_n" in message
    assert "twice/kernel: dot_general needs the labels 'oo', dot_general needs 'io': choose by hand" in message
    assert "conv/kernel: merged by conv_general_dilated" in message
    assert "a grouped convolution" in message
    # The caller; the tests check annotations, in a frame between.
    assert told[0].filename in (__file__, jaxtyping._decorator.__file__)


# Weights with less room than the rank.


def router(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ params["router"]["kernel"]) @ params["out"]["kernel"] @ params["w"]["kernel"]


ROUTER = {"router": kernel(9, 3), "out": kernel(3, 8), "w": kernel(8, 8)}


@pytest.mark.parametrize("method", [lj.LoRA, lj.DoRA])
def test_a_preset_caps_the_rank_and_says_so(method: Any) -> None:
    uses = lj.trace_weights(router, ROUTER, jnp.ones((2, 9)))
    chosen = method(rank=6, alpha=12, targets="all-linear")
    with pytest.warns(
        UserWarning,
        match=r"`rank` 6 is more than some weights of `targets='all-linear'` allow, so they get less: "
        r"out/kernel 3, router/kernel 3. Set their ranks in `rank_overrides`",
    ) as told:
        tree = lj.attach(ROUTER, chosen, key=KEY, uses=uses)
    # The caller; the tests check annotations, in a frame between.
    assert told[0].filename in (__file__, jaxtyping._decorator.__file__)
    found = {
        path: (node.rank, node.scale) for path, node in leaves_by_path(tree).items() if lj.weights.is_adapted(node)
    }
    assert found == {"router/kernel": (3, 4.0), "out/kernel": (3, 4.0), "w/kernel": (6, 2.0)}
    said = method(rank=6, alpha=12, targets="all-linear", rank_overrides={"router": 3, "out": 3})
    again = lj.attach(ROUTER, said, key=KEY, uses=uses)
    jax.tree.map(lambda one, other: (one == other).all() or pytest.fail("differs"), tree, again)
    assert chosen.resolved(leaves_by_path(tree)).rank_overrides == {"/out/kernel": 3, "/router/kernel": 3}


def test_a_capped_adapter_is_saved_and_loaded(tmp_path: Any) -> None:
    method = lj.LoRA(rank=6, alpha=12, targets="all-linear")
    with pytest.warns(UserWarning, match="so they get less"):
        tree = lj.attach(ROUTER, method, key=KEY, uses=lj.trace_weights(router, ROUTER, jnp.ones((2, 9))))
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, tree, method), ROUTER).params
    assert (loaded["router"]["kernel"].rank, loaded["w"]["kernel"].rank) == (3, 6)


def test_a_convolution_of_few_channels_is_capped_too() -> None:
    params = {"conv": kernel(3, 1, 2), "v": kernel(9, 9), "w": kernel(2, 9)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=numbers)
        return x @ params["w"]["kernel"] @ params["v"]["kernel"]

    uses = lj.trace_weights(apply, params, jnp.ones((1, 5, 1)))
    with pytest.warns(UserWarning, match=r"they get less: conv/kernel 2, w/kernel 2\. Set"):
        tree = attach(params, uses=uses, rank=4, alpha=4)
    assert (tree["conv"]["kernel"].rank, tree["v"]["kernel"].rank) == (2, 4)
    with pytest.raises(ValueError, match=r"`rank` 10 is larger than `conv/kernel` allows"):  # and than all others
        attach(params, uses=uses, rank=10, alpha=4)


@pytest.mark.parametrize("name", ["w_beta", "to_gamma", "proj_scale", "weight_offset"])
def test_a_weight_that_makes_a_scale_or_a_shift_is_a_weight(name: str) -> None:
    params = {"film": {name: jnp.ones((4, 4))}}
    tree = lj.attach(params, lj.LoRA(rank=1, alpha=1, targets=("film",)), key=KEY)
    assert tree["film"][name].rank == 1


def test_names_given_by_hand_stay_strict() -> None:
    message = (
        r"`rank` 6 is larger than `router/kernel` allows.*at most 3; give it a rank of its own, `rank_overrides={\"r"
    )
    with pytest.raises(ValueError, match=message):
        lj.attach(ROUTER, lj.LoRA(rank=6, alpha=6, targets=("router", "w")), key=KEY)
    uses = lj.trace_weights(router, ROUTER, jnp.ones((2, 9)))
    with (
        pytest.warns(UserWarning, match="they get less: out/kernel 3"),
        pytest.raises(ValueError, match="`rank` 5 is larger"),
    ):
        attach(ROUTER, uses=uses, rank=6, alpha=6, rank_overrides={"router": 5})
