"""What the decoders compute, and the trees they have; equality to transformers is in tests/parity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.families import gpt2
from lora_jax.models.families.bundled import config_from_dict
from lora_jax.models.model import skeleton
from lora_jax.models.nn import attention
from lora_jax.models.nn.layers import RMSNorm
from lora_jax.paths import leaf_paths, leaves_by_path
from tests.jaxprs import equations
from tests.tiny_decoders import FAMILIES, VOCABULARY, settings

GPT2_SMALL = models.Gpt2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
LLAMA_2_7B = models.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=11008,
    max_position_embeddings=4096,
)
MISTRAL_7B = models.MistralConfig(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336
)
QWEN_SIZES: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24}
QWEN2_HALF_B = models.Qwen2Config(
    **QWEN_SIZES,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    tie_word_embeddings=True,
)
QWEN3_06B = models.Qwen3Config(
    **{**QWEN_SIZES, "hidden_size": 1024, "num_hidden_layers": 28},
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=3072,
    tie_word_embeddings=True,
)
every_family = pytest.mark.parametrize("family", FAMILIES)
both_forms = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
# Each family in one form or both, since both are compared beside.
some_forms = pytest.mark.parametrize(
    ("family", "scan"),
    [("gpt2", False), ("llama", True), ("mistral", False), ("qwen2", False), ("qwen2", True), ("qwen3", True)],
)

IDS = np.random.default_rng(3).integers(0, VOCABULARY, (2, 9))
RIGHT = np.array([[1] * 9, [1] * 5 + [0] * 4])


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_params(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        if path.endswith("scale"):
            return jnp.asarray(rng.normal(1, 0.2, leaf.shape), leaf.dtype)
        fan_in = leaf.shape[-2] if path.endswith("kernel") else 4
        return jnp.asarray(rng.normal(0, 1.5 * fan_in**-0.5, leaf.shape), leaf.dtype)

    leaves = leaves_by_path(shapes)
    return jax.tree.unflatten(jax.tree.structure(shapes), [draw(path, leaf) for path, leaf in leaves.items()])


def tiny(family: str, task: Any = "causal-lm", *, scan: bool = False, seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """The apply function, jitted with its static arguments, and random parameters."""
    apply, shapes = skeleton(config_from_dict(settings(family, **config)), task=task, scan_layers=scan)
    params = random_params(skeleton(config_from_dict(settings(family, **config)), task=task).params, seed)
    params = models.stack_layers(params) if scan else params
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    return jax.jit(apply, static_argnames=("last_only",)), params


# ------------------------------------------------------------------------------------------------------------ the trees


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (GPT2_SMALL, 124_439_808),
        (LLAMA_2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN2_HALF_B, 494_032_768),
        (QWEN3_06B, 596_049_920),
    ],
)
@both_forms
def test_the_sizes_are_the_published_models(config: models.ModelConfig, total: int, scan: bool):
    shapes = skeleton(config, task="causal-lm", scan_layers=scan).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total


@every_family
@both_forms
def test_the_tree_has_the_canonical_names(family: str, scan: bool):
    kernels = ["attention/output", "mlp/down", "mlp/up"]
    kernels += ["attention/query_key_value"] if family == "gpt2" else ["mlp/gate"]
    kernels += [] if family == "gpt2" else ["attention/query", "attention/key", "attention/value"]
    norms = ["attention/norm", "mlp/norm"] + ["attention/query_norm", "attention/key_norm"] * (family == "qwen3")
    leaves = {f"{name}/kernel" for name in kernels} | {f"{name}/scale" for name in norms}
    if family == "gpt2":
        leaves |= {f"{name}/bias" for name in kernels + norms}
    if family == "qwen2":
        leaves |= {f"attention/{name}/bias" for name in ("query", "key", "value")}
    layers = ["layers"] if scan else [f"layers/{number}" for number in range(3)]
    paths = {f"{layer}/{leaf}" for layer in layers for leaf in leaves}
    paths |= {"embeddings/word/embedding", "norm/scale"}
    paths |= {"embeddings/position/embedding", "norm/bias"} if family == "gpt2" else {"lm_head/kernel"}
    shapes = skeleton(config_from_dict(settings(family)), task="causal-lm", scan_layers=scan).params
    assert set(leaf_paths(shapes)) == paths


@every_family
def test_a_tied_head_is_no_leaf_and_hidden_states_have_none(family: str):
    for tied in (False, True):
        config = config_from_dict(settings(family, tie_word_embeddings=tied))
        assert ("lm_head" in skeleton(config, task="causal-lm").params) != tied
        assert "lm_head" not in skeleton(config).params


def test_lora_on_gpt2_has_the_papers_count():
    """On the fused weight: 24 · 4 · (1024 + 3 · 1024); the paper's query and value apart have 0.35 M."""
    medium = models.Gpt2Config(vocab_size=50257, n_positions=1024, n_embd=1024, n_layer=24, n_head=16)
    method = lj.LoRA(rank=4, alpha=32, targets=("query_key_value",))
    shapes = skeleton(medium, task="causal-lm").params
    tree = jax.eval_shape(lambda: lj.attach(shapes, method, key=jax.random.key(0)))
    assert lj.count_params(tree, lj.label_params(tree, method)).trainable == 24 * 4 * (1024 + 3 * 1024)


