"""Merged weights are PEFT's own, both ways, for trees with GPT-2's layout and with Llama's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_safetensors
from lora_jax.interop import export_peft, import_peft, read_peft_config, vllm_problems
from lora_jax.paths import leaves_by_path

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It announces what it writes when an embedding is a target.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

WEIGHTS = "adapter_model.safetensors"
CONV1D = ("c_attn", "c_proj", "c_fc")


def gpt2() -> Any:
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 13, "n_positions": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> Any:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 13,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def tree(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters as a JAX model would have them, and their names."""
    params, names = {}, {}
    for name, module in model.named_modules():
        for part, tensor in module.named_parameters(recurse=False):
            kind = type(module).__name__
            leaf = (
                "bias"
                if part == "bias"
                else {"Embedding": "embedding", "Linear": "kernel", "Conv1D": "kernel"}.get(kind, "scale")
            )
            path = f"{name.replace('.', '_')}/{leaf}"
            array = tensor.detach().numpy()
            params[path] = jnp.asarray(array.T if kind == "Linear" and part == "weight" else array)
            names[path] = name
    nested: dict[str, Any] = {}
    for path, array in params.items():
        module, _, leaf = path.partition("/")
        nested.setdefault(module, {})[leaf] = array
    return nested, names


def there(params: Any, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    result = {}
    for path, leaf in leaves_by_path(lj.merge_params(params)).items():
        conv1d = names[path].endswith(CONV1D)
        array = np.asarray(leaf).T if path.endswith("/kernel") and not conv1d else np.asarray(leaf)
        result[f"{names[path]}.{'bias' if path.endswith('/bias') else 'weight'}"] = array
    return result


def assert_merged(model: Any, ours: Mapping[str, np.ndarray]) -> None:
    theirs = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    assert ours.keys() <= theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, err_msg=name)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "GPT-2, a layer in full": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "Llama": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "Llama, some": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "modules_to_save": ["lm_head"]},
    ),
    "Llama, embeddings": (llama, {"target_modules": ["embed_tokens", "k_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES)
def test_merged_weights_are_pefts(tmp_path: Path, build: Any, settings: dict[str, Any]) -> None:
    model = peft.get_peft_model(seeded(build), peft.LoraConfig(r=3, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "theirs")
    base, names = tree(seeded(build))
    conv1d = CONV1D if settings.get("fan_in_fan_out") else ()
    params, method = import_peft(tmp_path / "theirs", base, names=names, fan_in_fan_out=conv1d)
    assert_merged(model, there(params, names))

    folder = export_peft(
        tmp_path / "again",
        params,
        method,
        names=names,
        fan_in_fan_out=conv1d,
        config=read_peft_config(tmp_path / "theirs"),
    )
    first, second = read_safetensors(tmp_path / "theirs" / WEIGHTS), read_safetensors(folder / WEIGHTS)
    # The base's own embeddings, which PEFT saves along.
    first = {name: array for name, array in first.items() if not name.endswith("embed_tokens.base_layer.weight")}
    assert first.keys() == second.keys()
    assert all(array.tobytes() == second[name].tobytes() for name, array in first.items())
    assert_merged(peft.PeftModel.from_pretrained(seeded(build), folder), there(params, names))
    assert bool(vllm_problems(folder)) == bool(
        {"modules_to_save", "rank_pattern"} & settings.keys() or settings.get("bias", "none") != "none"
    )


def test_another_embedding_in_the_file_is_refused(tmp_path: Path) -> None:
    """As after the vocabulary was changed: the base isn't the one that the adapter was trained on."""
    model = peft.get_peft_model(seeded(llama), peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    base, names = tree(seeded(llama))
    with pytest.raises(
        lj.AdapterError, match=r"embed_tokens.base_layer.weight' is another value of `model_embed_tokens"
    ):
        import_peft(tmp_path, base, names=names)


def test_ours_there(tmp_path: Path) -> None:
    base, names = tree(seeded(gpt2))
    method = lj.LoRA(rank=3, alpha=6, targets=r".*c_(attn|fc)/kernel", also_train=(r"transformer_ln_f",))
    params = lj.attach(base, method, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf, moves: leaf + 0.1 if moves else leaf, params, lj.trainable_mask(params, method))
    folder = export_peft(tmp_path, params, method, names=names, fan_in_fan_out=CONV1D, task_type="CAUSAL_LM")
    assert_merged(peft.PeftModel.from_pretrained(seeded(gpt2), folder), there(params, names))
