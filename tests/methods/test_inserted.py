"""Bottleneck adapters and prefixes: counts by formula, an independent computation, every kind of bundled model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_safetensors, sha256_file, write_safetensors
from lora_jax.methods.prefix_tuning import ReparametrizedPrefix
from lora_jax.models.stacking import stack_layers, unstack_layers
from lora_jax.paths import leaves_by_path
from lora_jax.weights import is_adapted
from tests.models_table import moved
from tests.tiny_decoders import FAMILIES, write_tiny_decoder
from tests.tiny_encoders import write_tiny

METHODS = {
    "houlsby": lj.BottleneckAdapter(size=3),
    "pfeiffer": lj.BottleneckAdapter(size=3, placement="pfeiffer"),
    "prefix": lj.PrefixTuning(length=3, hidden=5),
    "direct prefix": lj.PrefixTuning(length=3, hidden=None),
}
IDS = jnp.array([[5, 6, 7, 8, 9, 10], [7, 9, 5, 11, 12, 6]])
MASK = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@functools.cache
def decoder(family: str, folder: Any, scan: bool = False) -> Any:
    return lj.models.load(write_tiny_decoder(folder, family), task="causal-lm", scan_layers=scan)


@functools.cache
def encoder(family: str, folder: Any) -> Any:
    return lj.models.load(write_tiny(folder, family), task="classification", num_labels=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    return tmp_path_factory.mktemp("bases")


def trained(params: Any, method: lj.Method) -> Any:
    tree = lj.attach(params, method, key=jax.random.key(0))
    return moved(tree, lj.trainable_mask(tree, method), seed=1)


# Counts.


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (lj.BottleneckAdapter(size=64), 24 * (2 * 64 * 768 + 64 + 768) + 24 * 2 * 768),
        (lj.BottleneckAdapter(size=64, train_norms=False), 24 * (2 * 64 * 768 + 64 + 768)),
        (lj.BottleneckAdapter(size=48, placement="pfeiffer"), 12 * (2 * 48 * 768 + 48 + 768)),
        (lj.PrefixTuning(length=20, hidden=None), 2 * 12 * 20 * 768),
        (lj.PrefixTuning(length=20, hidden=512), 20 * 768 + 768 * 512 + 512 + 2 * 12 * 768 * (512 + 1)),
    ],
)
def test_counts_of_bert_base_are_the_formulas(method: lj.Method, formula: int) -> None:
    from lora_jax.models.families.bert import BertConfig
    from lora_jax.models.model import skeleton

    sizes: Any = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = BertConfig(vocab_size=30522, max_position_embeddings=512, type_vocab_size=2, **sizes)
    params = skeleton(config, task="classification", num_labels=2).params
    tree = jax.eval_shape(lambda: lj.attach(params, method, key=jax.random.key(0)))
    assert lj.count_params(tree, lj.label_params(tree, method)).trainable == formula


# By an independent computation.


def test_an_adapter_computes_its_formula() -> None:
    from scipy.special import erf

    from lora_jax.models.nn.insertion import InsertedAdapter

    rng = np.random.default_rng(0)
    shapes = {"down/kernel": (4, 2), "down/bias": (2,), "up/kernel": (2, 4), "up/bias": (4,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    h = rng.normal(size=(3, 5, 4)).astype(np.float32)
    inner = h.astype(np.float64) @ arrays["down/kernel"] + arrays["down/bias"]
    inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
    wanted = h + inner @ arrays["up/kernel"] + arrays["up/bias"]
    found = InsertedAdapter({name: jnp.asarray(array) for name, array in arrays.items()})(jnp.asarray(h))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_an_adapter_that_is_linear_would_be_a_change_of_the_output_weight(folder: Any) -> None:
    """Where it stands: with `up` at zero, its bias alone adds what a change of the sublayer's output bias adds."""
    model = encoder("bert", folder / "bert")
    method = lj.BottleneckAdapter(size=3, train_norms=False)
    tree = lj.merge_params(lj.attach(model.params, method, key=jax.random.key(0)))
    shift = np.random.default_rng(0).normal(size=tree["encoder"]["layers"]["0"]["mlp"]["down"]["bias"].shape)
    layer, plain = tree["encoder"]["layers"]["0"], jax.tree.map(jnp.asarray, model.params)
    for name, output in (("attention", "output"), ("mlp", "down")):
        layer[name]["adapter"]["up"]["bias"] = jnp.asarray(shift, jnp.float32)
        biased = plain["encoder"]["layers"]["0"][name][output]
        biased["bias"] = biased["bias"] + jnp.asarray(shift, jnp.float32)
    np.testing.assert_allclose(model.apply(tree, IDS, MASK), model.apply(plain, IDS, MASK), atol=1e-5)


