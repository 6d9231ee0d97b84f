"""The Hugging Face name table."""

from __future__ import annotations

import pytest

from lora_jax import models
from lora_jax.models.model import skeleton
from lora_jax.models.names import PREFIX, is_transposed, layer_count, modern_names, module_names, tensor_name
from lora_jax.paths import leaf_paths
from tests.tiny_bert import random_tensors

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
}
CONFIG = models.BertConfig.from_dict({"model_type": "bert", **SIZES})
PATHS = leaf_paths(skeleton(CONFIG, task="classification", num_labels=2).params)


def test_every_leaf_has_the_name_of_one_tensor():
    ours = [tensor_name(path) for path in PATHS]
    theirs = {*random_tensors(SIZES), "classifier.weight", "classifier.bias"}
    assert len(ours) == len(set(ours))
    assert set(ours) == theirs


def test_kernels_and_nothing_else_are_transposed():
    transposed = {tensor_name(path) for path in PATHS if is_transposed(path)}
    assert "encoder.layer.11.attention.self.query.weight" in transposed
    assert not any("embeddings" in name or "LayerNorm" in name or name.endswith("bias") for name in transposed)
    assert len(transposed) == 12 * 6 + 2


def test_the_prefix_is_before_all_but_the_head():
    names = module_names(PATHS, prefix=PREFIX)
    assert names["encoder/layers/10/mlp/up/bias"] == "bert.encoder.layer.10.intermediate.dense"
    assert names["pooler/kernel"] == "bert.pooler.dense"
    assert names["classifier/kernel"] == "classifier"
    assert names.keys() == set(PATHS)


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
        ("encoder.gamma", "encoder.gamma"),
    ],
)
def test_old_names_are_read(tensor: str, name: str | None):
    assert modern_names([tensor]) == ({name: tensor} if name else {})


def test_two_tensors_of_one_name_stay_apart():
    assert modern_names(["pooler.dense.bias", "bert.pooler.dense.bias"]) == {
        "pooler.dense.bias": "pooler.dense.bias",
        "bert.pooler.dense.bias": "bert.pooler.dense.bias",
    }


def test_layers_are_counted():
    assert layer_count([]) == 0
    assert layer_count(["encoder.layer.2.x", "encoder.layer.11.x", "x.encoder.layer.99.x"]) == 12
