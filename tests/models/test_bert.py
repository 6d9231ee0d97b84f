"""What the encoder computes, apart from its equality to transformers (tests/parity)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.families import bert
from lora_jax.models.model import skeleton
from lora_jax.models.nn import attention, encoder, layers
from lora_jax.paths import leaf_paths, leaves_by_path

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
}
TINY = models.BertConfig(**SIZES, hidden_dropout_prob=0.2)
BASE = models.BertConfig(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    type_vocab_size=2,
)
LARGE = models.BertConfig(
    vocab_size=30522,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=512,
    type_vocab_size=2,
)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_params(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def tiny(task: Any = None, **options: Any) -> tuple[Any, Any]:
    apply, shapes = skeleton(TINY, task=task, **options)
    return jax.jit(apply), random_params(shapes)


IDS = np.array([[2, 7, 9, 3, 0, 0], [2, 8, 3, 0, 0, 0], [2, 4, 5, 6, 7, 3]])
MASK = (IDS > 0).astype(np.int32)


@pytest.mark.parametrize(("config", "biases", "percent"), [(BASE, 102_912, 0.09), (LARGE, 272_384, 0.08)])
def test_the_papers_count_of_biases(config: models.BertConfig, biases: int, percent: float):
    """Every bias but the head's (BitFit, ACL 2022, section 4), from shapes alone."""
    leaves = leaves_by_path(skeleton(config, task="classification", num_labels=2).params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items() if not path.startswith("classifier/")}
    found = sum(size for path, size in sizes.items() if path.endswith("/bias"))
    assert found == biases
    assert round(100 * found / sum(sizes.values()), 2) == percent


def test_the_tree_has_the_canonical_names():
    block = ["attention/key", "attention/norm", "attention/output", "attention/query", "attention/value"]
    block += ["mlp/down", "mlp/norm", "mlp/up"]
    modules = [f"encoder/layers/{layer}/{name}" for layer in (0, 1) for name in block]
    modules += ["embeddings/norm", "pooler", "classifier"]
    paths = {f"embeddings/{name}/embedding" for name in ("word", "position", "token_type")}
    paths |= {f"{module}/bias" for module in modules}
    paths |= {f"{module}/{'scale' if module.endswith('norm') else 'kernel'}" for module in modules}
    shapes = skeleton(TINY, task="classification", num_labels=3).params
    assert set(leaf_paths(shapes)) == paths
    assert all(type(key) is str for path, _ in jax.tree_util.tree_leaves_with_path(shapes) for key in _keys(path))
    assert leaves_by_path(shapes)["encoder/layers/0/mlp/up/kernel"].shape == (16, 32)  # (in, out)


def _keys(path: Any) -> list[Any]:
    return [entry.key for entry in path]


def test_there_is_no_leaf_without_use():
    """Every leaf of every variant has a gradient, but the key biases, whose gradient softmax makes zero."""
    for task, pooling in [(None, "first"), ("classification", "first"), ("regression", "mean")]:
        apply, params = tiny(task, num_labels=3, pooling=pooling)
        weights = np.random.default_rng(1).normal(size=jax.eval_shape(apply, params, IDS).shape).astype(np.float32)
        types = (np.arange(6) > 2).astype(np.int32) * np.ones_like(IDS)
        grads = jax.jit(jax.grad(lambda p, f=apply, w=weights, t=types: (f(p, IDS, MASK, t) * w).sum()))(params)
        for path, grad in leaves_by_path(grads).items():
            assert (jnp.abs(grad).max() > 1e-4) != path.endswith("key/bias"), (task, path)


def test_shapes_and_dtypes():
    hidden, params = tiny()
    assert jax.eval_shape(hidden, params, IDS).shape == (3, 6, 16)
    for dtype in (jnp.float32, jnp.bfloat16):
        for task, shape in (("classification", (3, 5)), ("regression", (3,))):
            apply, shapes = skeleton(TINY, task=task, num_labels=5, dtype=jnp.dtype(dtype))
            assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}
            result = jax.eval_shape(apply, shapes, IDS, MASK)
            assert (result.shape, result.dtype) == (shape, jnp.float32)