def test_the_network_of_a_prefix_is_its_formula(folder: Any) -> None:
    """All layers' keys and values at once, in NumPy: `tanh(P' W₁ + c₁) W₂ + c₂`."""
    model, method = encoder("bert", folder / "bert"), METHODS["prefix"]
    tree = trained(model.params, method)
    nodes = {path: leaf for path, leaf in leaves_by_path(tree).items() if isinstance(leaf, ReparametrizedPrefix)}
    first = next(iter(nodes.values()))
    wide = {name: np.asarray(getattr(first, name), np.float64) for name in ("table", "hidden_kernel", "hidden_bias")}
    hidden = np.tanh(wide["table"] @ wide["hidden_kernel"] + wide["hidden_bias"])
    kernel = np.concatenate([np.asarray(node.kernel, np.float64) for node in nodes.values()], axis=1)
    bias = np.concatenate([np.asarray(node.bias, np.float64) for node in nodes.values()])
    wanted = hidden @ kernel + bias
    merged = leaves_by_path(lj.merge_params(tree))
    np.testing.assert_allclose(np.concatenate([merged[path] for path in nodes], axis=1), wanted, atol=1e-5)


def test_a_prefix_is_what_tokens_before_would_be(folder: Any) -> None:
    """Keys and values of real tokens, put in as a prefix, give the others the logits that they have after those tokens.

    GPT-2's positions are said outright, since a prefix doesn't move them.
    """
    model = decoder("gpt2", folder / "gpt2")
    first, rest = IDS[1:, :3], IDS[1:, 3:]
    wanted = model.apply(model.params, IDS[1:])[:, 3:]
    _, cache = model.apply(model.params, first, cache=3)
    method = lj.PrefixTuning(length=3, hidden=None)
    tree = lj.merge_params(lj.attach(model.params, method, key=jax.random.key(0)))
    for number, layer in tree["layers"].items():
        for name, held in (("key", cache.keys), ("value", cache.values)):
            layer["attention"]["prefix"][name] = held[int(number), 0].transpose(1, 0, 2).reshape(3, -1)
    found = model.apply(tree, rest, position_ids=jnp.array([[3, 4, 5]]))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


# On every kind of model.


@every_method
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_encoders(family: str, method: lj.Method, folder: Any) -> None:
    check(encoder(family, folder / family), method)


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_decoders(family: str, method: lj.Method, folder: Any) -> None:
    check(decoder(family, folder / family), method)


def check(model: Any, method: lj.Method) -> None:
    """Law 1 where there is one; the merged tree is what the adapted one computes, and padding is of no effect."""
    start = lj.attach(model.params, method, key=jax.random.key(0))
    run = jax.jit(model.apply)
    base = run(model.params, IDS, MASK)
    if isinstance(method, lj.BottleneckAdapter):
        chex.assert_trees_all_close(run(lj.merge_params(start), IDS, MASK), base, atol=1e-6)
    tree = trained(model.params, method)
    whole = lj.merge_params(tree)
    found = jax.jit(lj.adapt(model.apply, on_materialize="error"))(tree, IDS, MASK)
    chex.assert_trees_all_close(found, run(whole, IDS, MASK), atol=1e-5)
    assert np.abs(found - base).max() > 1e-3
    other = run(whole, IDS.at[0, 4:].set(13), MASK)
    real = (slice(0, 1), slice(0, 4)) if found.ndim == 3 else slice(0, 1)
    chex.assert_trees_all_close(found[real], other[real], atol=1e-5)


