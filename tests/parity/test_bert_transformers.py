"""Hidden states, logits and saved folders are transformers' own, to 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import FileError
from lora_jax.paths import leaves_by_path
from tests.tiny_bert import write_tiny_bert

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

TOLERANCE = 1e-4
SENTENCES = [
    ("The movie is not very good!", "Why?"),
    ("thanks", "please send the report, it is late and this meeting was awful"),
    ("I love it.", "we hate the plot"),
]


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def minilm() -> Path:
    try:
        return models.find_base(models.DEFAULT_BASE)
    except FileError as error:
        pytest.skip(str(error))


def random_batch(vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Every row of another length, token types of both kinds."""
    rng = np.random.default_rng(seed)
    lengths = np.array([[17], [3], [9], [1]])
    places = np.arange(17)[None, :]
    return {
        "input_ids": np.where(places < lengths, rng.integers(5, vocab, (4, 17)), 0),
        "attention_mask": (places < lengths).astype(np.int64),
        "token_type_ids": ((places >= lengths // 2) & (places < lengths)).astype(np.int64),
    }


def inputs(batch: dict[str, np.ndarray], given: str) -> dict[str, np.ndarray]:
    names = {"ids": ["input_ids"], "mask": ["input_ids", "attention_mask"], "all": list(batch)}[given]
    return {name: batch[name] for name in names}


def theirs(model: Any, batch: dict[str, np.ndarray]) -> Any:
    return model.eval()(**{name: torch.tensor(array) for name, array in batch.items()})


def assert_close(ours: Any, theirs: Any, mask: np.ndarray | None = None) -> None:
    ours, theirs = np.asarray(ours), theirs.numpy()
    if mask is not None:  # at padding there is nothing to compare
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert np.abs(theirs).max() > 10 * TOLERANCE  # the comparison says something


@pytest.mark.parametrize("given", ["ids", "mask", "all"])
@pytest.mark.parametrize(
    "config",
    [{}, {"layers": 3, "hidden": 24, "heads": 2, "layer_norm_eps": 1e-5}, {"hidden_act": "gelu_new"}],
)
def test_hidden_states_of_random_weights(tmp_path: Path, config: dict[str, Any], given: str):
    folder = write_tiny_bert(tmp_path, seed=3, **config)
    batch = inputs(random_batch(100), given)
    model = models.load(folder)
    reference = theirs(transformers.AutoModel.from_pretrained(folder), batch).last_hidden_state
    assert_close(jax.jit(model.apply)(model.params, **batch), reference, batch.get("attention_mask"))


@pytest.mark.parametrize("given", ["ids", "all"])
def test_hidden_states_of_the_pretrained_base(minilm: Path, given: str):
    model = models.load(minilm)
    reference = transformers.AutoModel.from_pretrained(minilm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = dict(tokenizer([a for a, _ in SENTENCES], [b for _, b in SENTENCES], padding=True, return_tensors="np"))
    batch = inputs(batch, given)
    ours = jax.jit(model.apply)(model.params, **batch)
    assert_close(ours, theirs(reference, batch).last_hidden_state, batch.get("attention_mask"))


def test_token_ids_are_those_of_transformers(minilm: Path, tmp_path: Path):
    for folder in (minilm, write_tiny_bert(tmp_path)):
        tokenizer, reference = models.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for a, b in SENTENCES:
            encoded = tokenizer.encode(a, b)
            expected = reference(a, b)
            assert encoded.ids == expected["input_ids"]
            assert encoded.type_ids == expected["token_type_ids"]


@pytest.mark.parametrize("given", ["ids", "all"])
@pytest.mark.parametrize(("task", "outputs"), [("classification", 4), ("regression", 1)])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_saved_model_gives_equal_logits_in_transformers(
    tmp_path: Path, request: pytest.FixtureRequest, task: Any, outputs: int, pretrained: bool, given: str
):
    base = request.getfixturevalue("minilm") if pretrained else write_tiny_bert(tmp_path / "base", seed=5)
    model = models.load(base, task=task, num_labels=outputs)
    bias = jnp.linspace(-1, 1, outputs) if outputs > 1 else jnp.ones(1)
    params = {**model.params, "classifier": {"kernel": 20 * model.params["classifier"]["kernel"], "bias": bias}}
    labels = [f"label {index}" for index in range(outputs)]
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base, labels=labels)
    reference, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(reference.config.id2label.values()) == labels
    batch = inputs(random_batch(100), given)
    ours = jax.jit(model.apply)(params, **batch)
    assert_close(ours if outputs > 1 else ours[:, None], theirs(reference, batch).logits)


def test_a_model_saved_by_transformers_gives_equal_logits_here(tmp_path: Path):
    base = write_tiny_bert(tmp_path / "base", seed=5)
    torch.manual_seed(0)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    reference.classifier.weight.mul_(20)
    reference.save_pretrained(tmp_path / "out")
    model = models.load(tmp_path / "out", task="classification")
    assert_close(model.apply(model.params, **random_batch(100)), theirs(reference, random_batch(100)).logits)


def test_an_encoder_saved_here_gives_equal_hidden_states_there(tmp_path: Path):
    base = write_tiny_bert(tmp_path / "base")
    model = models.load(base)
    params = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base)
    reference, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = random_batch(100)
    assert_close(model.apply(params, **batch), theirs(reference, batch).last_hidden_state, batch["attention_mask"])


def test_gradients_are_those_of_pytorch(tmp_path: Path):
    """One loss on a padded batch; every leaf, under the Hugging Face name that the table gives it."""
    base = write_tiny_bert(tmp_path / "base", seed=5)
    model = models.load(base, task="classification", num_labels=3)
    folder = models.save_pretrained(tmp_path / "out", model, model.params, source=base)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    batch, weights = random_batch(100), np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float32)
    with torch.enable_grad():
        (theirs(reference, batch).logits * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, **batch) * weights).sum()))(model.params)
    tensors = dict(reference.named_parameters())
    for path, grad in leaves_by_path(grads).items():
        tensor = tensors[f"{model.names[path]}.{'bias' if path.endswith('bias') else 'weight'}"].grad.numpy()
        tensor = tensor.T if path.endswith("kernel") else tensor
        np.testing.assert_allclose(grad, tensor, atol=1e-5 + 1e-4 * np.abs(tensor).max(), err_msg=path)
