"""GPT-2 and the Llama family: logits, gradients, saved folders and generated tokens are transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.generate import keep_probable
from lora_jax.paths import leaves_by_path
from tests.tiny_decoders import CLASSES, FAMILIES, VOCABULARY, write_tiny_decoder

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

TOLERANCE = 1e-4
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 16}
# Every entry of the configuration that changes the computation, away from its default.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("gpt2", {"n_inner": None, "activation_function": "relu", "layer_norm_epsilon": 0.1, "n_head": 2}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "tie_word_embeddings": False}),
    ("gpt2", {"reorder_and_upcast_attn": True, "activation_function": "gelu"}),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("llama", {"rope_scaling": LLAMA_3, "head_dim": 16, "rope_theta": 100.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama", {"rope_theta": None, "rope_parameters": {**LLAMA_3, "rope_theta": 300.0}, "head_dim": 16}),
    ("mistral", {"sliding_window": None, "head_dim": None, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True, "head_dim": None}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen3", {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def write(folder: Path, family: str, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """Entries that are `None` where the default isn't are left out by name."""
    config = dict(config or {})
    if config.get("rope_theta", 0) is None:
        config["rope_theta"] = 10_000.0  # `rope_parameters` has its own, which counts
    return write_tiny_decoder(folder, family, seed=4, **config, **options)


def random_batch(side: str = "right", time: int = 17) -> dict[str, Any]:
    """Every row of another length; with padding on both sides, one half of the rows has each."""
    if side == "both":
        halves = [random_batch(half, time) for half in ("right", "left")]
        return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
    rng = np.random.default_rng(0)
    lengths = np.array([[time], [4], [9], [1]])
    places = np.arange(time)[None, :] if side == "right" else np.arange(time - 1, -1, -1)[None, :]
    mask = (places < lengths).astype(np.int64)
    return {"input_ids": np.where(mask > 0, rng.integers(5, VOCABULARY, mask.shape), 3), "attention_mask": mask}


def reference(folder: Path) -> Any:
    """Every tensor that the class has, and no other."""
    loader = transformers.AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def theirs(model: Any, batch: dict[str, np.ndarray]) -> Any:
    return model(**{name: torch.tensor(array) for name, array in batch.items()})


