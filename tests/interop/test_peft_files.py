"""PEFT folders there and back. What PEFT itself makes of them is in `tests/parity/test_peft_files.py`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import FileError, read_safetensors
from lora_jax.interop import ModuleNames, export_peft, import_peft, read_peft_config

from . import kit
from .kit import EMBED, HEAD, NAMES, NORM, QUERY, VALUE

KEY = jax.random.key(0)
HEAD_TENSORS = (f"{HEAD}.weight", f"{HEAD}.bias")
BIASES = tuple(f"{module}.base_layer.bias" for module in (QUERY, VALUE))

# Every feature of a folder: its tensors, its config.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two targets": (kit.factors(QUERY) | kit.factors(VALUE), {}),
    "one target by its full name": (kit.factors(QUERY), {"target_modules": [QUERY]}),
    "all-linear": (
        kit.factors(QUERY) | kit.factors(VALUE) | kit.factors(HEAD),
        {"target_modules": "all-linear"},
    ),
    "an expression": (kit.factors(QUERY), {"target_modules": r".*\.layers\.\d+\.(query)"}),
    "an expression that would run for ever": (kit.factors(QUERY), {"target_modules": "((m|o|d|e|l|.)+)+$!"}),
    "layers": (kit.factors(QUERY), {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": "v.*"}),
    "no list of targets": (kit.factors(VALUE), {"target_modules": None}),
    "embedding": (kit.factors(EMBED) | kit.factors(QUERY), {"target_modules": ["embed", "query"]}),
    "ranks": (
        kit.factors(QUERY, 3) | kit.factors(VALUE),
        {"rank_pattern": {"^model.layers.0.query": 3, "query": 7, "head": 5}},
    ),
    "ranks by an expression": (kit.factors(QUERY, 3) | kit.factors(VALUE), {"rank_pattern": {"(.+)que(ry|)": 3}}),
    "alphas": (
        kit.factors(QUERY, 3) | kit.factors(VALUE),
        {"rank_pattern": {r"layers\.0\.query": 3}, "alpha_pattern": {"value": 7, "layers.0.value": 100}},
    ),
    "alphas that are no whole numbers": (kit.factors(QUERY), {"target_modules": ["query"], "lora_alpha": 2.5}),
    "rank-stabilized": (
        kit.factors(QUERY, 3) | kit.factors(VALUE),
        {"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"query": 5}},
    ),
    "head": (
        kit.factors(QUERY) | kit.factors(VALUE) | kit.whole(*HEAD_TENSORS),
        {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
    ),
    "norm in full": (
        kit.factors(QUERY) | kit.factors(VALUE) | kit.whole(f"{NORM}.weight", f"{NORM}.bias"),
        {"modules_to_save": ["norm"]},
    ),
    "embedding in full": (
        kit.factors(QUERY) | kit.factors(VALUE) | kit.whole(f"{EMBED}.weight"),
        {"modules_to_save": ["embed"]},
    ),
    "biases of the targets": (kit.factors(QUERY) | kit.factors(VALUE) | kit.whole(*BIASES), {"bias": "lora_only"}),
    "all biases": (
        kit.factors(QUERY) | kit.factors(VALUE) | kit.whole(*BIASES, f"{NORM}.bias", f"{HEAD}.bias"),
        {"bias": "all"},
    ),
    "everything": (
        kit.factors(QUERY, 3) | kit.factors(EMBED, 4) | kit.whole(BIASES[0], f"{VALUE}.bias", f"{NORM}.bias")
        | kit.whole(*HEAD_TENSORS, seed=5),
        {
            "target_modules": ["query", "embed"],
            "rank_pattern": {"query": 3, "embed": 4},
            "alpha_pattern": {"embed": 1},
            "bias": "all",
            "modules_to_save": ["classifier"],
            "use_rslora": True,
            "lora_dropout": 0.25,
            "fan_in_fan_out": False,
        },
    ),
}  # fmt: skip


@pytest.fixture(params=FEATURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors, entries = FEATURES[request.param]
    return kit.write_peft(tmp_path / "adapter", tensors, **entries)


def test_the_merged_model_is_pefts(folder: Path) -> None:
    params = import_peft(folder, kit.base(), names=NAMES).params
    before = kit.state_dict(kit.base())
    after = kit.state_dict(lj.merge_params(params))
    kit.assert_equal_models(after, kit.peft_result(folder, before))
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert moved, "an adapter that changes nothing shows nothing"


def test_what_goes_out_is_what_came_in(folder: Path, tmp_path: Path) -> None:
    """Tensors bit for bit; the config means the same, word for word where it is in words that lora_jax writes."""
    params, method = import_peft(folder, kit.base(), names=NAMES)
    again = export_peft(tmp_path / "again", params, method, names=NAMES, config=read_peft_config(folder))
    first, second = read_safetensors(folder / kit.WEIGHTS), read_safetensors(again / kit.WEIGHTS)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        assert array.tobytes() == second[name].tobytes(), name
    kit.assert_equal_models(
        kit.peft_result(again, kit.state_dict(kit.base())), kit.peft_result(folder, kit.state_dict(kit.base()))
    )
    ours, theirs = kit.read_config(again), read_peft_config(folder)
    for name in ("r", "lora_alpha", "bias", "lora_dropout"):
        assert ours[name] == theirs[name]
    if isinstance(theirs["target_modules"], list) and not theirs.get("layers_to_transform"):
        assert ours["target_modules"] == theirs["target_modules"]
    # And once more it is the same, byte for byte.
    reread = import_peft(again, kit.base(), names=NAMES)
    chex.assert_trees_all_equal(reread.params, params)
    assert reread.method == method
    third = export_peft(tmp_path / "third", *reread, names=NAMES, config=read_peft_config(again))
    assert (third / kit.CONFIG).read_bytes() == (again / kit.CONFIG).read_bytes()
    assert (third / kit.WEIGHTS).read_bytes() == (again / kit.WEIGHTS).read_bytes()


def test_what_is_imported_trains_on(folder: Path) -> None:
    """The method labels exactly what the file holds; all of it is float32; the rest are the base's own objects."""
    tree = kit.base()
    params, method = import_peft(folder, tree, names=NAMES)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    held = read_safetensors(folder / kit.WEIGHTS)
    assert len(jax.tree.leaves(trainable)) == len(held)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    originals = {id(leaf) for leaf in jax.tree.leaves(tree)}
    assert all(id(leaf) in originals for leaf in jax.tree.leaves(frozen))