@pytest.mark.parametrize(("family", "count"), [("gpt2", 4), ("llama", 7), ("qwen3", 7)])
def test_presets_know_the_layers(family: str, count: int):
    shapes = skeleton(config_from_dict(settings(family)), task="causal-lm").params
    leaves = leaves_by_path(shapes)
    assert len(lj.LoRA(rank=1, alpha=1, targets="all-linear").selected(leaves)) == 3 * count
    attention = lj.LoRA(rank=1, alpha=1, targets="attention").selected(leaves)
    assert len(attention) == 3 * (count - (2 if family == "gpt2" else 3))
    assert not any(path.startswith(("embeddings", "lm_head")) for path in attention)


@pytest.mark.parametrize("scan", [False, True])
@every_family
def test_presets_leave_no_weight_of_a_layer_over(family: str, scan: bool):
    """Nor is anything said to be left out, by LoRA's presets or by BitFit."""
    shapes = skeleton(config_from_dict(settings(family)), task="causal-lm", scan_layers=scan).params
    leaves = leaves_by_path(shapes)
    parts = {name: lj.LoRA(rank=1, alpha=1, targets=name).selected(leaves) for name in ("attention", "mlp")}
    taken = lj.LoRA(rank=1, alpha=1, targets="all-linear").selected(leaves)
    assert sorted(taken) == sorted(parts["attention"] + parts["mlp"])
    kernels = {path for path in leaves if path.endswith("/kernel")}
    assert kernels - set(taken) <= {"lm_head/kernel"}
    biases = [path for path in leaves if path.endswith("/bias")]
    if biases:
        labels = leaves_by_path(lj.label_params(shapes, lj.BitFit()))
        assert [path for path, label in labels.items() if label == "bias"] == biases


def test_bitfit_on_gpt2_trains_every_bias():
    shapes = skeleton(GPT2_SMALL, task="causal-lm").params
    method = lj.BitFit()
    # A layer: 2 norms, 3 d of query, key and value, d, 4 d and d; and the last norm.
    assert lj.count_params(shapes, lj.label_params(shapes, method)).trainable == 12 * (2 + 3 + 1 + 4 + 1) * 768 + 768


# --------------------------------------------------------------------------------------------------------- what it sees


@some_forms
def test_a_token_changes_nothing_before_it(family: str, scan: bool):
    apply, params = tiny(family, scan=scan)
    other = IDS.copy()
    other[:, 5] = (other[:, 5] + 1) % VOCABULARY
    a, b = np.asarray(apply(params, IDS)), np.asarray(apply(params, other))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (np.abs(a - b)[:, 5].max(-1) > 1e-2).all()
    assert np.abs(a - b)[:, 6:].max() > 1e-3


@every_family
def test_padding_on_the_right_changes_nothing(family: str):
    apply, params = tiny(family)
    full = apply(params, IDS, RIGHT)
    np.testing.assert_allclose(full[1, :5], apply(params, IDS[1:, :5])[0], atol=2e-5)