def assert_close(ours: Any, theirs: Any, mask: np.ndarray | None = None) -> None:
    ours, theirs = np.asarray(ours), theirs.numpy()
    if mask is not None:  # at padding there is nothing to compare
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert np.abs(theirs).max() > 100 * TOLERANCE  # the comparison says something


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=[f"{family}-{config}" for family, config in CONFIGS])
def test_logits_of_random_weights(tmp_path: Path, number: int):
    """Rows of 17 tokens, past every sliding window, padded on either side; every second configuration scanned."""
    family, config = CONFIGS[number]
    folder, batch = write(tmp_path, family, config), random_batch("both")
    model = models.load(folder, task="causal-lm", scan_layers=number % 2 == 1)
    expected = theirs(reference(folder), batch).logits
    assert_close(jax.jit(model.apply)(model.params, **batch), expected, batch["attention_mask"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_hidden_states_and_no_mask(tmp_path: Path, family: str):
    folder = write(tmp_path, family, bare=True)
    ids = {"input_ids": random_batch()["input_ids"]}
    model = models.load(folder)
    expected = transformers.AutoModel.from_pretrained(folder).eval()
    assert_close(jax.jit(model.apply)(model.params, **ids), theirs(expected, ids).last_hidden_state)


@pytest.mark.parametrize(
    ("family", "config", "time"),
    [
        ("gpt2", {}, 48),
        ("llama", {}, 200),
        ("llama", {"rope_scaling": LLAMA_3, "head_dim": 16}, 200),
        ("qwen2", {}, 64),
    ],
)
def test_long_positions(tmp_path: Path, family: str, config: dict[str, Any], time: int):
    """To the end of GPT-2's table; with a rotation beyond `max_position_embeddings`, as there."""
    folder, batch = write(tmp_path, family, config), random_batch(time=time)
    model = models.load(folder, task="causal-lm")
    expected = theirs(reference(folder), batch).logits
    assert_close(jax.jit(model.apply)(model.params, **batch), expected, batch["attention_mask"])


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_positions_that_are_passed(tmp_path: Path, family: str):
    folder, batch = write(tmp_path, family), random_batch("left")
    batch["position_ids"] = np.maximum(np.cumsum(batch["attention_mask"], axis=1) - 1, 0)
    model = models.load(folder, task="causal-lm")
    expected = theirs(reference(folder), batch).logits
    assert_close(jax.jit(model.apply)(model.params, **batch), expected, batch["attention_mask"])


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_bfloat16_stays_near_theirs(tmp_path: Path, family: str):
    """They round at other places. Ours are 1 % of the largest logit apart in the mean, and as near to float32."""
    folder, batch = write(tmp_path, family), random_batch()
    model = models.load(folder, task="causal-lm", dtype="bfloat16")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    mask = batch["attention_mask"] > 0
    exact = theirs(reference(folder), batch).logits.numpy()[mask]
    expected = theirs(half, batch).logits.float().numpy()[mask]
    found = np.asarray(jax.jit(model.apply)(model.params, **batch))[mask]
    assert np.abs(found - expected).mean() < 1e-2 * np.abs(exact).max()
    assert np.abs(found - exact).mean() < 1.2 * np.abs(expected - exact).mean()


@every_family
def test_a_saved_model_gives_equal_logits_in_transformers(tmp_path: Path, family: str):
    base = write(tmp_path / "base", family)
    model = models.load(base, task="causal-lm", scan_layers=family in ("gpt2", "qwen3"))
    params = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    size = "8kB" if family in ("gpt2", "llama") else "5GB"  # in many files, in one
    folder = models.save_pretrained(tmp_path / "out", model, params, source=base, max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (size == "8kB")
    batch = random_batch("left")
    loaded = reference(folder)
    assert type(loaded).__name__ == CLASSES[family]
    assert_close(jax.jit(model.apply)(params, **batch), theirs(loaded, batch).logits, batch["attention_mask"])


@pytest.mark.parametrize(("family", "tied"), [*zip(FAMILIES, (True, False, True, False, True), strict=True)])
def test_a_model_saved_by_transformers_gives_equal_logits_here(tmp_path: Path, family: str, tied: bool):
    """Its configuration too is written anew, with version 5's entries; in several files, and in bfloat16."""
    base = write(tmp_path / "base", family, {"tie_word_embeddings": tied})
    model = reference(base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "out", max_shard_size="8kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ours, batch = models.load(tmp_path / "out", task="causal-lm"), random_batch()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = theirs(again, batch).logits
    assert_close(jax.jit(ours.apply)(ours.params, **batch), expected, batch["attention_mask"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_gradients_are_those_of_pytorch(tmp_path: Path, family: str):
    """One loss on a padded batch; every leaf, under the Hugging Face name that the table gives it."""
    folder, batch = write(tmp_path, family), random_batch()
    model, other = models.load(folder, task="causal-lm"), reference(folder)
    weights = np.random.default_rng(1).normal(size=(4, 17, VOCABULARY)).astype(np.float32)
    weights *= batch["attention_mask"][:, :, None] / 50
    with torch.enable_grad():
        (theirs(other, batch).logits * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, **batch) * jnp.asarray(weights, jnp.float32)).sum()))(
        model.params
    )
    tensors = dict(other.named_parameters())
    for path, grad in leaves_by_path(grads).items():
        module = model.names[path]
        module = module if isinstance(module, str) else module[0]  # a tied head has no parameter of its own
        tensor = tensors[f"{module}.{'bias' if path.endswith('bias') else 'weight'}"].grad.numpy()
        turned = path.endswith("kernel") and (family != "gpt2" or path.startswith("lm_head"))
        tensor = tensor.T if turned else tensor
        np.testing.assert_allclose(grad, tensor, atol=1e-5 + 1e-4 * np.abs(tensor).max(), err_msg=path)


# ----------------------------------------------------------------------------------------------------------- generation


def generated(model: Any, batch: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    """Their new tokens; cut where every row has ended."""
    inputs = {name: torch.tensor(array) for name, array in batch.items()}
    time = batch["input_ids"].shape[1]
    return model.generate(**inputs, do_sample=False, use_cache=True, **options)[:, time:].numpy()


def assert_equal_tokens(ours: models.Generated, theirs: np.ndarray, padding: int) -> None:
    tokens = np.asarray(ours.tokens)
    np.testing.assert_array_equal(tokens[:, : theirs.shape[1]], theirs)
    assert (tokens[:, theirs.shape[1] :] == padding).all()
    assert int(ours.lengths.max()) <= theirs.shape[1]


@every_family
def test_greedy_generation_token_by_token(tmp_path: Path, family: str):
    folder, batch = write(tmp_path, family), random_batch("left", time=11)
    model = models.load(folder, task="causal-lm", scan_layers=family in ("llama", "qwen2"))
    other = reference(folder)
    other.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 16, "pad_token_id": 3}
    expected = generated(other, batch, **options)
    found = models.generate(model, model.params, **batch, **options)
    assert_equal_tokens(found, expected, 3)
    # Two tokens end a text: the third of the first row and the fifth of the second.
    options["eos_token_id"] = [int(expected[0, 2]), int(expected[1, 4])]
    found = models.generate(model, model.params, **batch, **options)
    assert_equal_tokens(found, generated(other, batch, **options), 3)
    assert int(found.lengths.min()) <= 3


@pytest.mark.parametrize(
    ("family", "beams", "penalty"),
    [("gpt2", 2, 1.0), ("llama", 4, 0.0), ("mistral", 3, 2.0), ("qwen2", 4, -1.0), ("qwen3", 3, 0.5)],
)
def test_beam_search_token_by_token(tmp_path: Path, family: str, beams: int, penalty: float):
    folder, batch = write(tmp_path, family), random_batch("left", time=11)
    model, other = models.load(folder, task="causal-lm", scan_layers=True), reference(folder)
    other.generation_config.eos_token_id = None
    options: dict[str, Any] = {"num_beams": beams, "length_penalty": penalty, "max_new_tokens": 10, "pad_token_id": 3}
    expected = generated(other, batch, **options)
    found = models.generate(model, model.params, **batch, **options)
    assert_equal_tokens(found, expected, 3)
    greedy = models.generate(model, model.params, **batch, max_new_tokens=10)
    assert (greedy.tokens != found.tokens).any()
    # Ends that the beams meet, in the middle of a row and at once.
    options["eos_token_id"] = [int(expected[0, 5]), int(greedy.tokens[1, 0]), int(greedy.tokens[2, 3])]
    found = models.generate(model, model.params, **batch, **options)
    assert_equal_tokens(found, generated(other, batch, **options), 3)
    assert penalty > 1 or int(found.lengths.min()) < 10  # a row has ended


@pytest.mark.parametrize(("beams", "size"), [(1, 2), (3, 2), (3, 3), (1, 1)])
def test_no_run_of_tokens_comes_twice(tmp_path: Path, beams: int, size: int):
    folder = write(tmp_path, "gpt2")
    batch = {"input_ids": np.random.default_rng(2).integers(4, VOCABULARY, (3, 6))}
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    model, other = models.load(folder, task="causal-lm"), reference(folder)
    other.generation_config.eos_token_id = None
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 30, "pad_token_id": 3}
    found = models.generate(model, model.params, **batch, **options, no_repeat_ngram_size=size)
    assert_equal_tokens(found, generated(other, batch, **options, no_repeat_ngram_size=size), 3)
    assert (found.tokens != models.generate(model, model.params, **batch, **options).tokens).any()


def test_an_adapted_model_generates_what_its_merged_folder_does_there(tmp_path: Path):
    base = write(tmp_path / "base", "gpt2")
    model = models.load(base, task="causal-lm", scan_layers=True)
    batch = random_batch("left", time=11)
    method = lj.LoRA(rank=2, alpha=4, targets="all-linear")
    uses = lj.trace_weights(model.apply, model.params, batch["input_ids"])
    params = lj.attach(model.params, method, key=jax.random.key(0), uses=uses)
    rng, mask = np.random.default_rng(2), lj.trainable_mask(params, method)
    params = jax.tree.map(lambda x, own: x + rng.normal(0, 0.3, x.shape).astype(np.float32) if own else x, params, mask)
    folder = models.save_pretrained(tmp_path / "out", model, lj.merge_params(params), source=base)
    apply, other = lj.adapt(model.apply, on_materialize="error"), reference(folder)
    searches: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})
    for options in searches:
        found = models.generate(apply, params, **batch, max_new_tokens=10, eos_token_id=2, **options)
        expected = generated(other, batch, max_new_tokens=10, eos_token_id=2, pad_token_id=2, **options)
        assert_equal_tokens(found, expected, 2)
        plain = models.generate(model, model.params, **batch, max_new_tokens=10, eos_token_id=2, **options)
        assert (plain.tokens != found.tokens).any()


def test_what_top_k_and_top_p_keep():
    logits = np.random.default_rng(0).normal(0, 3, (6, 40)).astype(np.float32)
    logits[0, :5] = logits[0].max()  # a tie at the edge
    for top_k, top_p in ((3, None), (None, 0.7), (None, 0.05), (10, 0.9), (60, 0.999)):
        expected = torch.tensor(logits)
        if top_k is not None:
            expected = transformers.TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = transformers.TopPLogitsWarper(top_p)(None, expected)
        found = np.asarray(keep_probable(jnp.asarray(logits), top_k=top_k, top_p=top_p))
        np.testing.assert_array_equal(found[1:], expected.numpy()[1:])
        if top_p is None:
            np.testing.assert_array_equal(found, expected.numpy())