def test_bfloat16_is_near_float32():
    apply, params = tiny("classification", num_labels=3)
    brain = jax.jit(skeleton(TINY, task="classification", num_labels=3, dtype=jnp.dtype(jnp.bfloat16)).apply)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = apply(params, IDS, MASK)
    np.testing.assert_allclose(brain(halved, IDS, MASK), exact, atol=0.03 * float(jnp.abs(exact).max()))
    # A leaf kept in float32 for training is computed with in bfloat16, and its gradient is float32.
    mixed = {**halved, "classifier": params["classifier"]}
    np.testing.assert_allclose(brain(mixed, IDS, MASK), exact, atol=0.03 * float(jnp.abs(exact).max()))
    grads = jax.grad(lambda p: brain(p, IDS, MASK).sum())(mixed)
    assert grads["classifier"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("options", [{}, {"task": "classification"}, {"task": "classification", "pooling": "mean"}])
def test_padding_changes_nothing(options: dict[str, Any]):
    apply, params = tiny(**options)
    full = apply(params, IDS, MASK)
    for row in (0, 2):
        length = MASK[row].sum()
        alone = apply(params, IDS[row : row + 1, :length])[0]
        mine = full[row] if options else full[row, :length]
        np.testing.assert_allclose(mine, alone, atol=2e-6)
    np.testing.assert_array_equal(apply(params, IDS, MASK.astype(bool)), full)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_of_nothing_but_padding_is_finite_and_so_is_its_gradient(pooling: Any, dtype: str):
    apply, shapes = skeleton(TINY, task="classification", num_labels=2, pooling=pooling, dtype=jnp.dtype(dtype))
    params = random_params(shapes)
    value, grads = jax.jit(jax.value_and_grad(lambda p: apply(p, IDS, np.zeros_like(MASK)).sum()))(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


def test_the_mean_is_over_tokens_that_are_no_padding():
    hidden, _ = tiny()
    apply, params = tiny("regression", pooling="mean")
    states = np.asarray(hidden({name: params[name] for name in ("embeddings", "encoder")}, IDS, MASK))
    means = np.stack([row[mask > 0].mean(0) for row, mask in zip(states, MASK, strict=True)])
    expected = means @ np.asarray(params["classifier"]["kernel"])[:, 0] + np.asarray(params["classifier"]["bias"])
    np.testing.assert_allclose(apply(params, IDS, MASK), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ dropout


def test_dropout_is_off_without_a_key_and_is_a_function_of_the_key():
    apply, params = tiny("classification", num_labels=3)
    run = functools.partial(apply, params, IDS, MASK)
    plain = apply(params, IDS, MASK)
    first, again, second = (run(dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(apply(params, IDS, MASK), plain)
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.abs(first - plain).max() > 1e-3


def test_dropout_draws_anew_at_every_layer_and_use(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Any, float]] = []

    def record(x: jax.Array, rate: float, key: Any) -> jax.Array:
        seen.append((tuple(np.asarray(jax.random.key_data(key))), rate))
        return x

    for module in (attention, layers, encoder, bert):
        monkeypatch.setattr(module, "dropout", record)
    config = models.BertConfig(
        **SIZES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout=0.4
    )
    apply, shapes = skeleton(config, task="classification", num_labels=2)
    apply(random_params(shapes), IDS, MASK, dropout_key=jax.random.key(0))
    # embeddings; probabilities, attention output and MLP output of two layers; classifier
    assert len({key for key, _ in seen}) == len(seen) == 1 + 2 * 3 + 1
    assert [rate for _, rate in seen] == [0.2, 0.3, 0.2, 0.2, 0.3, 0.2, 0.2, 0.4]


def test_no_rate_no_dropout():
    config = models.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0)
    apply, shapes = skeleton(config)
    params = random_params(shapes)
    np.testing.assert_array_equal(apply(params, IDS, dropout_key=jax.random.key(0)), apply(params, IDS))


def test_a_seed_is_no_dropout_key():
    apply, shapes = skeleton(models.BertConfig(**SIZES))
    with pytest.raises(TypeError, match="`dropout_key` must be one random key, such as"):
        apply(random_params(shapes), IDS, dropout_key=0)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(400, 251), (1,)])
def test_dropout_keeps_the_mean_and_drops_the_rate(rate: float, shape: tuple[int, ...]):
    x = jnp.ones(shape)
    result = layers.dropout(x, rate, jax.random.key(0))
    assert result.shape == shape
    values = np.unique(np.asarray(result))
    assert len(values) <= 2
    if x.size > 1:
        dropped = float((result == 0).mean())
        assert abs(dropped - rate) < 1 / 256 + 3 * math.sqrt(rate * (1 - rate) / x.size)
        assert abs(float(result.mean()) - 1) < 5 * math.sqrt(dropped / (1 - dropped) / x.size)
        # Bytes of one random word are independent.
        assert abs(float(np.corrcoef(result.ravel()[:-1:4], result.ravel()[1::4])[0, 1])) < 0.03


# --------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, r"`hidden_size` must be a positive integer, got 0"),
        ({"vocab_size": -3}, r"`vocab_size` must be a positive integer, got -3"),
        ({"vocab_size": 10**30}, r"`vocab_size` must be a positive integer, got 10"),
        ({"num_hidden_layers": 2.0}, r"`num_hidden_layers` must be a positive integer, got 2.0"),
        ({"num_hidden_layers": True}, r"`num_hidden_layers` must be a positive integer, got True"),
        ({"num_attention_heads": 3}, r"`hidden_size` \(16\) must be a multiple of `num_attention_heads` \(3\)"),
        ({"hidden_act": "mish"}, r"`hidden_act` must be one of gelu, .*, got 'mish'"),
        ({"hidden_dropout_prob": 1.0}, r"`hidden_dropout_prob` must be a number of at least 0 and below 1, got 1.0"),
        ({"attention_probs_dropout_prob": None}, r"`attention_probs_dropout_prob` must be a number"),
        ({"classifier_dropout": "0.1"}, r"`classifier_dropout` must be a number"),
        ({"layer_norm_eps": 0.0}, r"`layer_norm_eps` must be a positive number"),
        ({"initializer_range": float("nan")}, r"`initializer_range` must be a positive number"),
        ({"model_type": "roberta"}, r"`model_type` must be one of 'bert', got 'roberta'.*lora_jax.attach"),
        ({"model_type": None}, r"`model_type` must be one of 'bert', got None"),
        (
            {"position_embedding_type": "relative_key"},
            r"`position_embedding_type` must be 'absolute', got 'relative_key",
        ),
        ({"is_decoder": True}, r"`is_decoder` must be false: only encoders"),
        ({"add_cross_attention": True}, r"`add_cross_attention` must be false"),
    ],
)
def test_a_bad_config_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        models.BertConfig.from_dict({"model_type": "bert", **SIZES, **change})