@every_family
def test_padding_on_the_left_changes_nothing_where_positions_are_the_tokens_own(family: str):
    apply, params = tiny(family)
    left = np.concatenate([IDS[:, :3] * 0, IDS[:, :5]], axis=1)
    mask = np.array([[0] * 3 + [1] * 5] * 2)
    positions = np.array([[0, 0, 0, 0, 1, 2, 3, 4]] * 2)
    found = apply(params, left, mask, position_ids=positions)[:, 3:]
    np.testing.assert_allclose(found, apply(params, IDS[:, :5]), atol=2e-5)
    counted = apply(params, left, mask)[:, 3:]  # places, padding too: only turns between tokens matter to RoPE
    assert (np.abs(counted - found).max() < 1e-4) == (family != "gpt2")


def test_a_sliding_window_ends():
    """Three layers with a window of 5 reach 12 tokens back; the last layer alone reaches 4."""
    apply, params = tiny("mistral")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, 20))
    other = ids.copy()
    other[0, 0] = (other[0, 0] + 1) % VOCABULARY
    change = np.abs(np.asarray(apply(params, ids) - apply(params, other)))[0].max(-1)
    assert (change[:13] > 0).all()
    assert (change[13:] == 0).all()
    full, _ = tiny("mistral", sliding_window=None)
    assert np.abs(np.asarray(full(params, ids) - full(params, other)))[0, 13:].max() > 1e-4


@pytest.mark.parametrize(
    ("entries", "windows"),
    [
        ({}, (None, 4, 4)),
        ({"use_sliding_window": False}, (None, None, None)),
        ({"max_window_layers": 0}, (4, 4, 4)),
        ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, (4, None, 4)),
    ],
)
def test_qwens_layers_have_their_windows(entries: dict[str, Any], windows: tuple[Any, ...]):
    config = config_from_dict(settings("qwen2", **entries))
    assert isinstance(config, models.Qwen2Config)
    assert config.windows == windows


def test_a_row_of_nothing_but_padding_is_finite_and_so_is_its_gradient():
    apply, params = tiny("llama")
    mask = np.zeros_like(IDS)
    value, grads = jax.jit(jax.value_and_grad(lambda p: apply(p, IDS, mask).sum()))(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


@every_family
def test_there_is_no_leaf_without_use(family: str):
    apply, params = tiny(family)
    weights = np.random.default_rng(1).normal(size=(2, 9, VOCABULARY)).astype(np.float32)
    grads = jax.jit(jax.grad(lambda p: (apply(p, IDS, RIGHT) * weights).sum()))(params)
    for path, grad in leaves_by_path(grads).items():
        assert jnp.abs(grad).max() > 1e-4, path


def test_gpt2_divides_scores_by_the_layers_number():
    apply, params = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    plain, _ = tiny("gpt2")
    scaled = jax.tree.map(lambda leaf: leaf, params)
    for number in ("1", "2"):
        fused = scaled["layers"][number]["attention"]["query_key_value"]
        for name in ("kernel", "bias"):
            array = np.asarray(fused[name]).copy()
            array[..., :16] /= int(number) + 1
            fused[name] = jnp.asarray(array)
    np.testing.assert_allclose(apply(params, IDS), plain(scaled, IDS), atol=2e-5)
    assert np.abs(np.asarray(apply(params, IDS) - plain(params, IDS))).max() > 1e-2


# ---------------------------------------------------------------------------------------------------- scanned, unrolled


@pytest.mark.parametrize(
    ("family", "remat"), [("gpt2", None), ("llama", "dots_saveable"), ("qwen2", "nothing_saveable")]
)
def test_scanned_is_unrolled(family: str, remat: Any):
    """Values, gradients and dropout, with the same key; Qwen2 has windows in some of the layers only."""
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3} if family == "gpt2" else {}
    dropout = dropout or {"attention_dropout": 0.3}
    extra = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    config = config_from_dict(settings(family, **dropout, **extra))
    unrolled, shapes = skeleton(config, task="causal-lm", remat=remat)
    scanned, _ = skeleton(config, task="causal-lm", remat=remat, scan_layers=True)
    params = random_params(shapes)

    def loss(apply: Any, params: Any) -> Any:
        return (apply(params, IDS, RIGHT, dropout_key=jax.random.key(1)) ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(unrolled, p)))(params)
    found, theirs = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p)))(models.stack_layers(params))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    theirs = leaves_by_path(models.unstack_layers(theirs))
    for path, grad in leaves_by_path(grads).items():
        np.testing.assert_allclose(theirs[path], grad, atol=1e-5 + 1e-4 * np.abs(grad).max(), err_msg=path)
    plain = jax.jit(unrolled)(params, IDS, RIGHT)
    np.testing.assert_allclose(jax.jit(scanned)(models.stack_layers(params), IDS, RIGHT), plain, atol=2e-5)


