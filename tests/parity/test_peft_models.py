"""Every bundled family against the real PEFT: its adapters here, ours there, to 1e-4 in the logits.

BERT has a file of its own, `test_peft_files.py`, with every entry of the configuration.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.files import read_safetensors
from lora_jax.interop import export_peft, import_peft, read_peft_config
from tests import tiny_decoders, tiny_encoders

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It announces what it writes when an embedding is a target, what it finds of tied ones, and other layers' layouts.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # Modules and biases are trained there as a whole.
    pytest.mark.filterwarnings("ignore:PEFT saves and trains modules as a whole:UserWarning"),
]

TOLERANCE = 1e-4
WEIGHTS = "adapter_model.safetensors"
LABELS, LAYERS, RANK = 3, 2, 3
ENCODERS = ("roberta", "xlm-roberta", "distilbert")
DECODERS = tiny_decoders.FAMILIES
ROBERTA: dict[str, dict[str, Any]] = {
    "query and value": {"target_modules": ["query", "value"]},
    "all linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["word_embeddings", "position_embeddings", "key"]},
    "patterns": {
        "target_modules": ["query", "value", "intermediate.dense"],
        "rank_pattern": {"layer.0.attention.self.query": 5, "value": 2},
        "alpha_pattern": {"^roberta.encoder.layer.1.attention.self.query": 5, "intermediate.dense": 9},
        "use_rslora": True,
    },
    "biases": {"target_modules": ["query", "output.dense"], "bias": "lora_only"},
    "whole": {"target_modules": ["key"], "bias": "all", "lora_dropout": 0.2},
}
LLAMA: dict[str, dict[str, Any]] = {
    "query and value": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "gate_proj": 2},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 5, "o_proj": 9},
        "use_rslora": True,
    },
    "biases": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "whole": {"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["lm_head", "norm", "mlp.up_proj"]},
}
# What PEFT is asked for by family: its `LoraConfig`, beside `r` and `lora_alpha`.
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "roberta": ROBERTA,
    "xlm-roberta": {name: ROBERTA[name] for name in ("all linear", "patterns")},
    "distilbert": {
        "query and value": {"target_modules": ["q_lin", "v_lin"]},
        # Without the exclusion PEFT stops: its `classifier` means `pre_classifier` too.
        "all linear": {"target_modules": "all-linear", "exclude_modules": ["pre_classifier"]},
        "embeddings": {"target_modules": ["word_embeddings", "position_embeddings", "k_lin"]},
        "patterns": {
            "target_modules": ["q_lin", "out_lin", "lin1"],
            "rank_pattern": {"layer.0.attention.q_lin": 5, "lin1": 2},
            "alpha_pattern": {"^distilbert.transformer.layer.1.attention.q_lin": 5, "out_lin": 9},
            "use_rslora": True,
        },
        "biases": {"target_modules": ["q_lin", "lin2"], "bias": "lora_only"},
        "whole": {"target_modules": ["k_lin"], "bias": "all"},
    },
    "gpt2": {
        "query and value": {"target_modules": ["c_attn"]},
        "all linear": {"target_modules": "all-linear"},
        "embeddings": {"target_modules": ["wpe", "c_fc"]},
        "patterns": {
            "target_modules": ["c_attn", "c_proj"],
            "rank_pattern": {"h.0.attn.c_attn": 5, "mlp.c_proj": 2},
            "alpha_pattern": {"^transformer.h.1.attn.c_attn": 5, "attn.c_proj": 9},
            "use_rslora": True,
        },
        "biases": {"target_modules": ["c_attn"], "bias": "lora_only"},
        "whole": {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["attn.c_proj", "ln_f"]},
    },
    "llama": LLAMA,
    # Of one file and one table of names with Llama; Mistral has no biases.
    "mistral": {name: LLAMA[name] for name in ("all linear", "embeddings", "patterns")},
    "qwen2": {name: LLAMA[name] for name in ("query and value", "all linear", "patterns", "biases", "whole")},
    "qwen3": {name: LLAMA[name] for name in ("all linear", "embeddings", "biases")},
}
# Biases where a family may have them.
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
CASES = [(family, kind) for family, kinds in ADAPTERS.items() for kind in kinds]
# All layers alike: in a stack as well.
STACKED = [*((family, "all linear") for family in DECODERS), ("gpt2", "whole"), ("llama", "whole")]


@pytest.fixture(autouse=True)
def _exact_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A tiny folder of each family, an encoder's with a head; `gpt2-tied` and `qwen2-tied` tie theirs."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        family = name.removesuffix("-tied")
        if family in DECODERS:
            layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}
            tied = family == "gpt2" or name != family
            options = {"tie_word_embeddings": tied, **BIASES.get(family, {}), **layers}
            return tiny_decoders.write_tiny_decoder(folder, family, seed=4, **options)
        source = tiny_encoders.write_tiny(folder / "source", family, seed=5, layers=LAYERS)
        model = models.load(source, task="classification", num_labels=LABELS)
        head = jax.tree.map(lambda leaf: 15 * leaf + 0.1, model.params["classifier"])
        params = {**model.params, "classifier": head}
        return models.save_pretrained(folder / "base", model, params, source=source)

    return make


def is_decoder(family: str) -> bool:
    return family.removesuffix("-tied") in DECODERS


@functools.cache
def loaded(folder: Path, **options: Any) -> models.Model:
    """Equal options give the same function, so what is compiled of the plain one is shared."""
    return models.load(folder, **options)


def load(bases: Bases, family: str, **options: Any) -> models.Model:
    return loaded(bases(family), task="causal-lm" if is_decoder(family) else "classification", **options)


@functools.cache
def jitted(apply: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(apply)


def batch(family: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    padding = {"roberta": 1, "xlm-roberta": 1}.get(family, 0)
    lengths, places = np.array([[8], [3], [6]]), np.arange(8)[None, :]
    mask = (places < lengths).astype(np.int64)
    return {"input_ids": np.where(mask > 0, rng.integers(5, 90, mask.shape), padding), "attention_mask": mask}


def seen(family: str, logits: np.ndarray) -> np.ndarray:
    """At padding there is nothing to compare."""
    return logits[batch(family)["attention_mask"] > 0] if is_decoder(family) else logits


def reference(folder: Path, family: str) -> Any:
    name = "AutoModelForCausalLM" if is_decoder(family) else "AutoModelForSequenceClassification"
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model: Any, family: str) -> np.ndarray:
    inputs = {name: torch.tensor(array) for name, array in batch(family).items()}
    return seen(family, model.eval()(**inputs).logits.numpy())


def our_logits(model: models.Model, params: Any, family: str) -> np.ndarray:
    """Factored throughout, and equal to the merged model's."""
    factored = np.asarray(jax.jit(lj.adapt(model.apply, on_materialize="error"))(params, **batch(family)))
    merged = np.asarray(jitted(model.apply)(lj.merge_params(params), **batch(family)))
    np.testing.assert_allclose(seen(family, factored), seen(family, merged), atol=TOLERANCE)
    return seen(family, factored)