METHODS = {
    "plain": lj.LoRA(rank=2, alpha=3, targets=("query", "value")),
    "head": lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=("classifier",)),
    "overrides": lj.LoRA(
        rank=2,
        alpha=3,
        targets=("query", "value", "embedding"),
        rank_overrides={"query": 4},
        alpha_overrides={"value": 7.5, "query": 1},
    ),
    "rank-stabilized": lj.LoRA(rank=3, alpha=5, targets=("query",), scaling="rank_stabilized", dropout=0.1),
    "biases of the targets": lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=("query/bias",)),
    "norm": lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=("norm",)),
    "all biases": lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=".*bias"),
    "all biases and the head": lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=r".*bias|classifier/kernel"),
}


def trained(method: lj.Method) -> Any:
    params = lj.attach(kit.base(), method, key=KEY)
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf, moves: leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if moves else leaf,
        params,
        lj.trainable_mask(params, method),
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ours_there_and_back(method: lj.Method, tmp_path: Path) -> None:
    params = trained(method)
    folder = export_peft(tmp_path, params, method, names=NAMES, base_name="someone/base")
    expected = kit.state_dict(lj.merge_params(params))
    kit.assert_equal_models(kit.peft_result(folder, kit.state_dict(kit.base())), expected)
    back = import_peft(folder, kit.base(), names=NAMES, base_name="elsewhere/base")
    chex.assert_trees_all_equal(back.params, params)
    assert lj.label_params(back.params, back.method) == lj.label_params(params, method)
    assert sorted(path.name for path in tmp_path.iterdir()) == [kit.CONFIG, kit.WEIGHTS]


def test_the_config_says_what_peft_reads(tmp_path: Path) -> None:
    method = METHODS["overrides"]
    config = kit.read_config(export_peft(tmp_path, trained(method), method, names=NAMES, base_name="someone/base"))
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "someone/base",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "target_modules": [EMBED, QUERY, VALUE],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "rank_pattern": {QUERY: 4},
        "alpha_pattern": {VALUE: 7.5, QUERY: 1},
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def test_state_that_the_format_has_no_place_for_is_told(tmp_path: Path) -> None:
    method = lj.LoRA(rank=1, alpha=1, targets=("query/kernel",))
    tree = {"params": kit.base(), "batch_stats": {"bn": {"mean": jnp.zeros(2)}}}
    names = {f"params/{path}": name for path, name in NAMES.items()}
    params = lj.attach(tree, method, key=jax.random.key(0))
    with pytest.warns(UserWarning, match=r"`params` holds state, batch_stats/bn/mean, which PEFT's format"):
        export_peft(tmp_path / "with", params, method, names=names)
    del params["batch_stats"]
    export_peft(tmp_path / "without", params, method, names=names)
    one, other = (read_safetensors(tmp_path / name / kit.WEIGHTS) for name in ("with", "without"))
    assert one.keys() == other.keys()


