"""The Hugging Face name tables."""

from __future__ import annotations

import pytest

from lora_jax.models.families.bundled import ENCODERS, FAMILIES, config_from_dict
from lora_jax.models.model import skeleton
from lora_jax.paths import leaf_paths
from tests.tiny_bert import random_tensors
from tests.tiny_encoders import PREFIXES, random_distilbert_tensors

BERT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
}
DISTILBERT_SIZES = {
    "vocab_size": 50,
    "dim": 16,
    "n_layers": 12,
    "n_heads": 4,
    "hidden_dim": 32,
    "max_position_embeddings": 12,
}
ROBERTA_HEAD = {f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("weight", "bias")}
DISTILBERT_HEAD = {f"{layer}.{leaf}" for layer in ("pre_classifier", "classifier") for leaf in ("weight", "bias")}
every_family = pytest.mark.parametrize("family", [family.config.model_type for family in ENCODERS])
BERT = FAMILIES["bert"].names


def paths(family: str) -> list[str]:
    sizes = DISTILBERT_SIZES if family == "distilbert" else BERT_SIZES
    config = config_from_dict({"model_type": family, **sizes})
    return leaf_paths(skeleton(config, task="classification", num_labels=2).params)


def tensors(family: str) -> set[str]:
    """Of the class of transformers with a head, without the prefix."""
    if family == "bert":
        return {*random_tensors(BERT_SIZES), "classifier.weight", "classifier.bias"}
    if family == "distilbert":
        return {*random_distilbert_tensors(DISTILBERT_SIZES), *DISTILBERT_HEAD}
    return {*random_tensors(BERT_SIZES, pooler=False), *ROBERTA_HEAD}


@every_family
def test_every_leaf_has_the_name_of_one_tensor(family: str):
    ours = [FAMILIES[family].names.tensor(path) for path in paths(family)]
    assert len(ours) == len(set(ours))
    assert set(ours) == tensors(family)


@pytest.mark.parametrize(
    ("family", "query"),
    [
        ("bert", "encoder.layer.11.attention.self.query.weight"),
        ("roberta", "encoder.layer.11.attention.self.query.weight"),
        ("distilbert", "transformer.layer.11.attention.q_lin.weight"),
    ],
)
def test_kernels_and_nothing_else_are_transposed(family: str, query: str):
    names = FAMILIES[family].names
    transposed = {names.tensor(path) for path in paths(family) if names.is_transposed(path)}
    assert query in transposed
    assert not any("embeddings" in name or "norm" in name.lower() or name.endswith("bias") for name in transposed)
    assert len(transposed) == 12 * 6 + 2


def test_the_prefix_is_before_all_but_the_head():
    names = BERT.module_names(paths("bert"), prefix="bert.")
    assert names["encoder/layers/10/mlp/up/bias"] == "bert.encoder.layer.10.intermediate.dense"
    assert names["pooler/kernel"] == "bert.pooler.dense"
    assert names["classifier/kernel"] == "classifier"
    assert names.keys() == set(paths("bert"))


@pytest.mark.parametrize(
    ("family", "up", "dense", "output"),
    [
        ("roberta", "roberta.encoder.layer.10.intermediate.dense", "classifier.dense", "classifier.out_proj"),
        ("xlm-roberta", "roberta.encoder.layer.10.intermediate.dense", "classifier.dense", "classifier.out_proj"),
        ("distilbert", "distilbert.transformer.layer.10.ffn.lin1", "pre_classifier", "classifier"),
    ],
)
def test_a_head_of_two_layers_has_no_prefix(family: str, up: str, dense: str, output: str):
    names = FAMILIES[family].names.module_names(paths(family), prefix=PREFIXES[family])
    assert FAMILIES[family].names.prefix == PREFIXES[family]
    assert names["encoder/layers/10/mlp/up/bias"] == up
    assert names["classifier/dense/kernel"] == names["classifier/dense/bias"] == dense
    assert names["classifier/output/kernel"] == names["classifier/output/bias"] == output
    assert {name for name in names.values() if not name.startswith(PREFIXES[family])} == {dense, output}


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("bert.encoder.layer.0.output.LayerNorm.gamma", "encoder.layer.0.output.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("bert.pooler.dense.weight", "pooler.dense.weight"),
        ("classifier.weight", "classifier.weight"),
        ("embeddings.position_ids", None),
        ("bert.embeddings.position_ids", None),
        ("cls.predictions.bias", None),
        ("cls.seq_relationship.weight", None),
        ("lm_head.bias", "lm_head.bias"),
        ("roberta.pooler.dense.weight", "roberta.pooler.dense.weight"),
        ("encoder.gamma", "encoder.gamma"),
    ],
)
def test_old_names_are_read(tensor: str, name: str | None):
    assert BERT.modern([tensor]) == ({name: tensor} if name else {})


@pytest.mark.parametrize(
    ("family", "tensor", "name"),
    [
        ("roberta", "roberta.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("roberta", "roberta.embeddings.position_ids", None),
        ("roberta", "lm_head.layer_norm.weight", None),
        ("roberta", "lm_head.bias", None),
        ("roberta", "cls.predictions.bias", "cls.predictions.bias"),
        ("xlm-roberta", "lm_head.decoder.weight", None),
        ("distilbert", "distilbert.transformer.layer.0.ffn.lin1.bias", "transformer.layer.0.ffn.lin1.bias"),
        ("distilbert", "vocab_transform.weight", None),
        ("distilbert", "vocab_layer_norm.bias", None),
        ("distilbert", "vocab_projector.weight", None),
        ("distilbert", "vocab_other.weight", "vocab_other.weight"),
    ],
)
def test_each_family_leaves_its_own_pretraining_head_aside(family: str, tensor: str, name: str | None):
    assert FAMILIES[family].names.modern([tensor]) == ({name: tensor} if name else {})


def test_two_tensors_of_one_name_stay_apart():
    assert BERT.modern(["pooler.dense.bias", "bert.pooler.dense.bias"]) == {
        "pooler.dense.bias": "pooler.dense.bias",
        "bert.pooler.dense.bias": "bert.pooler.dense.bias",
    }


def test_layers_are_counted():
    assert BERT.layer_count([]) == 0
    assert BERT.layer_count(["encoder.layer.2.x", "encoder.layer.11.x", "x.encoder.layer.99.x"]) == 12
    assert FAMILIES["distilbert"].names.layer_count(["transformer.layer.4.x", "encoder.layer.11.x"]) == 5