def randomized(model: Any) -> Any:
    """Every trained parameter far from its start; factors that PEFT ties stay tied."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def peft_adapter(base: Path, family: str, folder: Path, **settings: Any) -> np.ndarray:
    """Has PEFT make an adapter and save it; returns its logits."""
    plain = reference(base, family)
    before = their_logits(plain, family)
    task_type = "CAUSAL_LM" if is_decoder(family) else "SEQ_CLS"
    conv1d = {"fan_in_fan_out": True} if family.startswith("gpt2") else {}
    config = peft.LoraConfig(r=RANK, lora_alpha=6, task_type=task_type, **conv1d, **settings)
    model = randomized(peft.get_peft_model(plain, config))
    model.save_pretrained(folder)
    logits = their_logits(model, family)
    assert np.abs(logits - before).max() > 100 * TOLERANCE
    return logits


def assert_goes_out_as_it_came(folder: Path, again: Path) -> None:
    """Bit for bit, copies aside that PEFT's file has of the base and of saved biases."""
    first, second = read_safetensors(folder / WEIGHTS), read_safetensors(again / WEIGHTS)
    assert second.keys() <= first.keys()
    for name in first.keys() - second.keys():
        assert re.search(r"original_module|modules_to_save|_embeddings\.base_|(embed_tokens|lm_head|wte)\.base_", name)
    for name, array in second.items():
        assert array.dtype == first[name].dtype
        assert array.tobytes() == first[name].tobytes(), name
    ours, theirs = peft.LoraConfig.from_pretrained(again), peft.LoraConfig.from_pretrained(folder)
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "task_type", "base_model_name_or_path"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("family", "kind", "stacked"),
    [*((*case, False) for case in CASES), *((*case, True) for case in STACKED)],
)
def test_an_adapter_of_pefts_gives_equal_logits_here_and_goes_out_as_it_came(
    bases: Bases, tmp_path: Path, family: str, kind: str, stacked: bool
) -> None:
    base = bases(family)
    theirs = peft_adapter(base, family, tmp_path / "theirs", **ADAPTERS[family][kind])
    model = load(bases, family, **({"scan_layers": True} if stacked else {}))
    params, method = import_peft(tmp_path / "theirs", model.params, base_name=str(base), names=model.names)
    np.testing.assert_allclose(our_logits(model, params, family), theirs, atol=TOLERANCE)

    config = read_peft_config(tmp_path / "theirs")
    again = export_peft(tmp_path / "again", params, method, config=config, names=model.names)
    assert_goes_out_as_it_came(tmp_path / "theirs", again)
    there = peft.PeftModel.from_pretrained(reference(base, family), again)
    np.testing.assert_allclose(their_logits(there, family), theirs, atol=1e-5)

    if kind == "all linear":  # the folder that `lora-jax merge` writes
        merged = models.save_pretrained(tmp_path / "merged", model, lj.merge_params(params), source=base)
        np.testing.assert_allclose(their_logits(reference(merged, family), family), theirs, atol=TOLERANCE)


