"""What PEFT's own tests hold its adapters to, held here on every bundled family, in the tree and on disk.

A start changes nothing; merged equals adapted; without its adapter a model is the base; training moves the adapter and
nothing else; what is saved is what is loaded; and no tensor's name has an adapter's name in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.files import read_safetensors_header
from lora_jax.paths import leaves_by_path
from tests import tiny_decoders, tiny_encoders

IDS = np.random.default_rng(0).integers(5, 90, (3, 6))
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
# Of families that share a file and a table of names, one.
FORMS = [("bert", False), ("roberta", False), ("distilbert", False), ("gpt2", False), ("gpt2", True), ("qwen3", True)]


def load(folder: Path, family: str, *, scan: bool) -> models.Model:
    if family in tiny_decoders.FAMILIES:
        layers: dict[str, Any] = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
        tiny_decoders.write_tiny_decoder(folder, family, **layers)
        return models.load(folder, task="causal-lm", scan_layers=scan)
    return models.load(tiny_encoders.write_tiny(folder, family, layers=1), task="classification", num_labels=3)


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("family", "scan"), FORMS)
def test_an_adapter_is_beside_the_model(tmp_path: Path, family: str, scan: bool):
    model = load(tmp_path / "base", family, scan=scan)
    method = lj.LoRA(rank=2, alpha=4, targets="all-linear", also_train=("norm",))
    uses = lj.trace_weights(model.apply, model.params, IDS, MASK)
    start = lj.attach(model.params, method, key=jax.random.key(0), uses=uses)
    trainable, frozen = lj.partition(start, lj.trainable_mask(start, method))
    tx = lj.make_optimizer(optax.sgd(0.5), lj.label_params(start, method))
    shape = jax.eval_shape(model.apply, model.params, IDS, MASK).shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape))

    @jax.jit
    def step(trainable: Any) -> tuple[jax.Array, Any]:
        def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
            apply = lj.adapt(model.apply, on_materialize="error")
            logits = apply(lj.combine(trainable, frozen), IDS, MASK)
            return (logits * weights).mean(), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, _ = tx.update(grads, tx.init(trainable), trainable)
        return logits, optax.apply_updates(trainable, updates)

    plain = jax.jit(model.apply)
    base = plain(model.params, IDS, MASK)
    logits, trainable = step(trainable)
    np.testing.assert_allclose(logits, base, atol=1e-5)  # the start
    _, trainable = step(trainable)  # `a` moves when `b` isn't zero any more
    logits, _ = step(trainable)
    assert np.abs(logits - base).max() > 1e-3

    params = lj.combine(trainable, frozen)
    np.testing.assert_allclose(plain(lj.merge_params(params), IDS, MASK), logits, atol=1e-5)
    before, after = leaves_by_path(start), leaves_by_path(params)
    moved = {path for path in before if not same(before[path], after[path])}
    labels = leaves_by_path(lj.label_params(params, method))
    assert moved == {path for path, label in labels.items() if set(jax.tree.leaves(label)) != {"frozen"}}
    bare = leaves_by_path(lj.detach(params))
    assert all(bare[path] is leaf for path, leaf in leaves_by_path(model.params).items() if labels[path] != "head")

    folder = lj.save_adapter(tmp_path / "own", params, method)
    assert same(lj.load_adapter(folder, model.params).params, params)
    folder = lj.interop.export_peft(tmp_path / "peft", params, method, names=model.names)
    assert same(lj.interop.import_peft(folder, model.params, names=model.names).params, params)
    modules = {module for value in model.names.values() for module in ((value,) if isinstance(value, str) else value)}
    for name in read_safetensors_header(folder / "adapter_model.safetensors"):
        body, found, factor = name.removeprefix("base_model.model.").partition(".lora_")
        module = body if found else body.rpartition(".")[0].removesuffix(".base_layer")
        assert module in modules
        assert factor in ("", "A.weight", "B.weight")


@pytest.mark.parametrize(("family", "scan"), [(family, family != "gpt2") for family in tiny_decoders.FAMILIES])
def test_generation_goes_through_the_same_function(tmp_path: Path, family: str, scan: bool):
    """An imported adapter, nothing materialized: the tokens of the merged model, and not those of the base."""
    model = load(tmp_path / "base", family, scan=scan)
    method = lj.LoRA(rank=2, alpha=8, targets="all-linear")
    uses = lj.trace_weights(model.apply, model.params, IDS)
    params = lj.attach(model.params, method, key=jax.random.key(0), uses=uses)
    rng, mask = np.random.default_rng(2), lj.trainable_mask(params, method)
    params = jax.tree.map(lambda x, moves: x + rng.normal(0, 0.3, x.shape) if moves else x, params, mask)
    folder = lj.interop.export_peft(tmp_path / "peft", params, method, dtype=jnp.float32, names=model.names)
    params = lj.interop.import_peft(folder, model.params, names=model.names).params

    apply = lj.adapt(model.apply, on_materialize="error")
    found, merged, base = (
        np.asarray(models.generate(function, tree, IDS, MASK[:, ::-1], max_new_tokens=5).tokens)
        for function, tree in ((apply, params), (model, lj.merge_params(params)), (model, model.params))
    )
    np.testing.assert_array_equal(found, merged)
    assert (found != base).any()
