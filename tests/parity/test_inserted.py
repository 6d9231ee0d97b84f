"""Prefixes are PEFT's, adapters are what a hook on transformers' modules computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.models_table import moved
from tests.tiny_decoders import CLASSES, write_tiny_decoder
from tests.tiny_encoders import write_tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs PEFT")

IDS = np.array([[5, 6, 7, 8, 9, 10], [7, 9, 5, 11, 12, 6]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
LENGTH = 3


# transformers' own warnings of names that PEFT uses
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_a_prefix_is_peft_s(family: str, hidden: int | None, tmp_path: Path) -> None:
    """PEFT puts the prefix in as earlier tokens, which moves the tokens' positions; here that has to be said."""
    path = write_tiny_decoder(tmp_path, family)
    model = lj.models.load(path, task="causal-lm")
    method = lj.PrefixTuning(length=LENGTH, hidden=hidden)
    tree = lj.attach(model.params, method, key=jax.random.key(0))
    tree, _ = method.folded(moved(tree, lj.trainable_mask(tree, method), seed=1))
    found = lj.adapt(model.apply)(tree, IDS, MASK, position_ids=np.tile(LENGTH + np.arange(6), (2, 1)))

    theirs = getattr(transformers, CLASSES[family]).from_pretrained(path)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    adapted = peft.get_peft_model(theirs, config).eval()
    layers = [layer["attention"]["prefix"] for _, layer in sorted(lj.merge_params(tree)["layers"].items())]
    rows = np.concatenate([np.asarray(prefix[name]) for prefix in layers for name in ("key", "value")], axis=1)
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.copy_(torch.from_numpy(rows))
        positions = torch.arange(6).expand(2, 6)
        wanted = adapted(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK), position_ids=positions).logits
    np.testing.assert_allclose(np.asarray(found)[MASK > 0], wanted.numpy()[MASK > 0], atol=2e-4)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_adapters_are_hooks_on_the_output_layers(placement: Any, tmp_path: Path) -> None:
    """`h + gelu(h D + c) U + e` after the dense layers that write into BERT's residual, before dropout's place, the sum
    and the norm."""
    path = write_tiny(tmp_path, "bert")
    model = lj.models.load(path)
    method = lj.BottleneckAdapter(size=4, placement=placement, train_norms=False)
    tree = lj.attach(model.params, method, key=jax.random.key(0))
    tree = lj.merge_params(moved(tree, lj.trainable_mask(tree, method), seed=1))
    theirs = copy.deepcopy(transformers.BertModel.from_pretrained(path, add_pooling_layer=False)).eval()

    def after(arrays: Any) -> Any:
        down, c, up, e = (
            torch.from_numpy(np.array(arrays[part][name])) for part in ("down", "up") for name in ("kernel", "bias")
        )
        return lambda module, args, h: h + torch.nn.functional.gelu(h @ down + c) @ up + e

    for number, layer in enumerate(theirs.encoder.layer):
        own = tree["encoder"]["layers"][str(number)]
        layer.output.dense.register_forward_hook(after(own["mlp"]["adapter"]))
        if placement == "houlsby":
            layer.attention.output.dense.register_forward_hook(after(own["attention"]["adapter"]))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).last_hidden_state
    found = model.apply(tree, jnp.asarray(IDS), jnp.asarray(MASK))
    np.testing.assert_allclose(np.asarray(found)[MASK > 0], wanted.numpy()[MASK > 0], atol=1e-4)