METHODS: dict[str, dict[str, Any]] = {
    "attention": {
        "targets": "attention",
        "rank_overrides": {"attention/output": 5},
        "alpha_overrides": {"attention/output": 2.5},
        "scaling": "rank_stabilized",
    },
    "all linear and more": {"targets": "all-linear", "also_train": ("norm",)},
    "embeddings": {"targets": ("word", "mlp/down")},
    # Square: a wrong transpose has the right shape.
    "a square weight in full": {"targets": ("mlp/up",), "also_train": ("attention/output/kernel",)},
}
# The families of one table of names have one row each in full.
OURS = [
    *(
        (family, kind, False)
        for family in ("roberta", "distilbert", "gpt2", "llama")
        for kind in ("attention", "all linear and more", "embeddings")
    ),
    *((family, "a square weight in full", False) for family in ("gpt2", "llama")),
    *((family, "all linear and more", False) for family in ("xlm-roberta", "mistral", "qwen2", "qwen3")),
    *((family, "attention", True) for family in ("gpt2", "qwen3")),
]
HEADS = {**dict.fromkeys(ENCODERS, "classifier"), **dict.fromkeys(DECODERS[1:], "lm_head")}


@pytest.mark.parametrize(("family", "kind", "stacked"), OURS)
def test_an_adapter_of_ours_gives_equal_logits_there(
    bases: Bases, tmp_path: Path, family: str, kind: str, stacked: bool
) -> None:
    """With the head in full, where there is one of its own."""
    model = load(bases, family, **({"scan_layers": True} if stacked else {}))
    settings = dict(METHODS[kind])
    if family in HEADS:
        settings["also_train"] = (*settings.get("also_train", ()), HEADS[family])
    method = lj.LoRA(rank=RANK, alpha=6, **settings)
    uses = lj.trace_weights(model.apply, model.params, **batch(family)) if stacked else None
    params = moved(lj.attach(model.params, method, key=jax.random.key(0), uses=uses), method)
    task_type = "CAUSAL_LM" if is_decoder(family) else "SEQ_CLS"
    folder = export_peft(tmp_path / "ours", params, method, task_type=task_type, names=model.names)
    there = peft.PeftModel.from_pretrained(reference(bases(family), family), folder)
    ours = our_logits(model, params, family)
    np.testing.assert_allclose(their_logits(there, family), ours, atol=TOLERANCE)
    start = seen(family, np.asarray(jitted(model.apply)(model.params, **batch(family))))
    assert np.abs(ours - start).max() > 100 * TOLERANCE
    # What PEFT saves of it comes back.
    there.save_pretrained(tmp_path / "saved")
    back = import_peft(tmp_path / "saved", model.params, names=model.names)
    for path, leaf in lj.paths.leaves_by_path(lj.merge_params(params)).items():
        np.testing.assert_array_equal(lj.paths.leaves_by_path(lj.merge_params(back.params))[path], leaf, err_msg=path)


def moved(params: Any, method: lj.Method) -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf, moves: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) if moves else leaf,
        params,
        lj.trainable_mask(params, method),
    )


# Embeddings that are the output as well.

TIED = {"gpt2-tied": ("transformer.wte", "lm_head"), "qwen2-tied": ("model.embed_tokens", "lm_head")}
every_tie = pytest.mark.parametrize("family", TIED)