def test_a_scanned_program_does_not_grow_with_depth():
    def count(layers: int, scan: bool) -> int:
        config = config_from_dict(settings("llama", num_hidden_layers=layers))
        apply, shapes = skeleton(config, task="causal-lm", scan_layers=scan)
        return sum(1 for _ in equations(jax.make_jaxpr(apply)(shapes, IDS).jaxpr))

    assert count(2, True) == count(7, True)
    assert count(7, False) > count(2, False)


def test_trees_go_both_ways():
    _, params = tiny("qwen3")
    back = models.unstack_layers(models.stack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for path, leaf in leaves_by_path(back).items():
        np.testing.assert_array_equal(leaf, leaves_by_path(params)[path], err_msg=path)


def test_ten_layers_keep_their_order():
    tree = {"layers": {str(number): {"kernel": jnp.full((1,), number)} for number in range(11)}}
    assert models.stack_layers(tree)["layers"]["kernel"][:, 0].tolist() == list(range(11))


def test_an_adapter_goes_both_ways():
    """Factors that were trained in a scan, in a model without: the same logits, and the same trees again."""
    apply, _ = tiny("llama")
    scanned, stacked = tiny("llama", scan=True)
    uses = lj.trace_weights(scanned, stacked, IDS)
    assert uses["layers/attention/query/kernel"].labels == "sio"
    method = lj.LoRA(rank=2, alpha=4, targets="all-linear")
    adapted = shaken(lj.attach(stacked, method, key=jax.random.key(0), uses=uses), method)
    apart = models.unstack_layers(adapted)
    assert apart["layers"]["2"]["mlp"]["gate"]["kernel"].axes == "io"
    one, other = (jax.jit(lj.adapt(function, on_materialize="error")) for function in (apply, scanned))
    np.testing.assert_allclose(one(apart, IDS), other(adapted, IDS), atol=2e-5)
    again = models.stack_layers(apart)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True))


@pytest.mark.parametrize(
    ("function", "tree", "message"),
    [
        (models.stack_layers, {"norm": jnp.ones(1)}, r"must have one subtree per layer below \"layers\""),
        (models.stack_layers, {"layers": {"kernel": jnp.ones((2, 1))}}, r"got stacked layers"),
        (
            models.stack_layers,
            {"layers": {"0": {"a": jnp.ones(2)}, "1": {"a": jnp.ones(3)}}},
            r"layers that can't be stacked, as they differ",
        ),
        (
            models.stack_layers,
            {"layers": {"0": {"a": jnp.ones(2)}, "1": {"b": jnp.ones(2)}}},
            r"layers that can't be stacked, as they differ",
        ),
        (models.unstack_layers, {"layers": {"0": {"a": jnp.ones(2)}}}, r"got one subtree per layer"),
        (models.unstack_layers, {}, r"must have its layers stacked below \"layers\""),
        (
            models.unstack_layers,
            {"layers": {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}},
            r"same number of layers in each stacked leaf, got \[2, 3\]",
        ),
    ],
)
def test_trees_that_cannot_be_turned_are_refused(function: Any, tree: Any, message: str):
    with pytest.raises(ValueError, match=message):
        function(tree)


# -------------------------------------------------------------------------------------------------------------- adapted


def shaken(params: Any, method: Any) -> Any:
    """Factors far from zero."""
    rng = np.random.default_rng(2)
    mask = lj.trainable_mask(params, method)
    return jax.tree.map(lambda x, own: x + rng.normal(0, 0.3, x.shape).astype(np.float32) if own else x, params, mask)


