"""RoBERTa, XLM-RoBERTa and DistilBERT: hidden states, logits and saved folders are transformers' own, to 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.paths import leaves_by_path
from tests.tiny_encoders import write_tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

TOLERANCE = 1e-4
FAMILIES = ("roberta", "xlm-roberta", "distilbert")
PADDING = {"roberta": 1, "xlm-roberta": 1, "distilbert": 0}
# Every entry of the configuration that changes the computation, away from its default.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("roberta", {"layers": 3, "hidden": 24, "heads": 2, "layer_norm_eps": 0.1, "hidden_act": "relu"}),
    ("roberta", {"pad_token_id": 4, "hidden_act": "gelu_new", "intermediate_size": 40, "layers": 1}),
    ("roberta", {"type_vocab_size": 3}),
    ("distilbert", {"layers": 3, "dim": 24, "hidden": 24, "heads": 2, "activation": "relu"}),
    ("distilbert", {"sinusoidal_pos_embds": True, "activation": "gelu_pytorch_tanh", "hidden_dim": 40}),
]
every_config = pytest.mark.parametrize(("family", "config"), CONFIGS)
every_family = pytest.mark.parametrize("family", FAMILIES)
sides = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def random_batch(family: str, config: dict[str, Any], side: str = "right") -> dict[str, np.ndarray]:
    """Every row of another length, with the token of padding once within a text; types where there are several."""
    rng = np.random.default_rng(0)
    padding = config.get("pad_token_id", PADDING[family])
    lengths = np.array([[17], [4], [9], [1]])
    places = np.arange(17)[None, :] if side == "right" else np.arange(16, -1, -1)[None, :]
    mask = (places < lengths).astype(np.int64)
    ids = np.where(mask > 0, rng.integers(5, 100, mask.shape), padding)
    ids[0, 8] = padding
    batch = {"input_ids": ids, "attention_mask": mask}
    if (types := config.get("type_vocab_size", 1)) > 1:
        batch["token_type_ids"] = rng.integers(0, types, mask.shape)
    return batch


def theirs(model: Any, batch: dict[str, np.ndarray]) -> Any:
    return model.eval()(**{name: torch.tensor(array) for name, array in batch.items()})


def assert_close(ours: Any, theirs: Any, mask: np.ndarray | None = None) -> None:
    ours, theirs = np.asarray(ours), theirs.numpy()
    if mask is not None:  # at padding there is nothing to compare
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert np.abs(theirs).max() > 10 * TOLERANCE  # the comparison says something


def load_whole(loader: Any, folder: Path) -> Any:
    """Every tensor that the class has, and no other."""
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@sides
@every_config
def test_hidden_states_of_random_weights(tmp_path: Path, family: str, config: dict[str, Any], side: str):
    folder = write_tiny(tmp_path, family, seed=3, **config)
    batch = random_batch(family, config, side)
    model = models.load(folder)
    reference = theirs(load_whole(transformers.AutoModel, folder), batch).last_hidden_state
    assert_close(jax.jit(model.apply)(model.params, **batch), reference, batch["attention_mask"])


@every_family
def test_hidden_states_without_a_mask(tmp_path: Path, family: str):
    folder = write_tiny(tmp_path, family, seed=3)
    ids = {"input_ids": random_batch(family, {})["input_ids"]}
    model = models.load(folder)
    assert_close(model.apply(model.params, **ids), theirs(transformers.AutoModel.from_pretrained(folder), ids)[0])


@every_family
def test_as_many_tokens_as_there_are_positions(tmp_path: Path, family: str):
    folder = write_tiny(tmp_path, family, positions=16, layers=1)
    model = models.load(folder)
    assert model.config.max_length == 16
    ids = {"input_ids": np.random.default_rng(1).integers(5, 100, (2, 16))}
    assert_close(model.apply(model.params, **ids), theirs(transformers.AutoModel.from_pretrained(folder), ids)[0])
    if family != "distilbert":  # there the positions of the checkpoint end
        with pytest.raises((IndexError, RuntimeError)):
            theirs(transformers.AutoModel.from_pretrained(folder), {"input_ids": np.full((1, 17), 7)})


@sides
@every_config
def test_logits_of_a_head_from_a_checkpoint(tmp_path: Path, family: str, config: dict[str, Any], side: str):
    prefix = "distilbert." if family == "distilbert" else "roberta."
    pooler = {} if family == "distilbert" else {"pooler": False}
    folder = write_tiny(tmp_path, family, seed=5, head=3, prefix=prefix, num_labels=3, **pooler, **config)
    batch = random_batch(family, config, side)
    model = models.load(folder, task="classification")
    reference = load_whole(transformers.AutoModelForSequenceClassification, folder)
    assert_close(jax.jit(model.apply)(model.params, **batch), theirs(reference, batch).logits)


@sides
@pytest.mark.parametrize(("task", "outputs"), [("classification", 4), ("regression", 1)])
@every_family
def test_a_saved_model_gives_equal_logits_in_transformers(
    tmp_path: Path, family: str, task: Any, outputs: int, side: str
):
    base = write_tiny(tmp_path / "base", family, seed=5)
    model = models.load(base, task=task, num_labels=outputs)
    head = jax.tree.map(lambda leaf: 20 * leaf + 0.1, model.params["classifier"])
    params = {**model.params, "classifier": head}
    labels = [f"label {index}" for index in range(outputs)]
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base, labels=labels)
    reference = load_whole(transformers.AutoModelForSequenceClassification, folder)
    assert list(reference.config.id2label.values()) == labels
    batch = random_batch(family, {}, side)
    ours = jax.jit(model.apply)(params, **batch)
    assert_close(ours if outputs > 1 else ours[:, None], theirs(reference, batch).logits)


@every_family
def test_an_encoder_saved_here_gives_equal_hidden_states_there(tmp_path: Path, family: str):
    base = write_tiny(tmp_path / "base", family)
    model = models.load(base)
    params = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base)
    reference, batch = load_whole(transformers.AutoModel, folder), random_batch(family, {})
    assert_close(model.apply(params, **batch), theirs(reference, batch).last_hidden_state, batch["attention_mask"])


@every_family
def test_a_model_saved_by_transformers_gives_equal_logits_here(tmp_path: Path, family: str):
    base = write_tiny(tmp_path / "base", family, seed=5)
    torch.manual_seed(0)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    for name, parameter in reference.named_parameters():
        if "classifier" in name:
            parameter.mul_(20).add_(0.1)
    reference.save_pretrained(tmp_path / "out")
    model = models.load(tmp_path / "out", task="classification")
    batch = random_batch(family, {})
    assert_close(model.apply(model.params, **batch), theirs(reference, batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_its_pretraining_head_is_read(tmp_path: Path, family: str):
    base = write_tiny(tmp_path / "base", family, seed=5)
    reference = transformers.AutoModelForMaskedLM.from_pretrained(base)
    reference.save_pretrained(tmp_path / "out")
    assert any("lm_head" in name or "vocab_" in name for name in reference.state_dict())
    ours, base_model = models.load(tmp_path / "out"), models.load(base)
    for path, leaf in leaves_by_path(ours.params).items():
        np.testing.assert_array_equal(leaf, leaves_by_path(base_model.params)[path], err_msg=path)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_token_ids_are_those_of_transformers(tmp_path: Path, family: str):
    folder = write_tiny(tmp_path, family)
    tokenizer, reference = models.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for a, b in [("The movie is not very good!", "Why?"), ("thanks", "please send the report, it was awful")]:
        assert tokenizer.encode(a).ids == reference(a)["input_ids"]
        assert tokenizer.encode(a, b).ids == reference(a, b)["input_ids"]
        if family == "roberta":  # which has one type of tokens
            assert set(tokenizer.encode(a, b).type_ids) == {0}


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_gradients_are_those_of_pytorch(tmp_path: Path, family: str):
    """One loss on a padded batch; every leaf, under the Hugging Face name that the table gives it."""
    base = write_tiny(tmp_path / "base", family, seed=5)
    model = models.load(base, task="classification", num_labels=3)
    params = {**model.params, "classifier": jax.tree.map(lambda leaf: 20 * leaf + 0.1, model.params["classifier"])}
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    batch, weights = random_batch(family, {}), np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float32)
    # `torch.nn.Embedding` gives the row of its padding token no gradient.
    batch["input_ids"] = np.where(batch["attention_mask"] > 0, batch["input_ids"], 7)
    batch["input_ids"][0, 8] = 7
    with torch.enable_grad():
        (theirs(reference, batch).logits * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, **batch) * jnp.asarray(weights)).sum()))(params)
    tensors = dict(reference.named_parameters())
    for path, grad in leaves_by_path(grads).items():
        tensor = tensors[f"{model.names[path]}.{'bias' if path.endswith('bias') else 'weight'}"].grad.numpy()
        tensor = tensor.T if path.endswith("kernel") else tensor
        np.testing.assert_allclose(grad, tensor, atol=1e-5 + 1e-4 * np.abs(tensor).max(), err_msg=path)