@pytest.mark.parametrize(
    ("family", "entry", "uses"),
    [
        ("gpt2-tied", "target_modules", ["words"]),
        ("gpt2-tied", "target_modules", ["head"]),
        ("gpt2-tied", "modules_to_save", ["words", "head"]),
        ("qwen2-tied", "target_modules", ["words", "head"]),
        ("qwen2-tied", "modules_to_save", ["words"]),
        ("qwen2-tied", "modules_to_save", ["head"]),
    ],
)
def test_one_use_of_tied_embeddings_is_refused_and_goes_into_an_untied_model(
    bases: Bases, tmp_path: Path, family: str, entry: str, uses: list[str]
) -> None:
    """PEFT adapts or copies each of the two alone; one leaf can't be both."""
    words, head = TIED[family]
    settings = {entry: [{"words": words, "head": head}[use] for use in uses]}
    other = {"target_modules": ["c_attn" if family == "gpt2-tied" else "q_proj"]}
    theirs = peft_adapter(bases(family), family, tmp_path / "theirs", **{**other, **settings})
    tied = load(bases, family)
    message = rf"is {words} and {head} at once, and PEFT changes each by itself.*tie_word_embeddings=False"
    with pytest.raises(lj.AdapterError, match=message):
        import_peft(tmp_path / "theirs", tied.params, names=tied.names)

    model = load(bases, family, tie_word_embeddings=False)
    params, method = import_peft(tmp_path / "theirs", model.params, names=model.names)
    np.testing.assert_allclose(our_logits(model, params, family), theirs, atol=TOLERANCE)
    config = read_peft_config(tmp_path / "theirs")
    again = export_peft(tmp_path / "again", params, method, names=model.names, config=config)
    assert_goes_out_as_it_came(tmp_path / "theirs", again)
    there = peft.PeftModel.from_pretrained(reference(bases(family), family), again)
    np.testing.assert_allclose(their_logits(there, family), theirs, atol=1e-5)
    merged = models.save_pretrained(tmp_path / "merged", model, lj.merge_params(params), source=bases(family))
    np.testing.assert_allclose(their_logits(reference(merged, family), family), theirs, atol=TOLERANCE)


@every_tie
@pytest.mark.parametrize("entry", ["target_modules", "modules_to_save"])
def test_shared_changes_of_tied_embeddings_are_one_leaf_s(
    bases: Bases, tmp_path: Path, family: str, entry: str
) -> None:
    other = {"target_modules": ["c_attn" if family == "gpt2-tied" else "q_proj"]}
    settings = {**other, entry: [*other.get(entry, []), "lm_head"], "ensure_weight_tying": True}
    theirs = peft_adapter(bases(family), family, tmp_path / "theirs", **settings)
    model = load(bases, family)
    params, method = import_peft(tmp_path / "theirs", model.params, names=model.names)
    np.testing.assert_allclose(our_logits(model, params, family), theirs, atol=TOLERANCE)
    again = export_peft(
        tmp_path / "again", params, method, names=model.names, config=read_peft_config(tmp_path / "theirs")
    )
    assert_goes_out_as_it_came(tmp_path / "theirs", again)
    # PEFT itself doesn't find its own folder of a GPT-2 tied when it loads it; ours it does.
    there = peft.PeftModel.from_pretrained(reference(bases(family), family), again)
    np.testing.assert_allclose(their_logits(there, family), theirs, atol=1e-5)
    untied = load(bases, family, tie_word_embeddings=False)
    with pytest.raises(
        lj.AdapterError, match=r"`ensure_weight_tying`: adapters shared by tied layers, and `names` has"
    ):
        import_peft(tmp_path / "theirs", untied.params, names=untied.names)


@every_tie
@pytest.mark.parametrize(
    "settings", [{"targets": ("word",)}, {"targets": "attention", "also_train": ("word",)}], ids=str
)
def test_ours_of_tied_embeddings_gives_equal_logits_there(
    bases: Bases, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = load(bases, family)
    method = lj.LoRA(
        rank=RANK, alpha=6, alpha_overrides={"word": 2} if settings["targets"] == ("word",) else {}, **settings
    )
    params = moved(lj.attach(model.params, method, key=jax.random.key(0)), method)
    folder = export_peft(tmp_path, params, method, names=model.names, task_type="CAUSAL_LM")
    there = peft.PeftModel.from_pretrained(reference(bases(family), family), folder)
    ours = our_logits(model, params, family)
    np.testing.assert_allclose(their_logits(there, family), ours, atol=TOLERANCE)
    back = import_peft(folder, model.params, names=model.names)
    np.testing.assert_allclose(our_logits(model, back.params, family), ours, atol=1e-6)
