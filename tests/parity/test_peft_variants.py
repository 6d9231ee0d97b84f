"""LoRA's relatives beside PEFT's, on one model: outputs, gradients, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.interop import export_peft, import_peft, read_peft_config
from lora_jax.paths import leaves_by_path
from tests.models_table import moved

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")

pytestmark = pytest.mark.parity

WORDS, WIDTH, HIDDEN, CLASSES = 11, 8, 12, 3
NAMES = {f"{module}/{name}": module for module in ("up", "down") for name in ("kernel", "bias")}
NAMES |= {"embed/embedding": "embed"}
IDS = np.random.default_rng(0).integers(0, WORDS, (4, 5))
TOLERANCE = 1e-5


class Theirs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Any) -> Any:
        return self.down(torch.tanh(self.up(self.embed(ids))))


def ours(params: Any, ids: Any) -> jax.Array:
    x = jnp.take(params["embed"]["embedding"], ids, axis=0)
    x = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None, None])
    return x @ params["down"]["kernel"] + params["down"]["bias"][None, None]


def theirs() -> Any:
    """The same model each time."""
    torch.manual_seed(0)
    return Theirs()


def base() -> Any:
    state = {name: value.numpy() for name, value in theirs().state_dict().items()}
    linear = {
        module: {"kernel": jnp.asarray(state[f"{module}.weight"].T), "bias": jnp.asarray(state[f"{module}.bias"])}
        for module in ("up", "down")
    }
    return {"embed": {"embedding": jnp.asarray(state["embed.weight"])}, **linear}


def their_output(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).numpy()


apply = lj.adapt(ours, on_materialize="error")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_dora_of_pefts(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Outputs and the gradient of every trained number; and what goes out again is what came in."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "up", "down"], use_dora=True, **settings)
    model = peft.get_peft_model(theirs(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    params, method = import_peft(tmp_path, base(), names=NAMES)
    assert isinstance(method, lj.DoRA)
    np.testing.assert_allclose(apply(params, IDS), their_output(model), atol=TOLERANCE)
    np.testing.assert_allclose(ours(lj.merge_params(params), IDS), their_output(model), atol=TOLERANCE)

    model(torch.tensor(IDS)).square().sum().backward()
    found = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    gradients = jax.grad(lambda params: jnp.sum(apply(params, IDS) ** 2))(params)
    for module, path in (("up", "up/kernel"), ("down", "down/kernel"), ("embed", "embed/embedding")):
        node = leaves_by_path(gradients)[path]
        kinds = ("lora_embedding_A", "lora_embedding_B") if module == "embed" else ("lora_A.weight", "lora_B.weight")
        magnitude = found.get(f"{module}.lora_magnitude_vector.weight")
        wanted = [found[f"{module}.{kinds[0]}"], found[f"{module}.{kinds[1]}"].T, magnitude]
        for ours_, theirs_ in zip((node.a, node.b, node.magnitude), wanted, strict=True):
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=TOLERANCE)

    again = export_peft(tmp_path / "again", params, method, names=NAMES, config=read_peft_config(tmp_path))
    loaded = peft.PeftModel.from_pretrained(theirs(), again)
    np.testing.assert_allclose(their_output(loaded), their_output(model), atol=1e-6)


METHODS = {
    "dora": lj.DoRA(rank=2, alpha=3, targets=("embed", "up", "down")),
    "dora from the principal part": lj.DoRA(rank=2, alpha=3, targets=("up",), init="pissa"),
    "pissa": lj.LoRA(rank=2, alpha=3, targets=("up", "down"), init="pissa", rank_overrides={"down": 1}),
    "olora": lj.LoRA(rank=2, alpha=3, targets=("up",), init="orthogonal", scaling="rank_stabilized"),
    "a frozen a": lj.LoRA(rank=2, alpha=3, targets=("up",), freeze_a=True),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ours_gives_equal_outputs_there(method: Any, tmp_path: Path) -> None:
    start = lj.attach(base(), method, key=jax.random.key(0))
    np.testing.assert_allclose(apply(start, IDS), their_output(theirs()), atol=TOLERANCE)
    params = moved(start, lj.trainable_mask(start, method), seed=1)
    there = peft.PeftModel.from_pretrained(theirs(), export_peft(tmp_path, params, method, names=NAMES))
    found = np.asarray(apply(params, IDS))
    np.testing.assert_allclose(their_output(there), found, atol=TOLERANCE)
    np.testing.assert_allclose(their_output(there.merge_and_unload()), found, atol=TOLERANCE)
    assert np.abs(found - their_output(theirs())).max() > 0.05


@pytest.mark.parametrize(("init", "theirs_"), [("pissa", "pissa"), ("orthogonal", "olora")])
def test_starts_from_the_weight_are_pefts(init: Any, theirs_: str) -> None:
    """Their product, for signs are free."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"], init_lora_weights=theirs_)
    layer = peft.get_peft_model(theirs(), config).base_model.model.up
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    node = lj.attach(base(), lj.LoRA(rank=2, alpha=3, targets=("up",), init=init), key=jax.random.key(0))["up"][
        "kernel"
    ]
    np.testing.assert_allclose(node.a.T @ node.b, product.detach().numpy().T, atol=1e-4)