def test_a_config_without_a_size_is_refused():
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "hidden_size")}
    with pytest.raises(ValueError, match="the configuration lacks `vocab_size`, `hidden_size`"):
        models.BertConfig.from_dict({"model_type": "bert", **sizes})
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        models.BertConfig.from_dict([])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS[0],), r"`input_ids` must be \(batch, time\) integers, got int\d+ of shape \(6,\)"),
        ((IDS.astype(np.float32),), r"`input_ids` must be \(batch, time\) integers, got float32"),
        ((np.zeros((1, 13), int),), r"at most 12 tokens a row, .*got 13: truncate the texts"),
        ((IDS, MASK[:2]), r"`attention_mask` must have the shape of `input_ids`, \(3, 6\), got \(2, 6\)"),
        ((IDS, None, MASK[:, :2]), r"`token_type_ids` must have the shape .*, got \(3, 2\)"),
    ],
)
def test_bad_inputs_are_refused(inputs: tuple[Any, ...], message: str):
    apply, params = tiny()
    with pytest.raises(ValueError, match=message):
        apply(params, *inputs)


def test_another_tree_is_refused():
    apply, params = tiny("classification", num_labels=2)
    with pytest.raises(ValueError, match=r"isn't this model's tree: missing pooler/bias, pooler/kernel; unexpected x"):
        apply({**{name: params[name] for name in params if name != "pooler"}, "x": jnp.ones(2)}, IDS)


def test_a_token_outside_the_vocabulary_shows():
    apply, params = tiny()
    assert jnp.isnan(apply(params, np.array([[50]]))).all()


# ---------------------------------------------------------------------------------------------------------- transforms


def test_equal_models_share_what_jit_compiled():
    assert skeleton(TINY, task="regression") is skeleton(
        models.BertConfig(**SIZES, hidden_dropout_prob=0.2), task="regression"
    )


def test_apply_is_pure_under_vmap_and_remat():
    apply, params = tiny("regression")
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.jit(jax.vmap(lambda p: apply(p, IDS, MASK)))(two)
    np.testing.assert_allclose(both[0], apply(params, IDS, MASK), atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: apply(p, IDS, MASK).sum()))(params)
    again = jax.jit(jax.grad(jax.checkpoint(lambda p: apply(p, IDS, MASK).sum())))(params)
    for path, grad in leaves_by_path(grads).items():
        np.testing.assert_allclose(leaves_by_path(again)[path], grad, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("remat", ["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"])
def test_rematerialization_gives_the_same_and_keeps_less(remat: Any) -> None:
    """Values and gradients of the factors, with dropout; and what waits from the forward to the backward pass."""
    key = jax.random.key(3)

    def parts(remat: Any) -> tuple[Any, Any]:
        apply, shapes = skeleton(TINY, task="classification", num_labels=3, remat=remat)
        method = lj.LoRA(rank=2, alpha=2, targets="all-linear", also_train=("classifier",))
        params = lj.attach(random_params(shapes), method, key=jax.random.key(0))
        trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
        adapted = lj.adapt(apply, on_materialize="error")
        return trainable, lambda tree: adapted(lj.combine(tree, frozen), IDS, MASK, dropout_key=key).sum()

    def value_gradient_and_residuals(remat: Any) -> tuple[Any, int]:
        trainable, loss = parts(remat)
        value, backward = jax.vjp(loss, trainable)
        kept = {id(leaf): leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size")}
        return (value, backward(jnp.ones(()))), sum(kept.values())

    (plain, plain_kept), (again, again_kept) = value_gradient_and_residuals(None), value_gradient_and_residuals(remat)
    chex.assert_trees_all_close(again, plain, rtol=1e-4, atol=1e-5)
    assert again_kept < plain_kept