@some_forms
def test_adapted_is_merged_and_nothing_is_materialized(family: str, scan: bool):
    """Factors at every weight, the tables and the head (tied in GPT-2) too."""
    apply, params = tiny(family, scan=scan)
    uses = lj.trace_weights(apply, params, IDS)
    targets = [f"/{path}" for path in leaves_by_path(params) if path.endswith(("kernel", "embedding"))]
    assert all(uses[target[1:]].labels in ("sio", "io", "oi") for target in targets)
    method = lj.LoRA(rank=1, alpha=2, targets=targets)
    params = shaken(lj.attach(params, method, key=jax.random.key(0), uses=uses), method)
    found = jax.jit(lj.adapt(apply, on_materialize="error"))(params, IDS, RIGHT)
    np.testing.assert_allclose(found, apply(lj.merge_params(params), IDS, RIGHT), atol=2e-4)
    assert jnp.abs(found - apply(lj.detach(params), IDS, RIGHT)).max() > 0.1


# ---------------------------------------------------------------------------------------------------------------- cache


@some_forms
def test_decoding_with_a_cache_is_the_full_forward(family: str, scan: bool):
    """In pieces of 4, 1, 3 and 1 tokens, with padding on the left, past the windows of Mistral (5) and Qwen2 (4)."""
    apply, params = tiny(family, scan=scan)
    mask = np.array([[1] * 9, [0] * 3 + [1] * 6])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    whole = np.asarray(apply(params, IDS, mask, position_ids=positions))
    first = jax.jit(lambda p, *args, **kwargs: skeleton_apply(family, scan)(p, *args, cache=12, **kwargs))
    logits, cache = first(params, IDS[:, :4], mask[:, :4], position_ids=positions[:, :4])
    pieces = [logits]
    for begin, end in ((4, 5), (5, 8), (8, 9)):
        logits, cache = apply(params, IDS[:, begin:end], position_ids=positions[:, begin:end], cache=cache)
        pieces.append(logits)
    found = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(found[mask > 0], whole[mask > 0], atol=5e-5)
    assert int(cache.used) == 9
    np.testing.assert_array_equal(cache.mask, np.concatenate([mask, np.zeros((2, 3))], axis=1))


def skeleton_apply(family: str, scan: bool = False) -> Any:
    return skeleton(config_from_dict(settings(family)), task="causal-lm", scan_layers=scan).apply


def test_positions_follow_the_cache():
    apply, params = tiny("gpt2")
    _, cache = jax.jit(lambda p, ids: skeleton_apply("gpt2")(p, ids, cache=9))(params, IDS[:, :4])
    logits, _ = apply(params, IDS[:, 4:], cache=cache)
    np.testing.assert_allclose(logits, apply(params, IDS)[:, 4:], atol=2e-5)