@every_method
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_stacked_layers_compute_the_same(family: str, method: lj.Method, folder: Any) -> None:
    """From one form to the other and back, adapters and all."""
    side, stacked = decoder(family, folder / family), decoder(family, folder / family, scan=True)
    own = lj.attach(stacked.params, method, key=jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(own).items() if is_adapted(leaf)}
    assert all(shape[0] == len(side.params["layers"]) for shape in shapes.values())

    tree, plain = method.folded(trained(side.params, method))
    if isinstance(method, lj.PrefixTuning):
        assert plain == dataclasses.replace(method, hidden=None)
    found = jax.jit(lj.adapt(stacked.apply))(stack_layers(tree), IDS, MASK)
    chex.assert_trees_all_close(found, jax.jit(lj.adapt(side.apply))(tree, IDS, MASK), atol=1e-5)
    chex.assert_trees_all_equal(unstack_layers(stack_layers(tree)), tree)


@every_method
def test_token_by_token_is_as_all_at_once(method: lj.Method, folder: Any) -> None:
    model = decoder("llama", folder / "llama")
    whole = lj.merge_params(trained(model.params, method))
    wanted = model.apply(whole, IDS)
    found, cache = model.apply(whole, IDS[:, :4], cache=6)
    logits = [found]
    for place in (4, 5):
        found, cache = model.apply(whole, IDS[:, place : place + 1], cache=cache)
        logits.append(found)
    chex.assert_trees_all_close(jnp.concatenate(logits, axis=1), wanted, atol=1e-5)


@every_method
def test_packed_texts_are_as_each_alone(method: lj.Method, folder: Any) -> None:
    """Every text of a row sees the whole prefix, and nothing of another text."""
    model = decoder("gpt2", folder / "gpt2")
    whole = lj.merge_params(trained(model.params, method))
    found = model.apply(whole, IDS[:1], segments=jnp.array([[0, 0, 0, 1, 1, 1]]))
    alone = [model.apply(whole, IDS[:1, :3]), model.apply(whole, IDS[:1, 3:])]
    chex.assert_trees_all_close(found, jnp.concatenate(alone, axis=1), atol=1e-5)


@every_method
def test_remat_has_the_same_gradient(method: lj.Method, folder: Any) -> None:
    path = write_tiny_decoder(folder / "remat", "gpt2")
    plain, remat = (lj.models.load(path, task="causal-lm", remat=policy) for policy in (None, "nothing_saveable"))
    tree = trained(plain.params, method)
    trainable, frozen = lj.partition(tree, lj.trainable_mask(tree, method))

    def gradient(apply: Any) -> Any:
        loss = lambda trainable: (lj.adapt(apply)(lj.combine(trainable, frozen), IDS) ** 2).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(trainable)

    chex.assert_trees_all_close(gradient(remat.apply), gradient(plain.apply), rtol=1e-4, atol=1e-5)


def test_the_program_of_the_base_is_untouched(folder: Any) -> None:
    """Without insertions no trace of them: as many operations as a base that has never seen any."""
    model = encoder("bert", folder / "bert")
    before = str(jax.make_jaxpr(model.apply)(model.params, IDS, MASK))
    model.apply(lj.merge_params(trained(model.params, METHODS["houlsby"])), IDS, MASK)
    assert str(jax.make_jaxpr(model.apply)(model.params, IDS, MASK)) == before


def test_no_gradient_of_a_frozen_weight_is_computed(folder: Any) -> None:
    """Law 7: the compiled step contracts no tokens into the shape of a weight of the base."""
    model = encoder("distilbert", folder / "distilbert")
    ids = jnp.ones((7, 11), jnp.int32)
    layers = {path: leaf for path, leaf in leaves_by_path(model.params).items() if "layers" in path}
    weights = {tuple(sorted(leaf.shape)) for leaf in layers.values() if leaf.ndim == 2}

    def products(method: lj.Method) -> set[tuple[int, ...]]:
        tree = lj.attach(model.params, method, key=jax.random.key(0))
        trainable, frozen = lj.partition(tree, lj.trainable_mask(tree, method))
        apply = lj.adapt(model.apply)
        step = jax.grad(lambda trainable, frozen: (apply(lj.combine(trainable, frozen), ids) ** 2).sum())
        program = str(jax.make_jaxpr(step)(trainable, frozen))
        found = re.findall(r":f32\[([\d,]+)\] = dot_general", program)
        return {tuple(sorted(map(int, shape.split(",")))) for shape in found}

    for method in METHODS.values():
        assert not products(method) & weights, method
    assert products(lj.FullFineTune()) & weights