def test_an_unknown_entry_is_kept_aside_with_a_warning(tmp_path: Path) -> None:
    folder = kit.write_peft(
        tmp_path / "in", use_time_machine={"year": 2031}, empty=None, peft_version="0.99", revision="x"
    )
    with pytest.warns(
        UserWarning, match="entries that this lora_jax doesn't know: use_time_machine. They are not applied"
    ):
        params, method = import_peft(folder, kit.base(), names=NAMES)
    config = kit.read_config(
        export_peft(tmp_path / "out", params, method, names=NAMES, config=read_peft_config(folder))
    )
    assert config["use_time_machine"] == {"year": 2031}
    assert config["peft_version"] == "0.99"
    assert config["revision"] == "x"


# Layouts.


def split_model() -> tuple[Any, dict[str, str], dict[str, lj.Use]]:
    """Kernels split into heads, as Flax has them, and one stored (out, in), as Equinox has it."""
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = {
        "query": {"kernel": draw(8, 2, 3), "bias": draw(2, 3)},
        "out": {"kernel": draw(2, 3, 8)},
        "linear": {"weight": draw(5, 8)},
    }
    names = {"query/kernel": "q", "query/bias": "q", "out/kernel": "o", "linear/weight": "l"}
    uses = {
        "query/kernel": lj.Use("dot_general", "ioo"),
        "out/kernel": lj.Use("dot_general", "iio"),
        "linear/weight": lj.Use("dot_general", "oi"),
    }
    return params, names, uses