def test_the_last_token_alone():
    apply, params = tiny("llama")
    found = apply(params, IDS, last_only=True)
    assert found.shape == (2, 1, VOCABULARY)
    np.testing.assert_allclose(found, apply(params, IDS)[:, -1:], atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": 8}, r"`cache` must have at least one slot for each of the 9 tokens, got 8"),
        ({"cache": True}, r"`cache` must have at least one slot"),
        ({"cache": 49}, r"`cache` must have at most 48 slots, the model's positions, .*got 49"),
        ({"cache": {}}, r"`cache` must be a number of slots or a `Cache`, got dict"),
        (
            {"position_ids": np.zeros((2, 8), int)},
            r"`position_ids` must have the shape of `input_ids`, \(2, 9\), got \(2, 8\)",
        ),
        ({"attention_mask": np.ones((2, 8))}, r"`attention_mask` must have the shape .*, got \(2, 8\)"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str):
    _, params = tiny("gpt2")
    with pytest.raises(ValueError, match=message):
        skeleton_apply("gpt2")(params, IDS, **arguments)


def test_a_cache_that_does_not_fit_is_refused():
    _, params = tiny("gpt2")
    apply = skeleton_apply("gpt2")
    _, cache = apply(params, IDS[:, :4], cache=6)
    with pytest.raises(ValueError, match=r"`cache` has 6 slots, 4 of them used, too few for 3 more tokens"):
        apply(params, IDS[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"`cache` must have keys of shape .* for this model and batch, got"):
        apply(params, IDS[:1, :1], cache=cache)


def test_positions_end_with_a_table_and_not_with_a_rotation():
    ids = np.full((1, 70), 7)
    _, params = tiny("gpt2")
    with pytest.raises(
        ValueError, match=r"`input_ids` must have at most 48 tokens a row, the model's positions, got 70"
    ):
        skeleton_apply("gpt2")(params, ids)
    apply, params = tiny("llama")  # of 64 positions
    assert jnp.isfinite(apply(params, ids)).all()


# ---------------------------------------------------------------------------------------------------- dtypes and layers


@every_family
def test_shapes_and_dtypes(family: str):
    config = config_from_dict(settings(family))
    for task, shape, dtype in ((None, (2, 9, 16), jnp.bfloat16), ("causal-lm", (2, 9, VOCABULARY), jnp.float32)):
        for scan in (False, True):
            apply, shapes = skeleton(config, task=task, dtype=jnp.dtype(jnp.bfloat16), scan_layers=scan)
            assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
            result = jax.eval_shape(apply, shapes, IDS, RIGHT)
            assert (result.shape, result.dtype) == (shape, dtype)
    _, cache = jax.eval_shape(lambda p: apply(p, IDS, cache=9), shapes)
    assert cache.keys.dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32():
    """The stated bound: 5 % of the largest logit, with weights larger than a trained model's; 1 % in the mean."""
    apply, params = tiny("llama")
    half = skeleton(config_from_dict(settings("llama")), task="causal-lm", dtype=jnp.dtype(jnp.bfloat16)).apply
    half = jax.jit(half)
    exact, found = apply(params, IDS), half(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), IDS)
    assert np.abs(found - exact).max() < 5e-2 * np.abs(exact).max()
    assert np.abs(found - exact).mean() < 1e-2 * np.abs(exact).max()


def test_rms_norm():
    from flax import nnx

    norm = RMSNorm(3, epsilon=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert norm.scale is not None
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0])
    x = jnp.array([[1.0, -2.0, 4.0]])
    expected = x / jnp.sqrt((x**2).mean() + jnp.float32(0.5)) * jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "rates"), [("gpt2", [0.1] + 3 * [0.3, 0.2, 0.2]), ("llama", 3 * [0.4])], ids=["gpt2", "llama"]
)
def test_dropout_draws_anew_at_every_layer_and_use(family: str, rates: list[float], monkeypatch: pytest.MonkeyPatch):
    """GPT-2's on the embeddings, then of each layer on the probabilities, the output of attention and of the MLP."""
    seen: list[tuple[Any, float]] = []

    def record(x: jax.Array, rate: float, key: Any) -> jax.Array:
        seen.append((tuple(np.asarray(jax.random.key_data(key))), rate))
        return x

    for module in (gpt2, attention):
        monkeypatch.setattr(module, "dropout", record)
    given = (
        {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3} if family == "gpt2" else {"attention_dropout": 0.4}
    )
    apply, shapes = skeleton(config_from_dict(settings(family, **given)), task="causal-lm")
    apply(random_params(shapes), IDS, dropout_key=jax.random.key(0))
    assert [rate for _, rate in seen] == rates
    assert len({key for key, _ in seen}) == len(seen)


@every_family
def test_dropout_is_a_function_of_the_key(family: str):
    config = config_from_dict(settings(family)).with_dropout(0.25)
    apply, shapes = skeleton(config, task="causal-lm")
    params = random_params(shapes)
    run = jax.jit(lambda seed: apply(params, IDS, dropout_key=jax.random.key(seed)))
    plain, first, again, second = jax.jit(apply)(params, IDS), run(0), run(0), run(1)
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.abs(first - plain).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- rotation


def test_llama3_keeps_high_frequencies_and_divides_low_ones():
    sizes = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64}
    scaled = models.Rope(kind="llama3", theta=1e6, **sizes).frequencies(32)
    plain = models.Rope(theta=1e6).frequencies(32)
    turns = 64 * plain / (2 * math.pi)
    assert (scaled[turns > 4] == plain[turns > 4]).all()
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (turns > 4).any()
    assert (turns < 1).any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    np.testing.assert_allclose(models.Rope(kind="linear", theta=1e6, factor=3.0).frequencies(32), plain / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("entries", "rope"),
    [
        ({"rope_theta": 7.0}, models.Rope(theta=7.0)),
        ({"rope_theta": 7.0, "rope_scaling": None}, models.Rope(theta=7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, models.Rope(kind="linear", factor=2)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}},
            models.Rope(kind="linear", factor=2.0, theta=9.0),
        ),
        (
            {"rope_theta": 5.0}
            | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
            models.Rope(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_length=64, theta=5.0),
        ),
    ],
)
def test_both_spellings_of_the_rotation(entries: dict[str, Any], rope: models.Rope):
    content = {name: value for name, value in settings("llama").items() if name != "rope_theta"}
    config = config_from_dict({**content, **entries})
    assert isinstance(config, models.LlamaConfig)
    assert config.rope == rope