# What is refused.


@every_method
def test_a_foreign_tree_is_refused(method: lj.Method) -> None:
    with pytest.raises(ValueError, match=r"isn't the tree of a model of `lj.models`.*LoRA, DoRA"):
        lj.attach({"dense": {"kernel": jnp.ones((2, 2))}}, method, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lj.BottleneckAdapter(size=0), "`size` must be a positive integer, got 0"),
        (lambda: cast("Any", lj.BottleneckAdapter)(placement="before"), "`placement` must be one of"),
        (lambda: cast("Any", lj.BottleneckAdapter)(train_norms="yes"), "`train_norms` must be True, False or None"),
        (lambda: lj.PrefixTuning(length=True), "`length` must be a positive integer"),
        (lambda: lj.PrefixTuning(hidden=0), "`hidden` must be a positive integer"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adapter: adapter.pop("up"), r"`params` has an incomplete .*mlp/adapter: it lacks up/kernel, up/bias"),
        (
            lambda adapter: adapter["down"].update(kernel=jnp.ones((5, 3))),
            r"mlp/adapter/down/kernel must have shape \(\d+, 3\), got \(5, 3\)",
        ),
    ],
)
def test_a_broken_insertion_is_named(change: Any, message: str, folder: Any) -> None:
    model = encoder("bert", folder / "bert")
    tree = lj.merge_params(lj.attach(model.params, METHODS["pfeiffer"], key=jax.random.key(0)))
    change(tree["encoder"]["layers"]["1"]["mlp"]["adapter"])
    with pytest.raises(ValueError, match=message):
        model.apply(tree, IDS)


def test_a_part_of_a_reparametrized_prefix_has_no_values(folder: Any) -> None:
    model = encoder("bert", folder / "bert")
    tree = lj.attach(model.params, METHODS["prefix"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="lacks what the prefixes of all layers share"):
        lj.merge_params(tree["encoder"]["layers"]["1"])


@every_method
def test_folders_for_others_are_refused(method: lj.Method, folder: Any, tmp_path: Any) -> None:
    """Neither PEFT's format of weights nor a model of transformers has a place for it."""
    model = encoder("bert", folder / "bert")
    tree = trained(model.params, method)
    with pytest.raises(lj.AdapterError, match=r"keep the folder that `lj.save_adapter` writes"):
        lj.interop.export_peft(tmp_path / "peft", tree, method, names=model.names)
    with pytest.raises(ValueError, match="which neither the base nor transformers has"):
        lj.models.save_pretrained(tmp_path / "whole", model, lj.merge_params(tree), source=folder / "bert")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("encoder/layers/0/mlp/down/kernel", "and the base has a leaf there"),
        ("encoder/layers/0/mlp/down/kernel/deeper", "doesn't fit this base: .*only nested dicts take new leaves"),
        ("a/" * 5000 + "a", "inserts an array 5000 levels deep"),
    ],
)
def test_a_file_that_inserts_elsewhere_is_refused(place: str, message: str, folder: Any, tmp_path: Any) -> None:
    """A description is a claim: it may have been edited."""
    model, method = encoder("bert", folder / "bert"), METHODS["direct prefix"]
    path = lj.save_adapter(tmp_path, trained(model.params, method), method)
    first = next(name for name in json.loads((path / "lora_jax_adapter.json").read_text())["adapted"])
    tensors = read_safetensors(path / "adapter.safetensors")
    write_safetensors(
        path / "adapter.safetensors",
        {name.replace(first, place): np.array(array) for name, array in tensors.items()},
    )
    description = (path / "lora_jax_adapter.json").read_text().replace(first, place)
    description = json.loads(description) | {"sha256": sha256_file(path / "adapter.safetensors")}
    (path / "lora_jax_adapter.json").write_text(json.dumps(description))
    with pytest.raises(lj.AdapterError, match=message):
        lj.load_adapter(path, model.params)


@every_method
def test_an_adapter_of_another_base_is_refused(method: lj.Method, folder: Any, tmp_path: Any) -> None:
    model, other = encoder("bert", folder / "bert"), encoder("distilbert", folder / "distilbert")
    path = lj.save_adapter(tmp_path, trained(model.params, method), method)
    with pytest.raises(lj.AdapterError):
        lj.load_adapter(path, other.params)