def test_heads_are_joined_and_split_by_the_labels(tmp_path: Path) -> None:
    base, names, uses = split_model()
    method = lj.LoRA(rank=2, alpha=4, targets=("query", "out"), also_train=("query/bias",))
    params = lj.attach(base, method, key=KEY, uses=uses)
    params = jax.tree.map(lambda leaf, moves: leaf + 0.3 if moves else leaf, params, lj.trainable_mask(params, method))
    tensors = read_safetensors(export_peft(tmp_path, params, method, names=names) / kit.WEIGHTS)
    for module, path, rows in (("q", "query", 6), ("o", "out", 8)):
        a, b = (tensors[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
        before, after = (np.asarray(tree[path]["kernel"]) for tree in (base, lj.merge_params(params)))
        delta = (after - before).reshape(-1, rows)  # (in, out)
        np.testing.assert_allclose(2 * (b @ a).T, delta, atol=1e-5)
        assert np.abs(delta).max() > 0.1
    assert tensors["base_model.model.q.base_layer.bias"].shape == (6,)
    back = import_peft(tmp_path, base, names=names, uses=uses)
    chex.assert_trees_all_equal(back.params, params)


def test_a_weight_stored_out_in(tmp_path: Path) -> None:
    base, names, uses = split_model()
    method = lj.LoRA(rank=2, alpha=4, targets=("linear",))
    params = lj.attach(base, method, key=KEY, uses=uses)
    folder = export_peft(tmp_path, params, method, names=names, uses=uses)
    tensors = read_safetensors(folder / kit.WEIGHTS)
    assert tensors["base_model.model.l.lora_A.weight"].shape == (2, 8)
    assert tensors["base_model.model.l.lora_B.weight"].shape == (5, 2)
    chex.assert_trees_all_equal(import_peft(folder, base, names=names, uses=uses).params, params)
    with pytest.raises(lj.AdapterError, match=r"whether `linear/weight` \(5, 8\) is stored \(in, out\) or \(out, in\)"):
        import_peft(folder, base, names=names)
    with pytest.raises(lj.AdapterError, match=r"whether `linear/weight` .* can't be told: pass `uses="):
        export_peft(tmp_path, params, method, names=names)
    blind = lj.attach(base, method, key=KEY)  # reads it as (in, out)
    with pytest.raises(lj.AdapterError, match="of `linear/weight` are labelled 'io', and `uses` says 'oi'"):
        export_peft(tmp_path, blind, method, names=names, uses=uses)


def test_a_head_split_head_is_saved_in_full(tmp_path: Path) -> None:
    base, names, uses = split_model()
    method = lj.LoRA(rank=2, alpha=4, targets=("out",), also_train=("query",))
    params = lj.attach(base, method, key=KEY, uses=uses)
    folder = export_peft(tmp_path, params, method, names=names, uses=uses)
    weight = read_safetensors(folder / kit.WEIGHTS)["base_model.model.q.weight"]
    np.testing.assert_array_equal(weight, np.asarray(base["query"]["kernel"]).reshape(8, 6).T)
    chex.assert_trees_all_equal(import_peft(folder, base, names=names, uses=uses).params, params)
    with pytest.raises(
        lj.AdapterError, match=r"roles of the axes of `query/kernel` \(8, 2, 3\) are unknown: pass `uses"
    ):
        export_peft(tmp_path, params, method, names=names)


def test_what_has_no_place_in_the_layout(tmp_path: Path) -> None:
    base, names = {"layers": {"kernel": jnp.ones((3, 4, 4))}}, {"layers/kernel": "layers"}
    uses = {"layers/kernel": lj.Use("dot_general", "sio")}
    method = lj.LoRA(rank=2, alpha=2, targets=("layers",))
    params = lj.attach(base, method, key=KEY, uses=uses)
    with pytest.raises(
        lj.AdapterError, match=r"`layers/kernel` is labelled 'sio', a stack of layers or experts.*unstack"
    ):
        export_peft(tmp_path, params, method, names=names)
    uses = {"layers/kernel": lj.Use("conv_general_dilated", "iio")}
    params = lj.attach(base, method, key=KEY, uses=uses)
    with pytest.raises(lj.AdapterError, match="`layers/kernel` is the kernel of a convolution"):
        export_peft(tmp_path, params, method, names=names, uses=uses)


def test_a_weight_whose_uses_say_nothing_is_exchanged_as_without_them(tmp_path: Path) -> None:
    """As `attach` reads it; one stored nobody knows how, or with uses that disagree, is refused with what to do."""
    base, names = {"query": {"kernel": jnp.ones((4, 3))}}, {"query/kernel": "query"}
    uses = lj.trace_weights(lambda params, x: x @ jnp.tanh(params["query"]["kernel"]), base, jnp.ones((2, 4)))
    method = lj.LoRA(rank=2, alpha=2, targets=("query",))
    params = lj.attach(base, method, key=KEY, uses=uses)
    folder = export_peft(tmp_path / "with", params, method, names=names, uses=uses)
    chex.assert_trees_all_equal(import_peft(folder, base, names=names, uses=uses).params, params)
    chex.assert_trees_all_equal(import_peft(folder, base, names=names).params, params)
    torn = {"query/kernel": lj.Use("dot_general", None, "dot_general needs 'io', gather needs 'oi': choose by hand")}
    with pytest.raises(
        lj.AdapterError, match=r"are unknown: .*choose by hand. Give its entry of `uses` labels by hand"
    ):
        export_peft(tmp_path / "torn", params, method, names=names, uses=torn)
    equinox = {"query": {"weight": jnp.ones((4, 3))}}
    params = lj.attach(equinox, method, key=KEY)
    odd = {"query/weight": lj.Use("tanh", None, "merged by tanh")}
    with pytest.raises(
        lj.AdapterError, match=r"\(in, out\) or \(out, in\), as Equinox does, can't be told: label it in"
    ):
        export_peft(tmp_path / "odd", params, method, names={"query/weight": "query"}, uses=odd)


def test_modules_that_store_in_out_there(tmp_path: Path) -> None:
    """GPT-2's `Conv1D`: factors are the same, a whole weight isn't transposed."""
    square = {"c_attn": {"kernel": jnp.arange(16.0).reshape(4, 4)}, "mlp": {"kernel": jnp.arange(8.0).reshape(4, 2)}}
    names = {"c_attn/kernel": "h.0.c_attn", "mlp/kernel": "h.0.mlp"}
    method = lj.LoRA(rank=1, alpha=1, targets=("mlp",), also_train=("c_attn",))
    params = lj.attach(square, method, key=KEY)
    folder = export_peft(tmp_path, params, method, names=names, fan_in_fan_out=("c_attn", "mlp"))
    assert kit.read_config(folder)["fan_in_fan_out"] is True
    tensors = read_safetensors(folder / kit.WEIGHTS)
    np.testing.assert_array_equal(tensors["base_model.model.h.0.c_attn.weight"], square["c_attn"]["kernel"])
    assert tensors["base_model.model.h.0.mlp.lora_A.weight"].shape == (1, 4)
    back = import_peft(folder, square, names=names, fan_in_fan_out=("c_attn", "mlp"))
    chex.assert_trees_all_equal(back.params, params)


CONV1D = {"c_attn/kernel": "h.0.c_attn", "mlp/kernel": "h.0.mlp"}


def test_a_square_weight_in_full_is_not_guessed(tmp_path: Path) -> None:
    """Its shape is the same either way, so nothing else would show that it went out transposed."""
    base = {"c_attn": {"kernel": jnp.arange(16.0).reshape(4, 4)}, "mlp": {"kernel": jnp.arange(8.0).reshape(4, 2)}}
    method = lj.LoRA(rank=1, alpha=1, targets=("mlp",), also_train=("c_attn",))
    params = lj.attach(base, method, key=KEY)
    told = r'`c_attn/kernel` \(4, 4\) is square.*pass `fan_in_fan_out=\(\)` .*such as `fan_in_fan_out=\("c_attn"'
    with pytest.raises(lj.AdapterError, match=told):
        export_peft(tmp_path, params, method, names=CONV1D)
    assert not any(tmp_path.iterdir())

    linear = export_peft(tmp_path / "linear", params, method, names=CONV1D, fan_in_fan_out=())
    names = ModuleNames(CONV1D, fan_in_fan_out=("c_attn",))
    conv1d = export_peft(tmp_path / "conv1d", params, method, names=names)
    one, other = (
        read_safetensors(folder / kit.WEIGHTS)["base_model.model.h.0.c_attn.weight"] for folder in (linear, conv1d)
    )
    np.testing.assert_array_equal(one.T, base["c_attn"]["kernel"])
    np.testing.assert_array_equal(other, base["c_attn"]["kernel"])

    for folder in (linear, conv1d):
        with pytest.raises(lj.AdapterError, match=rf"c_attn.weight': {told}"):
            import_peft(folder, base, names=CONV1D)
    chex.assert_trees_all_equal(import_peft(linear, base, names=CONV1D, fan_in_fan_out=()).params, params)
    chex.assert_trees_all_equal(import_peft(conv1d, base, names=names).params, params)


def test_a_weight_that_is_not_square_is_told_by_its_shape(tmp_path: Path) -> None:
    """The error says what may be the reason; a table that says how modules store leaves no doubt, and no hint."""
    base = {"c_attn": {"kernel": jnp.arange(8.0).reshape(4, 2)}, "mlp": {"kernel": jnp.arange(8.0).reshape(4, 2)}}
    method = lj.LoRA(rank=1, alpha=1, targets=("mlp",), also_train=("c_attn",))
    params = lj.attach(base, method, key=KEY)
    folder = export_peft(tmp_path, params, method, names=CONV1D, fan_in_fan_out=("c_attn",))
    wrong = r"c_attn.weight' has the shape \(4, 2\), expected \(2, 4\) for `c_attn/kernel` \(4, 2\)"
    with pytest.raises(lj.AdapterError, match=rf"{wrong}\. If its module stores \(in, out\).*`fan_in_fan_out`$"):
        import_peft(folder, base, names=CONV1D)
    with pytest.raises(lj.AdapterError, match=rf"{wrong}$"):
        import_peft(folder, base, names=CONV1D, fan_in_fan_out=())


@pytest.mark.parametrize("name", ["embeddings", "word_embedding", "table"])
def test_a_square_table_under_another_name_is_not_transposed(name: str, tmp_path: Path) -> None:
    """Haiku's `embeddings`, for one: that no module stores (in, out) says nothing of a table."""
    base = {"wte": {name: jnp.arange(16.0).reshape(4, 4)}, "mlp": {"kernel": jnp.ones((4, 2))}}
    names = {f"wte/{name}": "wte", "mlp/kernel": "mlp"}
    method = lj.LoRA(rank=1, alpha=1, targets=("mlp",), also_train=("wte",))
    params = lj.attach(base, method, key=KEY)
    told = rf"`wte/{name}` \(4, 4\) is square and named as a table of embeddings.*: pass `uses="
    with pytest.raises(lj.AdapterError, match=told):
        export_peft(tmp_path / "refused", params, method, names=names, fan_in_fan_out=())
    uses = {f"wte/{name}": lj.Use("gather", "io")}
    folder = export_peft(tmp_path / "peft", params, method, names=names, fan_in_fan_out=(), uses=uses)
    tensors = read_safetensors(folder / kit.WEIGHTS)
    np.testing.assert_array_equal(tensors["base_model.model.wte.weight"], base["wte"][name])
    with pytest.raises(lj.AdapterError, match=told):
        import_peft(folder, base, names=names, fan_in_fan_out=())
    chex.assert_trees_all_equal(import_peft(folder, base, names=names, fan_in_fan_out=(), uses=uses).params, params)


@pytest.mark.parametrize(
    ("names", "said", "message"),
    [
        (CONV1D, "c_attn", r'`fan_in_fan_out` must be a list of module names, such as \("c_attn",\), got \'c_attn\''),
        (CONV1D, ("c_atn",), "`fan_in_fan_out` has 'c_atn', and `names` has no such module. Nearest: h.0.c_attn"),
        (ModuleNames(CONV1D, fan_in_fan_out=("c_attn",)), (), r"is \(\), and `names` says otherwise of h.0.c_attn: "),
        (ModuleNames(CONV1D, fan_in_fan_out=()), ("mlp",), r"is \('mlp',\), and `names` says otherwise of h.0.mlp"),
    ],
)  # fmt: skip
def test_what_is_said_of_layouts_is_held_against_the_names(tmp_path: Path, names: Any, said: Any, message: str) -> None:
    base = {"c_attn": {"kernel": jnp.ones((4, 4))}, "mlp": {"kernel": jnp.ones((4, 2))}}
    method = lj.LoRA(rank=1, alpha=1, targets=("mlp",))
    with pytest.raises(lj.AdapterError, match=message):
        export_peft(tmp_path, lj.attach(base, method, key=KEY), method, names=names, fan_in_fan_out=said)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in (kit.factors(QUERY) | kit.factors(VALUE)).items()}
    folder = kit.write_peft(tmp_path / "in", tensors)
    params, method = import_peft(folder, kit.base(), names=NAMES)
    assert params["query"]["kernel"].a.dtype == jnp.float32
    again = export_peft(tmp_path / "out", params, method, names=NAMES, dtype=dtype)
    assert {name: array.tobytes() for name, array in read_safetensors(again / kit.WEIGHTS).items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_a_base_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kit.base())
    params = import_peft(kit.write_peft(tmp_path), half, names=NAMES).params
    assert params["query"]["kernel"].base is half["query"]["kernel"]
    assert params["query"]["kernel"].a.dtype == jnp.float32


def test_factors_lie_where_attached_ones_do(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",))
    tree = jax.device_put(kit.base(), jax.NamedSharding(mesh, jax.P()))
    method = lj.LoRA(rank=2, alpha=4, targets=("query", "value"))
    attached = lj.attach(tree, method, key=KEY)
    imported = import_peft(kit.write_peft(tmp_path), tree, names=NAMES).params
    for ours, theirs in zip(jax.tree.leaves(imported), jax.tree.leaves(attached), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


# What PEFT does with names.


def test_a_name_that_is_the_end_of_another(tmp_path: Path) -> None:
    """PEFT would take `proj` for `block.proj` as well, so an expression names the whole."""
    base = {"proj": {"kernel": jnp.ones((4, 4))}, "block": {"proj": {"kernel": jnp.ones((4, 4))}}}
    names = {"proj/kernel": "proj", "block/proj/kernel": "block.proj"}
    method = lj.LoRA(rank=1, alpha=1, targets=("/proj",))
    params = lj.attach(base, method, key=KEY)
    folder = export_peft(tmp_path, params, method, names=names)
    assert kit.read_config(folder)["target_modules"] == "proj"
    chex.assert_trees_all_equal(import_peft(folder, base, names=names).params, params)


def test_a_pattern_that_would_mean_another_is_anchored(tmp_path: Path) -> None:
    base = {"proj": {"kernel": jnp.ones((4, 4))}, "block": {"proj": {"kernel": jnp.ones((4, 4))}}}
    names = {"proj/kernel": "proj", "block/proj/kernel": "block.proj"}
    method = lj.LoRA(rank=1, alpha=1, targets=("proj",), rank_overrides={"/proj": 2}, alpha_overrides={"/proj": 6})
    params = lj.attach(base, method, key=KEY)
    folder = export_peft(tmp_path, params, method, names=names)
    assert kit.read_config(folder)["rank_pattern"] == {"^proj": 2}
    assert kit.read_config(folder)["alpha_pattern"] == {"^proj": 6}
    chex.assert_trees_all_equal(import_peft(folder, base, names=names).params, params)


def test_modules_go_out_as_a_whole_with_a_warning(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=3, targets=("query",), also_train=("classifier/kernel", "norm/bias"))
    params = trained(method)
    with pytest.warns(
        UserWarning, match=r"frozen leaves are written as they are.*: classifier/bias, query/bias, value/b"
    ):
        folder = export_peft(tmp_path, params, method, names=NAMES)
    kit.assert_equal_models(
        kit.peft_result(folder, kit.state_dict(kit.base())), kit.state_dict(lj.merge_params(params))
    )
    assert kit.read_config(folder)["bias"] == "all"


def test_the_head_of_a_classifier_goes_along(tmp_path: Path) -> None:
    """PEFT looks for it in the file of every `SEQ_CLS`."""
    method = lj.LoRA(rank=2, alpha=3, targets=("query",))
    with pytest.warns(UserWarning, match="frozen leaves are written as they are.*classifier/bias, classifier/kernel"):
        folder = export_peft(tmp_path, trained(method), method, names=NAMES, task_type="SEQ_CLS")
    config = kit.read_config(folder)
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]
    assert f"base_model.model.{HEAD}.weight" in read_safetensors(folder / kit.WEIGHTS)


def test_a_task_without_its_head(tmp_path: Path) -> None:
    names = {path: module for path, module in NAMES.items() if module != HEAD}
    method = lj.LoRA(rank=2, alpha=3, targets=("query",))
    message = r"with `task_type='SEQ_CLS'` PEFT looks for a head, classifier or score, and `names` has none"
    with pytest.raises(lj.AdapterError, match=message):
        export_peft(tmp_path, trained(method), method, names=names, task_type="SEQ_CLS")


def test_a_saved_name_that_ends_another(tmp_path: Path) -> None:
    """PEFT saves `pre_classifier` with `classifier`; and it can't have factors at the same time."""
    base = {name: {"kernel": jnp.ones((4, 4))} for name in ("q", "pre_classifier", "classifier")}
    names = {f"{name}/kernel": name for name in base}
    method = lj.LoRA(rank=1, alpha=1, targets=("q",), also_train=("/classifier",))
    with pytest.warns(UserWarning, match="pre_classifier/kernel"):
        folder = export_peft(tmp_path, lj.attach(base, method, key=KEY), method, names=names, fan_in_fan_out=())
    assert "base_model.model.pre_classifier.weight" in read_safetensors(folder / kit.WEIGHTS)
    method = dataclasses.replace(method, targets=("pre_classifier",))
    with pytest.raises(lj.AdapterError, match="pre_classifier would be trained in full by PEFT as well"):
        export_peft(tmp_path, lj.attach(base, method, key=KEY), method, names=names)


def test_two_layers_of_one_head_have_one_entry(tmp_path: Path) -> None:
    base = {
        "q": {"kernel": jnp.ones((4, 4))},
        "dense": {"kernel": jnp.ones((4, 4))},
        "out": {"kernel": jnp.ones((4, 2))},
    }
    names = {"q/kernel": "roberta.q", "dense/kernel": "classifier.dense", "out/kernel": "classifier.out_proj"}
    method = lj.LoRA(rank=1, alpha=1, targets=("q",), also_train=("dense", "out"))
    params = lj.attach(base, method, key=KEY)
    folder = export_peft(tmp_path, params, method, names=names, task_type="SEQ_CLS", fan_in_fan_out=())
    assert kit.read_config(folder)["modules_to_save"] == ["classifier"]
    chex.assert_trees_all_equal(import_peft(folder, base, names=names, fan_in_fan_out=()).params, params)


def test_copies_of_the_base_pass_if_they_are_equal(tmp_path: Path) -> None:
    """PEFT saves the embeddings along at times, and a saved head's biases three times with `bias="all"`."""
    copy = {kit.PREFIX + f"{EMBED}.weight": np.asarray(kit.base()["embed"]["embedding"])}
    head = kit.whole(*HEAD_TENSORS)
    twins = {
        f"{kit.PREFIX}{HEAD}.modules_to_save.bias": head[f"{kit.PREFIX}{HEAD}.bias"],
        f"{kit.PREFIX}{HEAD}.original_module.bias": np.ones(kit.CLASSES, np.float32),
    }
    biases = kit.whole(*BIASES, f"{NORM}.bias")
    tensors = kit.factors(QUERY) | kit.factors(VALUE) | head | copy | twins | biases
    folder = kit.write_peft(tmp_path, tensors, bias="all", modules_to_save=["classifier"])
    params = import_peft(folder, kit.base(), names=NAMES).params
    np.testing.assert_array_equal(params["classifier"]["bias"], head[f"{kit.PREFIX}{HEAD}.bias"])
    np.testing.assert_array_equal(params["embed"]["embedding"], kit.base()["embed"]["embedding"])

    other = tensors | {f"{kit.PREFIX}{EMBED}.weight": np.ones((kit.WORDS, kit.WIDTH), np.float32)}
    kit.write_peft(tmp_path, other, bias="all", modules_to_save=["classifier"])
    with pytest.raises(lj.AdapterError, match=r"'.*embed.weight' is another value of `embed/embedding`.*isn't trained"):
        import_peft(tmp_path, kit.base(), names=NAMES)
    twins[f"{kit.PREFIX}{HEAD}.modules_to_save.bias"] = np.zeros(kit.CLASSES, np.float32)
    kit.write_peft(tmp_path, tensors | twins, bias="all", modules_to_save=["classifier"])
    with pytest.raises(lj.AdapterError, match="are one parameter, and have two values"):
        import_peft(tmp_path, kit.base(), names=NAMES)


# Whole or not there.


def test_a_full_disk_leaves_the_earlier_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["plain"]
    export_peft(tmp_path, trained(method), method, names=NAMES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"the disk \(or the quota\) is full"):
            export_peft(tmp_path, trained(METHODS["head"]), METHODS["head"], names=NAMES)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file cannot hold files: .* Choose another folder"):
        export_peft(tmp_path / "file", trained(method), method, names=NAMES)


def test_a_kill_between_the_files_leaves_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others find none that loads until they have been read here."""
    method = METHODS["plain"]
    export_peft(tmp_path, trained(method), method, names=NAMES)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / kit.CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export_peft(tmp_path, trained(METHODS["head"]), METHODS["head"], names=NAMES)
    assert not (tmp_path / kit.CONFIG).exists()
    assert import_peft(tmp_path, kit.base(), names=NAMES).method.also_train
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kit.CONFIG, kit.WEIGHTS])


# What is not exported.


def test_other_methods_have_no_place_in_peft(tmp_path: Path) -> None:
    with pytest.raises(lj.AdapterError, match=r"PEFT has no format for BitFit, only for LoRA.*`export_delta`"):
        export_peft(tmp_path, kit.base(), lj.BitFit(), names=NAMES)
    with pytest.raises(lj.AdapterError, match=r"`params` has no factors: pass the tree from `lj.attach`"):
        export_peft(tmp_path, kit.base(), METHODS["plain"], names=NAMES)


def test_what_is_trained_needs_a_name(tmp_path: Path) -> None:
    method = METHODS["head"]
    for path in ("query/kernel", "classifier/kernel"):
        table = {name: module for name, module in NAMES.items() if name != path}
        with pytest.raises(lj.AdapterError, match=f"`names` lacks `{path}`, which is trained"):
            export_peft(tmp_path, trained(method), method, names=table)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    params = trained(METHODS["plain"])
    broken = dataclasses.replace(params["query"]["kernel"], b=params["query"]["kernel"].b.at[0, 0].set(jnp.nan))
    params["query"]["kernel"] = broken
    with pytest.raises(lj.AdapterError, match=r"cannot export: NaN or infinity in .*query\.lora_B\.weight"):
        export_peft(tmp_path, params, METHODS["plain"], names=NAMES)
    params["query"]["kernel"] = dataclasses.replace(broken, b=jnp.full_like(broken.b, 1e30))
    with pytest.raises(lj.AdapterError, match=r"or leave `dtype` out if it is too narrow"), np.errstate(over="ignore"):
        export_peft(tmp_path, params, METHODS["plain"], names=NAMES, dtype=jnp.float16)


def test_other_trees_are_not_exported(tmp_path: Path) -> None:
    method = METHODS["plain"]
    params = trained(method)
    with pytest.raises(
        lj.AdapterError, match=r"lacks base weights or factors, at query/kernel, value/kernel: pass `lj.com"
    ):
        export_peft(tmp_path, lj.partition(params, lj.trainable_mask(params, method)).trainable, method, names=NAMES)
    with pytest.raises(lj.AdapterError, match="`config` describes another adapter than this one: `use_dora` is True"):
        export_peft(tmp_path, params, method, names=NAMES, config=kit.config(use_dora=True))
    with pytest.raises(lj.AdapterError, match=r"`task_type` must be one of SEQ_CLS, .*, got 'chess'"):
        export_peft(tmp_path, params, method, names=NAMES, task_type="chess")
    mixed = {**params, "value": {**params["value"]}}
    mixed["value"]["kernel"] = dataclasses.replace(params["value"]["kernel"], dropout=0.5)
    with pytest.raises(lj.AdapterError, match=r"factors with several dropouts, \[0.0, 0.5\]"):
        export_peft(tmp_path, mixed, method, names=NAMES)


# The table of names.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"query/kernal": QUERY},
            r"`names` has `query/kernal`, and the parameters have no such leaf. Nearest: query/kernel",
        ),
        ({"query/kernel": 3}, "`names` must map leaf paths to Hugging Face module names"),
        (["query"], "`names` must map leaf paths to Hugging Face module names"),
        (NAMES | {"value/kernel": QUERY}, f"`names` gives {QUERY}.weight to both `query/kernel` and `value/kernel`"),
    ],
)
def test_a_wrong_table_is_refused(names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(lj.AdapterError, match=message):
        import_peft(kit.write_peft(tmp_path), kit.base(), names=names)
    with pytest.raises(lj.AdapterError, match=message):
        export_peft(tmp_path, trained(METHODS["plain"]), METHODS["plain"], names=names)


def test_a_table_of_the_touched_leaves_is_enough(tmp_path: Path) -> None:
    names = {path: NAMES[path] for path in ("query/kernel", "value/kernel")}
    params, method = import_peft(kit.write_peft(tmp_path / "in"), kit.base(), names=names)
    export_peft(tmp_path / "out", params, method, names=names)


def test_it_needs_no_more_than_the_core() -> None:
    code = (
        "import sys, lora_jax; assert 'lora_jax.interop' not in sys.modules; lora_jax.interop;"
        "heavy = {'flax', 'torch', 'peft', 'transformers', 'tokenizers', 'huggingface_hub', 'orbax', 'yaml'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    method = lj.LoRA(rank=np.int64(2), alpha=np.float32(3), targets=("query",))  # type: ignore[arg-type]
    folder = export_peft(tmp_path, trained(method), method, names=NAMES)
    assert json.loads((folder / kit.CONFIG).read_text())["lora_alpha"] == 3
