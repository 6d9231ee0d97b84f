"""What RoBERTa and DistilBERT compute where they differ from BERT; equality to transformers is in tests/parity."""

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
from lora_jax.models.families.bundled import config_from_dict
from lora_jax.models.model import skeleton
from lora_jax.models.nn import attention, encoder, heads, layers
from lora_jax.paths import leaf_paths, leaves_by_path

ROBERTA_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 14,
    "type_vocab_size": 1,
}
DISTILBERT_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 32,
    "max_position_embeddings": 12,
}
CONFIGS: dict[str, models.ModelConfig] = {
    "roberta": models.RobertaConfig(**ROBERTA_SIZES),
    "distilbert": models.DistilBertConfig(**DISTILBERT_SIZES),
}
ROBERTA_BASE = models.RobertaConfig(
    vocab_size=50265,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    type_vocab_size=1,
)
DISTILBERT_BASE = models.DistilBertConfig(
    vocab_size=30522, dim=768, n_layers=6, n_heads=12, hidden_dim=3072, max_position_embeddings=512
)
both = pytest.mark.parametrize("family", ["roberta", "distilbert"])

# Padded on the right with RoBERTa's token, which is a token like any other to DistilBERT.
IDS = np.array([[2, 7, 9, 3, 1, 1], [2, 8, 3, 1, 1, 1], [2, 4, 5, 6, 7, 3]])
MASK = (IDS != 1).astype(np.int32)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_params(shapes: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def tiny(family: str, task: Any = None, **options: Any) -> tuple[Any, Any]:
    apply, shapes = skeleton(CONFIGS[family], task=task, **options)
    return jax.jit(apply), random_params(shapes)


# ------------------------------------------------------------------------------------------------------------ the trees


@pytest.mark.parametrize(("config", "total"), [(ROBERTA_BASE, 124_647_170), (DISTILBERT_BASE, 66_955_010)])
def test_the_base_sizes_are_the_published_models(config: models.ModelConfig, total: int):
    """The parameters of transformers' `...ForSequenceClassification` with two labels."""
    shapes = skeleton(config, task="classification", num_labels=2).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total


def test_lora_on_roberta_base_has_the_papers_count():
    """r = 8 on query and value: 12 · 2 · 8 · (768 + 768), from shapes alone."""
    shapes = skeleton(ROBERTA_BASE, task="classification", num_labels=2).params
    method = lj.LoRA(rank=8, alpha=8, targets=("query", "value"), also_train=("classifier",))
    tree = jax.eval_shape(lambda: lj.attach(shapes, method, key=jax.random.key(0)))
    counts = lj.count_params(tree, lj.label_params(tree, method)).per_label
    assert counts["lora_a"].params + counts["lora_b"].params == 294_912
    assert counts["head"].params == 768 * 768 + 768 + 2 * 768 + 2


@pytest.mark.parametrize(
    ("family", "tables"), [("roberta", ("word", "position", "token_type")), ("distilbert", ("word", "position"))]
)
def test_the_tree_has_the_canonical_names(family: str, tables: tuple[str, ...]):
    block = ["attention/key", "attention/norm", "attention/output", "attention/query", "attention/value"]
    block += ["mlp/down", "mlp/norm", "mlp/up"]
    modules = [f"encoder/layers/{layer}/{name}" for layer in (0, 1) for name in block]
    modules += ["embeddings/norm", "classifier/dense", "classifier/output"]
    paths = {f"embeddings/{name}/embedding" for name in tables}
    paths |= {f"{module}/bias" for module in modules}
    paths |= {f"{module}/{'scale' if module.endswith('norm') else 'kernel'}" for module in modules}
    for pooling in ("first", "mean"):
        shapes = skeleton(CONFIGS[family], task="classification", num_labels=3, pooling=pooling).params
        assert set(leaf_paths(shapes)) == paths
    assert leaves_by_path(shapes)["classifier/dense/kernel"].shape == (16, 16)
    assert leaves_by_path(shapes)["classifier/output/kernel"].shape == (16, 3)
    assert set(leaf_paths(skeleton(CONFIGS[family]).params)) == {p for p in paths if not p.startswith("classifier")}


@both
def test_presets_and_names_select_as_in_bert(family: str):
    shapes = skeleton(CONFIGS[family], task="classification", num_labels=2).params
    labels = {
        name: leaves_by_path(
            lj.label_params(jax.eval_shape(lambda m=m: lj.attach(shapes, m, key=jax.random.key(0))), m)
        )
        for name, m in {
            "lora": lj.LoRA(rank=1, alpha=1, targets="all-linear", also_train=("classifier",)),
            "bitfit": lj.BitFit(targets=("attention/query", "mlp/up"), also_train=("classifier",)),
        }.items()
    }
    head = {f"classifier/{layer}/{leaf}" for layer in ("dense", "output") for leaf in ("kernel", "bias")}
    for found in labels.values():
        assert {path for path, label in found.items() if label == "head"} == head
    linear = ("attention/query", "attention/key", "attention/value", "attention/output", "mlp/up", "mlp/down")
    adapted = {path for path, label in labels["lora"].items() if not isinstance(label, str)}
    assert adapted == {f"encoder/layers/{layer}/{name}/kernel" for layer in (0, 1) for name in linear}
    biases = {path for path, label in labels["bitfit"].items() if label == "bias"}
    assert biases == {
        f"encoder/layers/{layer}/{name}/bias" for layer in (0, 1) for name in ("attention/query", "mlp/up")
    }


@both
@pytest.mark.parametrize(("task", "pooling"), [(None, "first"), ("classification", "first"), ("regression", "mean")])
def test_there_is_no_leaf_without_use(family: str, task: Any, pooling: Any):
    """Every leaf has a gradient, but the key biases, whose gradient softmax makes zero."""
    apply, params = tiny(family, task, num_labels=3, pooling=pooling)
    weights = np.random.default_rng(1).normal(size=jax.eval_shape(apply, params, IDS).shape).astype(np.float32)
    grads = jax.jit(jax.grad(lambda p: (apply(p, IDS, MASK) * weights).sum()))(params)
    for path, grad in leaves_by_path(grads).items():
        assert (jnp.abs(grad).max() > 1e-4) != path.endswith("key/bias"), (task, path)


@both
def test_adapted_is_merged_and_nothing_is_materialized(family: str):
    """Factors far from zero at every weight, tables and head too."""
    apply, params = tiny(family, "classification", num_labels=3)
    weights = [f"/{path}" for path, leaf in leaves_by_path(params).items() if leaf.ndim == 2]
    method = lj.LoRA(rank=1, alpha=2, targets=weights)
    params = lj.attach(params, method, key=jax.random.key(0))
    rng = np.random.default_rng(2)
    mask = lj.trainable_mask(params, method)
    params = jax.tree.map(lambda x, own: x + rng.normal(0, 0.3, x.shape).astype(np.float32) if own else x, params, mask)
    found = jax.jit(lj.adapt(apply, on_materialize="error"))(params, IDS, MASK)
    np.testing.assert_allclose(found, apply(lj.merge_params(params), IDS, MASK), atol=1e-4)
    assert jnp.abs(found - apply(lj.detach(params), IDS, MASK)).max() > 0.1


# ------------------------------------------------------------------------------------------------------------ positions


@both
def test_padding_on_the_right_changes_nothing(family: str):
    apply, params = tiny(family)
    full = apply(params, IDS, MASK)
    for row in (0, 2):
        length = MASK[row].sum()
        np.testing.assert_allclose(full[row, :length], apply(params, IDS[row : row + 1, :length])[0], atol=2e-6)


def test_roberta_has_its_own_positions_under_padding_on_the_left():
    apply, params = tiny("roberta")
    left = np.array([[1, 1, 2, 7, 9, 3]])
    found = apply(params, left, left != 1)[0, 2:]
    np.testing.assert_allclose(found, apply(params, left[:, 2:])[0], atol=2e-6)


def test_roberta_counts_positions_from_its_padding_token():
    config = models.RobertaConfig(**ROBERTA_SIZES, pad_token_id=4)
    apply, shapes = skeleton(config)
    params = random_params(shapes)
    ids = np.array([[7, 4, 9]])
    place = {7: 5, 4: 4, 9: 6}  # the token is followed by the next position, padding has its own
    table = np.asarray(params["embeddings"]["position"]["embedding"])
    moved = params | {"embeddings": params["embeddings"] | {"position": {"embedding": np.zeros_like(table)}}}
    rows = np.asarray(params["embeddings"]["word"]["embedding"]).copy()
    for token, position in place.items():
        rows[token] += table[position]
    moved["embeddings"] = moved["embeddings"] | {"word": {"embedding": rows}}
    np.testing.assert_allclose(apply(params, ids), apply(moved, ids), atol=1e-5)


@pytest.mark.parametrize(("family", "most"), [("roberta", 12), ("distilbert", 12)])
def test_a_row_longer_than_the_positions_is_refused(family: str, most: int):
    """Of RoBERTa's 14 positions, those up to that of padding are no token's."""
    assert CONFIGS[family].max_length == most
    apply, params = tiny(family)
    full = np.full((1, most), 7)
    assert jnp.isfinite(apply(params, full)).all()
    with pytest.raises(
        ValueError, match=rf"at most {most} tokens a row, the model's positions, got {most + 1}: truncate"
    ):
        apply(params, np.full((1, most + 1), 7))


def test_distilbert_takes_token_types_and_leaves_them_aside():
    apply, params = tiny("distilbert")
    np.testing.assert_array_equal(apply(params, IDS, MASK, np.ones_like(IDS)), apply(params, IDS, MASK))


def test_a_token_type_that_roberta_lacks_shows():
    apply, params = tiny("roberta")
    assert jnp.isfinite(apply(params, IDS, MASK, np.zeros_like(IDS))).all()
    assert jnp.isnan(apply(params, IDS, MASK, np.ones_like(IDS))).all()


# ---------------------------------------------------------------------------------------------------------------- heads


@both
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_head_of_two_layers_sees_what_pooling_says(family: str, pooling: Any):
    hidden, _ = tiny(family)
    apply, params = tiny(family, "classification", num_labels=3, pooling=pooling)
    states = np.asarray(hidden({name: params[name] for name in ("embeddings", "encoder")}, IDS, MASK))
    if pooling == "first":
        seen = states[:, 0]
    else:
        seen = np.stack([row[mask > 0].mean(0) for row, mask in zip(states, MASK, strict=True)])
    dense, output = (
        {leaf: np.asarray(value) for leaf, value in params["classifier"][name].items()} for name in ("dense", "output")
    )
    between = seen @ dense["kernel"] + dense["bias"]
    between = np.tanh(between) if family == "roberta" else np.maximum(between, 0)
    np.testing.assert_allclose(apply(params, IDS, MASK), between @ output["kernel"] + output["bias"], atol=2e-5)


@both
def test_shapes_and_dtypes(family: str):
    for task, shape in (("classification", (3, 5)), ("regression", (3,))):
        apply, shapes = skeleton(CONFIGS[family], task=task, num_labels=5, dtype=jnp.dtype(jnp.bfloat16))
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
        result = jax.eval_shape(apply, shapes, IDS, MASK)
        assert (result.shape, result.dtype) == (shape, jnp.float32)


@both
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_row_of_nothing_but_padding_is_finite_and_so_is_its_gradient(family: str, pooling: Any):
    apply, params = tiny(family, "classification", num_labels=2, pooling=pooling)
    ids, mask = np.ones((2, 4), int), np.zeros((2, 4), int)
    value, grads = jax.value_and_grad(lambda p: apply(p, ids, mask).sum())(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


# -------------------------------------------------------------------------------------------------------------- dropout

DROPOUT = {
    "roberta": (
        models.RobertaConfig(
            **ROBERTA_SIZES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout=0.4
        ),
        # embeddings; probabilities, attention output and MLP output of two layers; before either layer of the head
        [0.2, 0.3, 0.2, 0.2, 0.3, 0.2, 0.2, 0.4, 0.4],
    ),
    "distilbert": (
        models.DistilBertConfig(**DISTILBERT_SIZES, dropout=0.2, attention_dropout=0.3, seq_classif_dropout=0.4),
        # none on the output of attention, none before the head
        [0.2, 0.3, 0.0, 0.2, 0.3, 0.0, 0.2, 0.0, 0.4],
    ),
}


@both
def test_dropout_draws_anew_at_every_layer_and_use(family: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Any, float]] = []

    def record(x: jax.Array, rate: float, key: Any) -> jax.Array:
        seen.append((tuple(np.asarray(jax.random.key_data(key))), rate))
        return x

    for module in (attention, layers, encoder, heads):
        monkeypatch.setattr(module, "dropout", record)
    config, rates = DROPOUT[family]
    apply, shapes = skeleton(config, task="classification", num_labels=2)
    apply(random_params(shapes), IDS, MASK, dropout_key=jax.random.key(0))
    assert [rate for _, rate in seen] == rates
    assert len({key for key, _ in seen}) == len(seen)


@both
def test_dropout_is_a_function_of_the_key(family: str):
    apply, params = tiny(family, "classification", num_labels=3)
    plain = apply(params, IDS, MASK)
    first, again, second = (apply(params, IDS, MASK, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.abs(first - plain).max() > 1e-3


@pytest.mark.parametrize("family", ["bert", *DROPOUT])
def test_one_rate_for_all_dropout(family: str):
    given = {"bert": models.BertConfig(**ROBERTA_SIZES, classifier_dropout=0.4)} | {
        f: c for f, (c, _) in DROPOUT.items()
    }
    config = given[family].with_dropout(0.25)
    names = {
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.25,
        "attention_output_dropout_prob": 0.0 if family == "distilbert" else 0.25,
        "seq_classif_dropout" if family == "distilbert" else "head_dropout": 0.25,
    }
    assert {name: getattr(config, name) for name in names} == names
    assert type(config) is type(given[family])


# ---------------------------------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pad_token_id": None},
            r"`pad_token_id` must be a token, from 0 to 49, got None: positions are counted from it",
        ),
        ({"pad_token_id": -1}, r"`pad_token_id` must be a token, from 0 to 49, got -1"),
        ({"pad_token_id": 50}, r"`pad_token_id` must be a token, from 0 to 49, got 50"),
        ({"pad_token_id": True}, r"`pad_token_id` must be a token, from 0 to 49, got True"),
        (
            {"max_position_embeddings": 2},
            r"`max_position_embeddings` must be more than `pad_token_id` \+ 1 \(2\), .*got 2",
        ),
        ({"num_attention_heads": 3}, r"`hidden_size` \(16\) must be a multiple of `num_attention_heads` \(3\)"),
        (
            {"position_embedding_type": "relative_key"},
            r"`position_embedding_type` must be 'absolute', got 'relative_key",
        ),
        ({"is_decoder": True}, r"`is_decoder` must be false: only encoders"),
        ({"model_type": "bert"}, r"`model_type` must be one of 'roberta', got 'bert'"),
    ],
)
def test_a_bad_roberta_config_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        models.RobertaConfig.from_dict({"model_type": "roberta", **ROBERTA_SIZES, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, r"`dim` must be a positive integer, got 0"),
        ({"n_heads": 3}, r"`dim` \(16\) must be a multiple of `n_heads` \(3\)"),
        ({"activation": "mish"}, r"`activation` must be one of gelu, .*, got 'mish'"),
        ({"dropout": 1.0}, r"`dropout` must be a number of at least 0 and below 1, got 1.0"),
        ({"attention_dropout": None}, r"`attention_dropout` must be a number"),
        ({"seq_classif_dropout": "0.2"}, r"`seq_classif_dropout` must be a number"),
        ({"initializer_range": -1}, r"`initializer_range` must be a positive number"),
        ({"model_type": "bert"}, r"`model_type` must be one of 'distilbert', got 'bert'"),
    ],
)
def test_a_bad_distilbert_config_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        models.DistilBertConfig.from_dict({"model_type": "distilbert", **DISTILBERT_SIZES, **change})