# ---------------------------------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"n_head": 3}, r"`n_embd` \(16\) must be a multiple of `n_head` \(3\)"),
        ("gpt2", {"n_inner": 0}, r"`n_inner` must be a positive integer, got 0"),
        ("gpt2", {"activation_function": "mish"}, r"`activation_function` must be one of .*, got 'mish'"),
        ("gpt2", {"attn_pdrop": 1.0}, r"`attn_pdrop` must be a number of at least 0 and below 1"),
        ("gpt2", {"add_cross_attention": True}, r"`add_cross_attention` must be false"),
        ("gpt2", {"scale_attn_weights": 1}, r"`scale_attn_weights` must be true or false, got 1"),
        ("llama", {"num_key_value_heads": 3}, r"`num_attention_heads` \(4\) must be a multiple of `num_key_value_head"),
        ("llama", {"head_dim": 5}, r"`head_dim` must be even, .*got 5"),
        ("llama", {"head_dim": None, "hidden_size": 18}, r"`hidden_size` \(18\) must be a multiple of `num_attention"),
        ("llama", {"rms_norm_eps": 0}, r"`rms_norm_eps` must be a positive number"),
        ("llama", {"rope_theta": -1.0}, r"`rope_theta` must be a positive number, got -1.0"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn"}},
            r"`rope_type` must be one of 'default', 'linear', .*got 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2}},
            r"`rope_type` must be one of .*, got 'dynamic'",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"`rope_scaling` of type 'linear' lacks `factor`"),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, r"`rope_type` must be one of .*, got \['linear'\]"),
        ("llama", {"rope_scaling": [1]}, r"`rope_scaling` must be one object of numbers for all layers, got \[1\]"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, r"`rope_parameters` must be one object of numbers"),
        ("llama", {"partial_rotary_factor": 0.5}, r"`partial_rotary_factor` must be 1, got 0.5"),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            r"`high_freq_factor` must be more than `low_freq_factor` \(4\), got 4",
        ),
        ("mistral", {"sliding_window": 0}, r"`sliding_window` must be a positive integer, got 0"),
        ("mistral", {"attention_bias": True}, r"`attention_bias` must be false: a mistral has no such biases"),
        ("qwen2", {"layer_types": ["full_attention"]}, r"`layer_types` must be one of 'full_attention', 'sliding_att"),
        ("qwen2", {"layer_types": 3}, r"`layer_types` must be a list, got 3"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            r"`layer_types` has 'sliding_attention', but there is no window: `use_sliding_window` is False",
        ),
        ("qwen3", {"mlp_bias": True}, r"`mlp_bias` must be false: a qwen3 has no such biases"),
        ("qwen3", {"model_type": "qwen3_moe"}, r"`model_type` must be one of 'bert', .*'qwen3', got 'qwen3_moe'"),
    ],
)
def test_a_bad_config_is_refused(family: str, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_from_dict(settings(family, **change))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"task": "classification"}, r'`task` of a llama must be "causal-lm" or None, got \'classification\''),
        ("gpt2", {"pooling": "mean"}, r"`pooling` applies to encoders with a head, and a gpt2 is a decoder"),
    ],
)
def test_options_of_encoders_are_refused(family: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        skeleton(config_from_dict(settings(family)), **options)


def test_options_of_decoders_are_refused_for_encoders():
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = models.BertConfig(vocab_size=9, max_position_embeddings=4, type_vocab_size=2, **sizes)
    with pytest.raises(ValueError, match=r'`task` of a bert must be "classification", "regression" or None, got \'cau'):
        skeleton(bert, task="causal-lm")
    with pytest.raises(ValueError, match=r"`scan_layers` applies to decoders, and a bert is an encoder"):
        skeleton(bert, scan_layers=True)
