"""Leaves that aren't one module each: an embedding that is the output as well, and the stacked layers of a scan.

What PEFT makes of both is in `tests/parity/test_peft_models.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import read_safetensors
from lora_jax.interop import apply_delta, export_delta, export_peft, import_peft, vllm_problems
from lora_jax.interop.module_names import ModuleTable
from lora_jax.interop.stacks import Stacks

from . import kit
from .kit import PREFIX

KEY = jax.random.key(0)


def draw(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))


def moved(params: Any, method: lj.Method) -> Any:
    mask = lj.trainable_mask(params, method)
    return jax.tree.map(lambda leaf, moves: leaf + draw(*leaf.shape, seed=1) if moves else leaf, params, mask)


# Tied embeddings.

WORDS, HEAD, UP = "model.words", "lm_head", "model.up"
TIED = {"words/embedding": (WORDS, HEAD), "up/kernel": UP}


def tied_base() -> dict[str, Any]:
    return {"words": {"embedding": draw(7, 4)}, "up": {"kernel": draw(4, 5)}}


def tied_pairs(**changes: Any) -> dict[str, np.ndarray]:
    """Factors of the embedding and, transposed, of the output; and those of another layer."""
    a, b = np.asarray(draw(2, 7)), np.asarray(draw(4, 2))
    tensors = {
        f"{PREFIX}{WORDS}.lora_embedding_A": a,
        f"{PREFIX}{WORDS}.lora_embedding_B": b,
        f"{PREFIX}{HEAD}.lora_A.weight": np.ascontiguousarray(b.T),
        f"{PREFIX}{HEAD}.lora_B.weight": np.ascontiguousarray(a.T),
        f"{PREFIX}{UP}.lora_A.weight": np.asarray(draw(2, 4)),
        f"{PREFIX}{UP}.lora_B.weight": np.asarray(draw(5, 2)),
    }
    return {name: array for name, array in (tensors | changes).items() if array is not None}


def write(folder: Path, tensors: dict[str, Any], **entries: Any) -> Path:
    return kit.write_peft(folder, tensors, **{"target_modules": None, "ensure_weight_tying": True, **entries})


def test_shared_factors_change_both_uses_alike(tmp_path: Path) -> None:
    tensors = tied_pairs()
    params, method = import_peft(write(tmp_path / "in", tensors), tied_base(), names=TIED)
    delta = np.asarray(lj.merge_params(params)["words"]["embedding"]) - np.asarray(tied_base()["words"]["embedding"])
    a, b = (tensors[f"{PREFIX}{WORDS}.lora_embedding_{name}"] for name in "AB")
    np.testing.assert_allclose(delta, 2 * (b @ a).T, atol=1e-5)
    folder = export_peft(tmp_path / "out", params, method, names=TIED)
    chex.assert_trees_all_equal(read_safetensors(folder / kit.WEIGHTS), tensors)
    config = kit.read_config(folder)
    assert config["ensure_weight_tying"] is True
    # PEFT looks for the output's name: without it nothing is tied.
    assert config["target_modules"] == sorted([HEAD, UP, WORDS])
    assert "`ensure_weight_tying` is set, and vLLM doesn't read it." in vllm_problems(folder)


def test_shared_factors_with_a_rank_and_a_scale_of_their_own(tmp_path: Path) -> None:
    method = lj.LoRA(
        rank=2, alpha=2, targets=("words", "up"), rank_overrides={"words": 3}, alpha_overrides={"words": 5}
    )
    params = moved(lj.attach(tied_base(), method, key=KEY), method)
    folder = export_peft(tmp_path, params, method, names=TIED)
    config = kit.read_config(folder)
    assert config["rank_pattern"] == {WORDS: 3, HEAD: 3}
    assert config["alpha_pattern"] == {WORDS: 5, HEAD: 5}
    chex.assert_trees_all_equal(import_peft(folder, tied_base(), names=TIED).params, params)


def test_tied_embeddings_in_full(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=2, targets=("up",), also_train=("words",))
    params = moved(lj.attach(tied_base(), method, key=KEY), method)
    folder = export_peft(tmp_path, params, method, names=TIED)
    tensors = read_safetensors(folder / kit.WEIGHTS)
    for module in (WORDS, HEAD):
        np.testing.assert_array_equal(tensors[f"{PREFIX}{module}.weight"], params["words"]["embedding"])
    assert kit.read_config(folder)["modules_to_save"] == [HEAD, WORDS]
    back = import_peft(folder, tied_base(), names=TIED)
    chex.assert_trees_all_equal(back.params, params)
    assert back.method.also_train == ("/words/embedding",)


def test_magnitudes_of_tied_embeddings_are_refused(tmp_path: Path) -> None:
    """DoRA has one for each column of the lookup there, and one for each word of the output."""
    method = lj.DoRA(rank=2, alpha=2, targets=("words", "up"))
    params = lj.attach(tied_base(), method, key=KEY)
    with pytest.raises(lj.AdapterError, match=rf"is {WORDS} and {HEAD} at once, and PEFT has magnitudes for each: "):
        export_peft(tmp_path, params, method, names=TIED)
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": np.ones(size, np.float32) for module, size in SIZES.items()
    }
    folder = write(tmp_path / "theirs", tied_pairs(**magnitudes), use_dora=True)
    with pytest.raises(lj.AdapterError, match=rf"is {WORDS} and {HEAD} at once, and with `use_dora` each has magni"):
        import_peft(folder, tied_base(), names=TIED)


SIZES = {WORDS: 4, HEAD: 7, UP: 5}
A, B = f"{PREFIX}{HEAD}.lora_A.weight", f"{PREFIX}{HEAD}.lora_B.weight"
WORDS_A, WORDS_B = f"{PREFIX}{WORDS}.lora_embedding_A", f"{PREFIX}{WORDS}.lora_embedding_B"


@pytest.mark.parametrize(
    ("tensors", "entries", "message"),
    [
        (
            {},
            {"ensure_weight_tying": False},
            rf"is {WORDS} and {HEAD} at once, .*each by itself.*tie_word_embeddings=Fa",
        ),
        ({A: None, B: None}, {"ensure_weight_tying": None}, rf"`words/embedding` is {WORDS} and {HEAD} at once"),
        ({WORDS_A: None, WORDS_B: None}, {"ensure_weight_tying": False}, rf"is {WORDS} and {HEAD} at once"),
        ({A: None, B: None}, {}, rf"there are no factors of {HEAD}: `ensure_weight_tying` .* has tied nothing"),
        ({WORDS_A: None, WORDS_B: None}, {}, rf"there are no factors of {WORDS}"),
        ({A: None}, {}, rf"the factors of {WORDS} and {HEAD} are no pairs: '{A}' is missing"),
        ({A: np.ones((2, 4), np.float32)}, {}, rf"'{A}' and '{WORDS_B}' are tied, and one isn't the other's transpose"),
        ({B: np.ones((9, 2), np.float32)}, {}, rf"'{B}' and '{WORDS_A}' are tied, and one isn't the other's transpose"),
        ({}, {"alpha_pattern": {HEAD: 9}}, rf"{WORDS} and {HEAD} are tied, and have two alphas"),
        (
            {A: None, B: None, WORDS_A: None, WORDS_B: None, f"{PREFIX}{HEAD}.weight": np.ones((7, 4), np.float32)},
            {"modules_to_save": [HEAD], "ensure_weight_tying": False},
            rf"is {WORDS} and {HEAD} at once",
        ),
        (
            {A: None, B: None, WORDS_A: None, WORDS_B: None, f"{PREFIX}{WORDS}.weight": np.ones((7, 4), np.float32)},
            {"modules_to_save": [WORDS]},
            rf"it lacks {PREFIX}{HEAD}\.weight",
        ),
        (
            {A: None, B: None, WORDS_A: None, WORDS_B: None}
            | {
                f"{PREFIX}{WORDS}.weight": np.ones((7, 4), np.float32),
                f"{PREFIX}{HEAD}.weight": np.zeros((7, 4), "f4"),
            },
            {"modules_to_save": [WORDS]},
            "are one parameter, and have two values",
        ),
    ],
)
def test_what_one_leaf_cannot_be_is_refused(
    tmp_path: Path, tensors: dict[str, Any], entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(lj.AdapterError, match=message):
        import_peft(write(tmp_path, tied_pairs(**tensors), **entries), tied_base(), names=TIED)


def test_a_base_without_a_tie_cannot_share(tmp_path: Path) -> None:
    names = {"words/embedding": WORDS, "up/kernel": UP}
    with pytest.raises(
        lj.AdapterError, match=r"`ensure_weight_tying`: adapters shared by tied layers, and `names` has"
    ):
        import_peft(write(tmp_path, tied_pairs()), tied_base(), names=names)


def test_copies_of_tied_embeddings_pass_if_they_are_the_base_s(tmp_path: Path) -> None:
    copies = {f"{PREFIX}{module}.base_layer.weight": np.asarray(draw(7, 4)) for module in (WORDS, HEAD)}
    import_peft(write(tmp_path / "equal", tied_pairs() | copies), tied_base(), names=TIED)
    copies[f"{PREFIX}{HEAD}.base_layer.weight"] = np.zeros((7, 4), np.float32)
    with pytest.raises(lj.AdapterError, match=rf"{HEAD}.base_layer.weight' is another value of `words/embedding`"):
        import_peft(write(tmp_path / "other", tied_pairs() | copies), tied_base(), names=TIED)


def test_a_delta_of_tied_embeddings_reaches_both_names(tmp_path: Path) -> None:
    """PyTorch loads a `state_dict` entry by entry into one parameter: the last would win."""
    base = tied_base()
    tuned = {**base, "words": {"embedding": base["words"]["embedding"] + 1}}
    folder = export_delta(tmp_path, tuned, base, names=TIED)
    array = np.asarray(base["words"]["embedding"])
    there = {f"{WORDS}.weight": array, f"{HEAD}.weight": array}
    for value in apply_delta(folder, there).values():
        np.testing.assert_array_equal(value, array + 1)
    assert apply_delta(folder, {f"{WORDS}.weight": array}).keys() == {f"{WORDS}.weight"}
    chex.assert_trees_all_equal(apply_delta(folder, base, names=TIED), tuned)
    description = json.loads((folder / "lora_jax_delta.json").read_text())
    description["tensors"][f"{WORDS}.weight"]["tied"] = [3, {}]
    del description["checksum"]  # as of an earlier version
    (folder / "lora_jax_delta.json").write_text(json.dumps(description))
    np.testing.assert_array_equal(apply_delta(folder, there)[f"{HEAD}.weight"], array)


def test_names_of_tied_leaves_are_checked() -> None:
    leaves = {"words/embedding": draw(2, 2), "head/kernel": draw(2, 2)}
    for bad in ((), ("a", 3), ("a", "")):
        with pytest.raises(lj.AdapterError, match="`names` must map leaf paths to Hugging Face module names"):
            ModuleTable({"words/embedding": bad}, leaves)  # pyright: ignore[reportArgumentType]
    with pytest.raises(lj.AdapterError, match=r"gives head.weight to both `words/embedding` and `head/kernel`"):
        ModuleTable({"words/embedding": ("words", "head"), "head/kernel": "head"}, leaves)


# Stacked layers.

LAYERS = 3
MODULES = {"query/kernel": "q", "query/bias": "q", "up/kernel": "up"}
NAMES = {f"layers/{n}/{path}": f"model.layers.{n}.{module}" for n in range(LAYERS) for path, module in MODULES.items()}
NAMES["norm/scale"] = "model.norm"
USES = {"layers/query/kernel": lj.Use("dot_general", "sio"), "layers/up/kernel": lj.Use("dot_general", "sio")}


def stacked_base() -> dict[str, Any]:
    query = {"kernel": draw(LAYERS, 4, 6), "bias": draw(LAYERS, 6)}
    return {"layers": {"query": query, "up": {"kernel": draw(LAYERS, 4, 5)}}, "norm": {"scale": draw(4)}}


def apart(tree: Any) -> dict[str, Any]:
    layers = {str(n): jax.tree.map(lambda leaf, n=n: leaf[n], tree["layers"]) for n in range(LAYERS)}
    return {**tree, "layers": layers}


SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ("query", "up"), "rank_overrides": {"up": 3}}
SETTINGS |= {"also_train": ("norm", "query/bias"), "dropout": 0.1}


@pytest.mark.parametrize("kind", [lj.LoRA, lj.DoRA])
def test_a_stack_goes_out_as_its_layers_do_and_comes_back(tmp_path: Path, kind: Any) -> None:
    base, method = stacked_base(), kind(**SETTINGS)
    params = moved(lj.attach(base, method, key=KEY, uses=USES), method)
    folder = export_peft(tmp_path / "stacked", params, method, names=NAMES)

    # The same factors beside single layers, and written from there.
    single = import_peft(folder, apart(base), names=NAMES)
    merged = lj.merge_params(params)
    chex.assert_trees_all_close(lj.merge_params(single.params), apart(merged), atol=1e-6)
    again = export_peft(tmp_path / "single", single.params, single.method, names=NAMES)
    chex.assert_trees_all_equal(*(read_safetensors(place / kit.WEIGHTS) for place in (folder, again)))

    for uses in (None, USES):
        back = import_peft(folder, base, names=NAMES, uses=uses)
        chex.assert_trees_all_equal(back.params, params)
    assert isinstance(back.method, lj.LoRA)
    assert back.method.targets == ("/layers/query/kernel", "/layers/up/kernel")
    assert back.method.also_train == ("/layers/query/bias", "/norm/scale")
    assert back.params["layers"]["query"]["kernel"].base is base["layers"]["query"]["kernel"]
    assert back.params["layers"]["up"]["kernel"].axes == "sio"
    found = export_peft(tmp_path / "again", back.params, back.method, names=NAMES)
    assert (found / kit.WEIGHTS).read_bytes() == (folder / kit.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"targets": ("layers/0/query", "layers/2/query", "up")},
            r"`layers/query/kernel` is one leaf for 3 layers, and layers/1/query/kernel would stay as they are: .*unst",
        ),
        (
            {"targets": ("query",), "rank_overrides": {"layers/1/query": 3}},
            r"`layers/query/kernel` is one leaf .* differ, rank 2 and alpha 4, rank 3 and alpha 4: .*unstack_la",
        ),
        (
            {"targets": ("query",), "alpha_overrides": {"layers/1/query": 8}},
            r"their factors differ, rank 2 and alpha 4, rank 2 and alpha 8",
        ),
        (
            {"targets": ("query",), "also_train": ("layers/2/up",)},
            r"`layers/up/kernel` is one leaf for 3 layers, and layers/0/up/kernel, layers/1/up/kernel would stay",
        ),
    ],
)
def test_layers_that_differ_are_no_stack(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    base = stacked_base()
    method_ = lj.LoRA(rank=2, alpha=4, **method)
    folder = export_peft(tmp_path, lj.attach(apart(base), method_, key=KEY), method_, names=NAMES)
    import_peft(folder, apart(base), names=NAMES)
    with pytest.raises(lj.AdapterError, match=rf"{folder}.*{message}"):
        import_peft(folder, base, names=NAMES)
    with pytest.raises(lj.AdapterError, match=rf"{folder}.*{message}"):  # by the header alone
        lj.interop.check_peft(folder, jax.eval_shape(lambda: base), names=NAMES)


def test_names_have_every_layer_of_a_stack() -> None:
    base = {"layers/query/kernel": draw(LAYERS, 4, 6)}
    names = {"layers/0/query/kernel": "model.layers.0.q", "layers/2/query/kernel": "model.layers.2.q"}
    with pytest.raises(lj.AdapterError, match=r"is a stack of 3, and `names` has 2 of them: it lacks number 1"):
        Stacks(names, base)
    # A layer too many is no member.
    with pytest.raises(lj.AdapterError, match=r"`names` has `layers/3/query/kernel`, and the parameters have no such"):
        ModuleTable({"layers/3/query/kernel": "x"}, Stacks({"layers/3/query/kernel": "x"}, base).apart(base))


def test_a_stack_whose_labels_do_not_say_so(tmp_path: Path) -> None:
    base = {"layers": {"query": {"kernel": draw(LAYERS, 4, 6)}}}
    names = {path: name for path, name in NAMES.items() if path.endswith("query/kernel")}
    method = lj.LoRA(rank=2, alpha=4, targets=("query",))
    params = lj.attach(base, method, key=KEY, uses={"layers/query/kernel": lj.Use("dot_general", "iio")})
    with pytest.raises(lj.AdapterError, match=r"a module for each layer of a weight labelled 'iio': its first axis"):
        export_peft(tmp_path, params, method, names=names)
