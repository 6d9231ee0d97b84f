"""What `lora-jax convert` and `merge` write, PEFT and transformers load, with equal logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.training.examples import Columns
from lora_jax.training.task import Classification
from lora_jax.training.task_file import TaskFile, save_task_adapter
from tests.tiny_bert import write_tiny_bert
from tests.tiny_decoders import FAMILIES as DECODERS
from tests.tiny_decoders import write_tiny_decoder
from tests.tiny_encoders import FAMILIES as ENCODERS
from tests.tiny_encoders import write_tiny

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE, LABELS = 1e-4, 3
IDS = np.array([[5, 17, 60, 33, 8], [9, 44, 45, 7, 21]])


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def run(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def write_base(folder: Path, family: str) -> Path:
    return (write_tiny if family in ENCODERS else write_tiny_decoder)(folder, family, seed=5)


def options(family: str) -> dict[str, Any]:
    return {"task": "causal-lm"} if family in DECODERS else {"task": "classification", "num_labels": LABELS}


def moved(params: Any, method: lj.Method) -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf, moves: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) if moves else leaf,
        params,
        lj.trainable_mask(params, method),
    )


def write_adapter(folder: Path, base: Path, family: str, **settings: Any) -> tuple[list[Any], np.ndarray]:
    """A trained adapter as a run leaves it, or, of a decoder, as `save_adapter` does: its flags, and its logits."""
    model = lj.models.load(base, **options(family))
    head = ("mlp/norm",) if family in DECODERS else ("classifier",)
    method = lj.LoRA(**{"rank": 4, "alpha": 6, "targets": "all-linear", "also_train": head, **settings})
    params = moved(lj.attach(model.params, method, key=jax.random.key(0)), method)
    flags = ["--adapter", folder]
    if family in ENCODERS:
        task = Classification(labels=tuple("abc"))
        told = TaskFile(base=str(base), task=task, pooling="first", max_length=32, dtype="float32", columns=Columns())
        save_task_adapter(folder, params, method, told)
    else:
        lj.save_adapter(folder, params, method)
        flags += ["--base", base]
    logits = np.asarray(lj.adapt(model.apply)(params, IDS))
    assert np.abs(logits - np.asarray(model.apply(model.params, IDS))).max() > 100 * TOLERANCE
    return flags, logits


def auto(family: str) -> Any:
    return transformers.AutoModelForCausalLM if family in DECODERS else transformers.AutoModelForSequenceClassification


def reference(base: Path, family: str) -> Any:
    extra = {} if family in DECODERS else {"num_labels": LABELS}
    return auto(family).from_pretrained(base, dtype=torch.float32, **extra).eval()


def their_logits(model: Any) -> np.ndarray:
    return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_converted_and_merged_folders_give_equal_logits_there(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / "base", family)
    flags, ours = write_adapter(tmp_path / "ours", base, family)
    run("convert", *flags, "--to", "peft", "--output", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(reference(base, family), tmp_path / "peft")
    np.testing.assert_allclose(their_logits(model), ours, atol=TOLERANCE)

    run("merge", *flags, "--output", tmp_path / "merged")
    merged, report = auto(family).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    np.testing.assert_allclose(their_logits(merged), ours, atol=TOLERANCE)
    if family in ENCODERS:
        assert list(merged.config.id2label.values()) == ["a", "b", "c"]

    # What PEFT makes of it comes back, and merges here as well.
    model.save_pretrained(tmp_path / "saved")
    run("merge", "--adapter", tmp_path / "saved", "--base", base, "--output", tmp_path / "again")
    np.testing.assert_allclose(their_logits(auto(family).from_pretrained(tmp_path / "again")), ours, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_lower_rank_is_numpys_there(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / "base", family)
    flags, _ = write_adapter(
        tmp_path / "ours", base, family, alpha_overrides={"mlp/up": 3}, rank_overrides={"mlp/up": 5}
    )
    for name, more in (("whole", ()), ("cut", ("--rank", 2))):
        run("convert", *flags, "--to", "peft", "--output", tmp_path / name, *more)
    before = reference(base, family).state_dict()
    whole, cut = (
        peft.PeftModel.from_pretrained(reference(base, family), tmp_path / name).merge_and_unload().state_dict()
        for name in ("whole", "cut")
    )
    compared = 0
    for name, tensor in before.items():
        delta = (whole[name] - tensor).double().numpy()
        if delta.ndim == 2 and delta.any() and "classifier" not in name:
            u, sigma, vt = np.linalg.svd(delta)
            best = (u[:, :2] * sigma[:2]) @ vt[:2]
            np.testing.assert_allclose((cut[name] - tensor).numpy(), best, atol=TOLERANCE, err_msg=name)
            compared += 1
    assert compared == (12 if family == "bert" else 4 * reference(base, family).config.n_layer)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "qwen2"])
def test_a_lora_out_of_two_models_gives_the_tuned_logits_there(tmp_path: Path, family: str) -> None:
    """Every parameter has been changed by transformers' own optimizer-like step; of full rank nothing is lost."""
    base = write_base(tmp_path / "base", family)
    tuned = reference(base, family)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "emb" not in name and "wte" not in name and "wpe" not in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "tuned")
    how = ("--base", base, "--tuned", tmp_path / "tuned", "--to", "peft", "--energy", 1)
    run("convert", *how, "--output", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(reference(base, family), tmp_path / "peft")
    np.testing.assert_allclose(their_logits(model), their_logits(tuned), atol=TOLERANCE)
    # Of a lower rank something is.
    run("convert", *how, "--rank", 1, "--output", tmp_path / "one")
    model = peft.PeftModel.from_pretrained(reference(base, family), tmp_path / "one")
    assert np.abs(their_logits(model) - their_logits(tuned)).max() > 10 * TOLERANCE


def test_a_pooler_that_the_base_lacks_goes_along(tmp_path: Path) -> None:
    """It was drawn here; PEFT would draw another."""
    base = write_tiny_bert(tmp_path / "base", seed=5, pooler=False)
    with pytest.warns(UserWarning, match="has no pooler, so a new one was drawn"):
        flags, ours = write_adapter(tmp_path / "ours", base, "bert")
    with pytest.warns(UserWarning, match="has no pooler, so a new one was drawn"):
        run("convert", *flags, "--to", "peft", "--output", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(reference(base, "bert"), tmp_path / "peft")
    np.testing.assert_allclose(their_logits(model), ours, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trained_embeddings_that_are_the_head(tmp_path: Path, family: str, capsys: Any) -> None:
    """Changed as one they go out as one; PEFT's change of the lookup alone is merged into an untied model."""
    base = write_tiny_decoder(tmp_path / "base", family, seed=5, tie_word_embeddings=True)
    tuned = reference(base, family)
    tuned.get_input_embeddings().weight.add_(0.3)
    for name, parameter in tuned.named_parameters():
        if "c_attn.weight" in name or "q_proj" in name:
            parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    how = ("--base", base, "--tuned", tmp_path / "tuned", "--rank", 1, "--to")
    run("convert", *how, "peft", "--output", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(reference(base, family), tmp_path / "peft")
    np.testing.assert_allclose(their_logits(model), their_logits(tuned), atol=TOLERANCE)
    run("convert", *how, "delta", "--output", tmp_path / "delta")
    there = reference(base, family)
    after = lj.interop.apply_delta(tmp_path / "delta", there.state_dict())
    there.load_state_dict({name: torch.as_tensor(value) for name, value in after.items()})
    np.testing.assert_allclose(their_logits(there), their_logits(tuned), atol=TOLERANCE)

    module = "wte" if family == "gpt2" else "embed_tokens"
    model = peft.get_peft_model(
        reference(base, family), peft.LoraConfig(target_modules=[module], task_type="CAUSAL_LM")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "theirs")
    run("merge", "--adapter", tmp_path / "theirs", "--base", base, "--output", tmp_path / "merged")
    np.testing.assert_allclose(
        their_logits(reference(tmp_path / "merged", family)), their_logits(model), atol=TOLERANCE
    )
    run("inspect", tmp_path / "theirs", "--base", base)
    assert "lora_jax reads it  yes" in capsys.readouterr().out
    # As an adapter of ours, and back.
    run("convert", "--adapter", tmp_path / "theirs", "--base", base, "--to", "lora_jax", "--output", tmp_path / "own")
    run("convert", "--adapter", tmp_path / "own", "--base", base, "--to", "peft", "--output", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(reference(base, family), tmp_path / "again")
    np.testing.assert_allclose(their_logits(again), their_logits(model), atol=TOLERANCE)