def test_distilbert_lacks_sizes_under_its_own_names():
    with pytest.raises(
        ValueError, match="the configuration lacks `vocab_size`, `dim`, `n_layers`, `n_heads`, `hidden_dim`"
    ):
        config_from_dict({"model_type": "distilbert", "hidden_size": 16})


@pytest.mark.parametrize("model_type", ["t5", None, ["bert"]])
def test_a_kind_of_model_that_is_not_bundled_is_refused(model_type: Any):
    known = "'bert', 'roberta', 'xlm-roberta', 'distilbert', 'gpt2', .*'qwen3'"
    with pytest.raises(ValueError, match=rf"`model_type` must be one of {known}, got .*lora_jax.attach"):
        config_from_dict({"model_type": model_type, **ROBERTA_SIZES})


def test_each_kind_has_its_config():
    kinds = {"bert": models.BertConfig, "roberta": models.RobertaConfig, "xlm-roberta": models.XlmRobertaConfig}
    for model_type, kind in kinds.items():
        assert type(config_from_dict({"model_type": model_type, **ROBERTA_SIZES})) is kind
    assert type(config_from_dict({"model_type": "distilbert", **DISTILBERT_SIZES})) is models.DistilBertConfig
    # Equal numbers, and not the same model.
    assert models.RobertaConfig(**ROBERTA_SIZES) != models.XlmRobertaConfig(**ROBERTA_SIZES)
    assert skeleton(models.RobertaConfig(**ROBERTA_SIZES)) is skeleton(CONFIGS["roberta"])
