"""Adapters that PEFT made give equal logits here, and ours give equal logits there, to 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.files import read_safetensors
from lora_jax.interop import apply_delta, export_delta, export_peft, import_peft, read_peft_config
from lora_jax.paths import leaves_by_path
from tests.tiny_bert import write_tiny_bert

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 1e-4
WEIGHTS = "adapter_model.safetensors"
LABELS, LAYERS = 3, 2
ALL_LINEAR = "all-linear"

# What PEFT is asked for: its `LoraConfig`, beside `r` and `lora_alpha`.
ADAPTERS: dict[str, dict[str, Any]] = {
    "query and value": {"target_modules": ["query", "value"]},
    "all linear": {"target_modules": ALL_LINEAR},
    "an expression": {"target_modules": r"bert\.encoder\.layer\.\d\.(attention\.self\.(key|query)|output\.dense)"},
    "one layer": {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "embeddings": {"target_modules": ["word_embeddings", "position_embeddings", "token_type_embeddings", "key"]},
    "ranks and alphas": {
        "target_modules": ["query", "key", "value", "intermediate.dense"],
        "rank_pattern": {"layer.0.attention.self.query": 7, "value": 2},
        "alpha_pattern": {"^bert.encoder.layer.1.attention.self.query": 5, "key": 9, "layer.1.attention.self.key": 100},
    },
    "rank-stabilized": {
        "target_modules": ["query", "value"],
        "use_rslora": True,
        "rank_pattern": {"query": 3},
        "alpha_pattern": {"value": 6},
    },
    "biases of the targets": {"target_modules": ["query", "output.dense"], "bias": "lora_only"},
    "all biases": {"target_modules": ["query", "value"], "bias": "all"},
    "dropout": {"target_modules": ["query"], "lora_dropout": 0.5},
    "pooler in full": {"target_modules": ["value"], "modules_to_save": ["pooler"]},
    "everything": {
        "target_modules": ["query", "word_embeddings", "intermediate.dense"],
        "bias": "all",
        "use_rslora": True,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"word_embeddings": 1},
    },
}


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head, so that both sides start from one model."""
    source = write_tiny_bert(tmp_path_factory.mktemp("source"), seed=5, layers=LAYERS)
    model = lj.models.load(source, task="classification", num_labels=LABELS)
    head = {"kernel": 20 * model.params["classifier"]["kernel"], "bias": jnp.linspace(-1, 1, LABELS)}
    return lj.models.save_pretrained(
        tmp_path_factory.mktemp("bert") / "base", model, {**model.params, "classifier": head}, source=source
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths, places = np.array([[9], [3], [6]]), np.arange(9)[None, :]
    return {
        "input_ids": np.where(places < lengths, rng.integers(5, 100, (3, 9)), 0),
        "attention_mask": (places < lengths).astype(np.int64),
        "token_type_ids": ((places >= lengths // 2) & (places < lengths)).astype(np.int64),
    }


def reference(base: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()


def their_logits(model: Any) -> np.ndarray:
    return model.eval()(**{name: torch.tensor(array) for name, array in batch().items()}).logits.numpy()


def our_logits(apply: Any, params: Any) -> np.ndarray:
    """Factored throughout, and equal to the merged model's."""
    factored = np.asarray(jax.jit(lj.adapt(apply, on_materialize="error"))(params, **batch()))
    merged = np.asarray(jax.jit(apply)(lj.merge_params(params), **batch()))
    np.testing.assert_allclose(factored, merged, atol=TOLERANCE)
    return factored


def peft_adapter(base: Path, folder: Path, *, task_type: str | None = "SEQ_CLS", **settings: Any) -> np.ndarray:
    """Has PEFT make an adapter, with every trained parameter random, and save it; returns its logits."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type=task_type, **settings)
    model = peft.get_peft_model(reference(base), config)
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    logits = their_logits(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "_B" in name:
            parameter.zero_()
    assert np.abs(their_logits(model) - logits).max() > 100 * TOLERANCE, "the factors must matter"
    return logits


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_of_pefts_gives_equal_logits_here_and_goes_out_as_it_came(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    theirs = peft_adapter(base, tmp_path / "theirs", **settings)
    model = lj.models.load(base, task="classification")
    params, method = import_peft(tmp_path / "theirs", model.params, names=model.names, base_name=str(base))
    np.testing.assert_allclose(our_logits(model.apply, params), theirs, atol=TOLERANCE)

    config = read_peft_config(tmp_path / "theirs")
    folder = export_peft(tmp_path / "again", params, method, names=model.names, config=config)
    first, second = read_safetensors(tmp_path / "theirs" / WEIGHTS), read_safetensors(folder / WEIGHTS)
    # With `bias="all"` PEFT leaves a saved module's biases in the file under two more names, which it doesn't read.
    first = {name: array for name, array in first.items() if not name.endswith(("_module.bias", "to_save.bias"))}
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        assert array.tobytes() == second[name].tobytes(), name
    again = peft.PeftModel.from_pretrained(reference(base), folder)
    np.testing.assert_allclose(their_logits(again), theirs, atol=1e-6)
    ours, said = peft.LoraConfig.from_pretrained(folder), peft.LoraConfig.from_pretrained(tmp_path / "theirs")
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "task_type", "base_model_name_or_path"):
        assert getattr(ours, name) == getattr(said, name)
    assert modules(again, "lora_A") == modules(
        peft.PeftModel.from_pretrained(reference(base), tmp_path / "theirs"), "lora_A"
    )


def modules(model: Any, attribute: str) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, attribute)]


METHODS: dict[str, dict[str, Any]] = {
    "query and value": {"targets": ("query", "value")},
    "all linear": {"targets": "all-linear"},
    "embeddings": {"targets": ("word", "position", "attention/key")},
    "ranks and alphas": {
        "targets": "attention",
        "rank_overrides": {"query": 2, "layers/0/attention/output": 7},
        "alpha_overrides": {"value": 1, "layers/0/attention/output": 2.5},
    },
    "rank-stabilized": {"targets": ("query",), "scaling": "rank_stabilized"},
    "biases of the targets": {"targets": ("query",), "also_train": r"classifier/.*|.*/query/bias"},
    "all biases": {"targets": ("query",), "also_train": r"classifier/kernel|.*bias"},
    "pooler": {"targets": ("mlp/up",), "also_train": ("pooler", "classifier")},
}  # fmt: skip


def moved(params: Any, method: lj.Method) -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf, moves: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) if moves else leaf,
        params,
        lj.trainable_mask(params, method),
    )


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_an_adapter_of_ours_gives_equal_logits_there(
    base: Path, tmp_path: Path, settings: dict[str, Any], task_type: str | None
) -> None:
    model = lj.models.load(base, task="classification")
    method = lj.LoRA(**{"rank": 4, "alpha": 8, "also_train": ("classifier",), **settings})
    start = lj.attach(model.params, method, key=jax.random.key(0))
    params = moved(start, method)
    folder = export_peft(tmp_path, params, method, names=model.names, base_name=str(base), task_type=task_type)
    there = peft.PeftModel.from_pretrained(reference(base), folder)
    ours = our_logits(model.apply, params)
    np.testing.assert_allclose(their_logits(there), ours, atol=TOLERANCE)
    assert np.abs(ours - our_logits(model.apply, start)).max() > 100 * TOLERANCE
    # Merged by PEFT it is the same, and what PEFT saves of it comes back.
    there.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(their_logits(there.merge_and_unload()), ours, atol=TOLERANCE)
    back = import_peft(tmp_path / "saved", model.params, names=model.names)
    np.testing.assert_allclose(our_logits(model.apply, back.params), ours, atol=1e-6)


def test_a_start_is_a_start_there(base: Path, tmp_path: Path) -> None:
    """`b` zero changes nothing on either side, and key names are free of adapter names."""
    model = lj.models.load(base, task="classification")
    method = lj.LoRA(rank=4, alpha=8, targets=("query",))
    params = lj.attach(model.params, method, key=jax.random.key(0))
    folder = export_peft(tmp_path, params, method, names=model.names)
    np.testing.assert_array_equal(
        their_logits(peft.PeftModel.from_pretrained(reference(base), folder)), their_logits(reference(base))
    )
    assert not any("default" in name for name in read_safetensors(folder / WEIGHTS))


def test_bitfit_as_a_delta_gives_equal_logits_there(base: Path, tmp_path: Path) -> None:
    model = lj.models.load(base, task="classification")
    method = lj.BitFit(also_train=("classifier",))
    params = moved(model.params, method)
    folder = export_delta(tmp_path, params, model.params, names=model.names)
    there = reference(base)
    after = apply_delta(folder, there.state_dict())
    there.load_state_dict({name: torch.as_tensor(value) for name, value in after.items()})
    ours = np.asarray(model.apply(params, **batch()))
    np.testing.assert_allclose(their_logits(there), ours, atol=TOLERANCE)
    assert np.abs(their_logits(reference(base)) - ours).max() > 100 * TOLERANCE


# A model of one's own: BERT once more, in Flax's own attention, whose kernels are split into heads.


class Layer(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Foreign(nnx.Module):
    def __init__(self, sizes: Any, rngs: nnx.Rngs) -> None:
        width = sizes.hidden_size
        self.words = nnx.Embed(sizes.vocab_size, width, rngs=rngs)
        self.positions = nnx.Embed(sizes.max_position_embeddings, width, rngs=rngs)
        self.types = nnx.Embed(2, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(width, sizes.num_attention_heads, rngs) for _ in range(LAYERS)])
        self.pooler = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, LABELS, rngs=rngs)

    def __call__(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> jax.Array:
        positions = self.positions(jnp.arange(input_ids.shape[1]))[None]
        x = self.words(input_ids) + positions + self.types(token_type_ids)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, (attention_mask > 0)[:, None, None, :])
        return self.head(jnp.tanh(self.pooler(x[:, 0])))


# The ten lines.
TABLE = {
    "words": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "head": "classifier",
}
IN_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
TABLE |= {
    f"layers/{n}/{ours}": f"bert.encoder.layer.{n}.{theirs}" for n in range(LAYERS) for ours, theirs in IN_LAYER.items()
}


def foreign(base: Path) -> tuple[Any, Any, dict[str, str], dict[str, lj.Use]]:
    """The model's function, the base's weights in it, its names and its uses."""
    sizes = lj.models.load(base, task="classification").config
    graph, state, rest = nnx.split(Foreign(sizes, nnx.Rngs(0)), nnx.Param, ...)

    def apply(params: Any, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> jax.Array:
        return nnx.merge(graph, params, rest)(input_ids, attention_mask, token_type_ids)

    weights = {name: tensor.numpy() for name, tensor in reference(base).state_dict().items()}
    names, filled = {}, []
    for path, leaf in leaves_by_path(state).items():
        module, _, kind = path.rpartition("/")
        names[path] = TABLE[module]
        tensor = weights[f"{TABLE[module]}.{'bias' if kind == 'bias' else 'weight'}"]
        tensor = tensor.T if kind == "kernel" else tensor
        filled.append(jnp.asarray(tensor.reshape(leaf.shape)))
    params = jax.tree.unflatten(jax.tree.structure(state), filled)
    return apply, params, names, lj.trace_weights(apply, params, **batch())


def test_the_foreign_model_is_the_same_function(base: Path) -> None:
    apply, params, _, uses = foreign(base)
    np.testing.assert_allclose(apply(params, **batch()), their_logits(reference(base)), atol=TOLERANCE)
    assert uses["layers/0/attention/query/kernel"].labels == "ioo"
    assert uses["layers/0/attention/out/kernel"].labels == "iio"


@pytest.mark.parametrize("targets", [("query", "value"), "all-linear", ("attention/out", "words", "down")], ids=str)
def test_the_adapter_of_a_foreign_model_gives_equal_logits_there(base: Path, tmp_path: Path, targets: Any) -> None:
    apply, base_params, names, uses = foreign(base)
    method = lj.LoRA(rank=4, alpha=8, targets=targets, also_train=("head",))
    params = moved(lj.attach(base_params, method, key=jax.random.key(0), uses=uses), method)
    folder = export_peft(tmp_path, params, method, names=names, base_name=str(base), task_type="SEQ_CLS")
    ours = our_logits(apply, params)
    np.testing.assert_allclose(
        their_logits(peft.PeftModel.from_pretrained(reference(base), folder)), ours, atol=TOLERANCE
    )
    assert np.abs(ours - np.asarray(apply(base_params, **batch()))).max() > 100 * TOLERANCE
    back = import_peft(folder, base_params, names=names, uses=uses)
    for first, second in zip(jax.tree.leaves(back.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(first, second)


def test_an_adapter_of_pefts_works_in_a_foreign_model(base: Path, tmp_path: Path) -> None:
    theirs = peft_adapter(base, tmp_path, target_modules=ALL_LINEAR, bias="all")
    apply, base_params, names, uses = foreign(base)
    params = import_peft(tmp_path, base_params, names=names, uses=uses).params
    np.testing.assert_allclose(our_logits(apply, params), theirs, atol=TOLERANCE)
