"""Delta files: what BitFit changed, under Hugging Face names, exactly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import FileError, read_safetensors, sha256_file, write_safetensors
from lora_jax.interop import ModuleNames, apply_delta, export_delta

from . import kit
from .kit import NAMES

DESCRIPTION, TENSORS = "lora_jax_delta.json", "delta.safetensors"
METHOD = lj.BitFit(targets=("query", "norm"), also_train=("classifier",))
CHANGED = {"model.layers.0.query.bias", "model.norm.bias", "classifier.weight", "classifier.bias"}


def tuned(method: lj.Method = METHOD) -> Any:
    mask = lj.trainable_mask(kit.base(), method)
    return jax.tree.map(lambda leaf, moves: leaf * 1.5 if moves else leaf, kit.base(), mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_delta(tmp_path / "delta", tuned(), kit.base(), names=NAMES, base_name="someone/base")


@contextlib.contextmanager
def edited(folder: Path) -> Iterator[Any]:
    description = json.loads((folder / DESCRIPTION).read_text())
    yield description
    (folder / DESCRIPTION).write_text(json.dumps(description))


def rewrite(folder: Path, tensors: dict[str, Any]) -> None:
    """New tensors, announced in the description as a careful forger would."""
    write_safetensors(folder / TENSORS, tensors)
    with edited(folder) as description:
        before = description["tensors"]
        description["sha256"] = sha256_file(folder / TENSORS)
        description["tensors"] = {
            name: {**before.get(name, {}), "shape": list(array.shape), "dtype": str(array.dtype)}
            for name, array in tensors.items()
        }


def test_it_holds_the_changed_leaves_alone(folder: Path) -> None:
    tensors = read_safetensors(folder / TENSORS)
    assert tensors.keys() == CHANGED
    expected = kit.state_dict(tuned())
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name])
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, DESCRIPTION]
    assert json.loads((folder / DESCRIPTION).read_text())["base_model_name_or_path"] == "someone/base"


def test_applied_to_a_tree_it_is_the_trained_one(folder: Path) -> None:
    base = kit.base()
    after = apply_delta(folder, base, names=NAMES)
    chex.assert_trees_all_equal(after, tuned())
    assert after["value"]["kernel"] is base["value"]["kernel"]
    chex.assert_trees_all_equal(base, kit.base())


def test_applied_to_a_state_dict_it_is_the_trained_one(folder: Path) -> None:
    before = kit.state_dict(kit.base())
    after = apply_delta(folder, before)
    expected = kit.state_dict(tuned())
    assert after.keys() == expected.keys()
    for name, array in after.items():
        np.testing.assert_array_equal(array, expected[name])
        assert (after[name] is before[name]) == (name not in CHANGED)


def test_anything_that_numpy_takes_does(folder: Path) -> None:
    class Tensor:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape = array, array.shape

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.array

    after = apply_delta(folder, {name: Tensor(array) for name, array in kit.state_dict(kit.base()).items()})
    np.testing.assert_array_equal(after["classifier.weight"], kit.state_dict(tuned())["classifier.weight"])

    class Brain(Tensor):
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise TypeError("Got unsupported ScalarType BFloat16")

    there = {name: Brain(array) for name, array in kit.state_dict(kit.base()).items()}
    with pytest.raises(
        lj.AdapterError, match=r"can't be read as a NumPy array \(Got unsupported.*float\(\)`, or `check"
    ):
        apply_delta(folder, there)
    apply_delta(folder, there, check_base="ignore")


def test_a_merged_lora_is_a_delta_too(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=4, targets=("query",))
    params = lj.attach(kit.base(), method, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf, moves: leaf + 1 if moves else leaf, params, lj.trainable_mask(params, method))
    merged = lj.merge_params(params)
    folder = export_delta(tmp_path, merged, kit.base(), names=NAMES)
    assert read_safetensors(folder / TENSORS).keys() == {"model.layers.0.query.weight"}
    chex.assert_trees_all_equal(apply_delta(folder, kit.base(), names=NAMES), merged)
    with pytest.raises(
        lj.AdapterError, match=r"`params` has factors, at query/kernel.*fold them in with `lj.merge_params`"
    ):
        export_delta(tmp_path, params, kit.base(), names=NAMES)
    with pytest.raises(lj.AdapterError, match="`target` has factors, at query/kernel: pass the base"):
        apply_delta(folder, params, names=NAMES)


def test_a_base_in_bfloat16(tmp_path: Path) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kit.base())
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    with pytest.raises(lj.AdapterError, match="are equal: there is nothing to write"):
        export_delta(tmp_path, wide, half, names=NAMES)
    wide["query"]["bias"] = wide["query"]["bias"] + 1
    folder = export_delta(tmp_path, wide, half, names=NAMES)
    after = apply_delta(folder, half, names=NAMES)
    assert after["query"]["bias"].dtype == jnp.float32
    chex.assert_trees_all_equal(after["query"]["bias"], wide["query"]["bias"])


def test_split_heads_and_other_layouts(tmp_path: Path) -> None:
    base = {"q": {"kernel": jnp.arange(24.0).reshape(4, 2, 3), "bias": jnp.arange(6.0).reshape(2, 3)}}
    names, uses = {"q/kernel": "q", "q/bias": "q"}, {"q/kernel": lj.Use("dot_general", "ioo")}
    after = jax.tree.map(lambda leaf: leaf + 1, base)
    folder = export_delta(tmp_path, after, base, names=names, uses=uses)
    shapes = {name: array.shape for name, array in read_safetensors(folder / TENSORS).items()}
    assert shapes == {"q.weight": (6, 4), "q.bias": (6,)}
    chex.assert_trees_all_equal(apply_delta(folder, base, names=names, uses=uses), after)
    folder = export_delta(tmp_path, after, base, names=names, uses=uses, fan_in_fan_out=("q",))
    assert read_safetensors(folder / TENSORS)["q.weight"].shape == (4, 6)
    chex.assert_trees_all_equal(apply_delta(folder, base, names=names, uses=uses, fan_in_fan_out=("q",)), after)


def test_a_square_weight_is_not_guessed(tmp_path: Path) -> None:
    base, names = {"q": {"kernel": jnp.arange(9.0).reshape(3, 3)}}, {"q/kernel": "h.0.q"}
    after = jax.tree.map(lambda leaf: leaf + 1, base)
    with pytest.raises(lj.AdapterError, match=r"`q/kernel` \(3, 3\) is square.*pass `fan_in_fan_out"):
        export_delta(tmp_path, after, base, names=names)
    folder = export_delta(tmp_path, after, base, names=names, fan_in_fan_out=("q",))
    np.testing.assert_array_equal(read_safetensors(folder / TENSORS)["h.0.q.weight"], after["q"]["kernel"])
    with pytest.raises(lj.AdapterError, match=r"is square"):
        apply_delta(folder, base, names=names)
    told = ModuleNames(names, fan_in_fan_out=("q",))
    chex.assert_trees_all_equal(apply_delta(folder, base, names=told), after)


def test_a_layout_that_is_not_said_shows_in_a_shape_that_is_not_square(tmp_path: Path) -> None:
    base, names = {"q": {"kernel": jnp.arange(8.0).reshape(4, 2)}}, {"q/kernel": "h.0.q"}
    after = jax.tree.map(lambda leaf: leaf + 1, base)
    folder = export_delta(tmp_path, after, base, names=names, fan_in_fan_out=("q",))
    message = r"'h.0.q.weight' has the shape \(4, 2\), and the base's has \(2, 4\)"
    with pytest.raises(lj.AdapterError, match=rf"{message}\. If its module stores \(in, out\).*`fan_in_fan_out`$"):
        apply_delta(folder, base, names=names)
    with pytest.raises(lj.AdapterError, match=rf"{message}$"):
        apply_delta(folder, base, names=names, fan_in_fan_out=())
    with pytest.raises(lj.AdapterError, match=rf"{message}$"):  # what a module of PyTorch's `Linear` has
        apply_delta(folder, {"h.0.q.weight": np.zeros((2, 4), np.float32)})


def test_another_base(folder: Path) -> None:
    other = kit.base(seed=1)
    message = r"was trained on another base: .*'?model.layers.0.query.bias'?` has other values.*check_base=\"warn\""
    for target, names in ((other, NAMES), (kit.state_dict(other), None)):
        with pytest.raises(lj.AdapterError, match=message):
            apply_delta(folder, target, names=names)
        with pytest.warns(UserWarning, match="was trained on another base"):
            apply_delta(folder, target, names=names, check_base="warn")
    after = apply_delta(folder, other, names=NAMES, check_base="ignore")
    chex.assert_trees_all_equal(after["query"]["bias"], tuned()["query"]["bias"])
    with pytest.raises(ValueError, match='`check_base` must be "error", "warn" or "ignore", got True'):
        apply_delta(folder, other, check_base=True)  # type: ignore[arg-type]


def test_what_is_not_exported(tmp_path: Path) -> None:
    base = kit.base()
    with pytest.raises(lj.AdapterError, match="`params` and `base_params` are equal: there is nothing to write"):
        export_delta(tmp_path, kit.base(), base, names=NAMES)
    with pytest.raises(lj.AdapterError, match="are no trees of one model, at extra"):
        export_delta(tmp_path, {**base, "extra": jnp.ones(2)}, base, names=NAMES)
    with pytest.raises(lj.AdapterError, match=r"`norm/bias` has the shape \(9,\), and the base's has \(8,\)"):
        export_delta(tmp_path, {**base, "norm": {**base["norm"], "bias": jnp.ones(9)}}, base, names=NAMES)
    with pytest.raises(lj.AdapterError, match=r"cannot export: NaN or infinity in model.norm.bias"):
        export_delta(tmp_path, {**base, "norm": {**base["norm"], "bias": jnp.full(8, jnp.inf)}}, base, names=NAMES)
    unnamed = {path: name for path, name in NAMES.items() if path != "query/bias"}
    with pytest.raises(lj.AdapterError, match="`names` lacks `query/bias`"):
        export_delta(tmp_path, tuned(), base, names=unnamed)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit(folder: Path) -> None:
    there = kit.state_dict(kit.base())
    short = {name: array for name, array in there.items() if name != "classifier.bias"}
    with pytest.raises(lj.AdapterError, match=r"has 'classifier.bias', and the mapping hasn't. Nearest: classifier"):
        apply_delta(folder, short)
    with pytest.raises(lj.AdapterError, match=r"'classifier.bias' has the shape \(3,\), and the base's has \(4,\)"):
        apply_delta(folder, {**there, "classifier.bias": np.ones(4)})
    with pytest.raises(lj.AdapterError, match=r"has 'classifier\.\w+', and `names` has no leaf for it. Nearest: "):
        apply_delta(folder, kit.base(), names={path: name for path, name in NAMES.items() if "classifier" not in path})
    with pytest.raises(
        lj.AdapterError, match="`target` is a list: pass a mapping of Hugging Face names, or a tree with"
    ):
        apply_delta(folder, [1])


def test_hostile_files(folder: Path, tmp_path: Path) -> None:
    good = read_safetensors(folder / TENSORS)
    there = kit.state_dict(kit.base())
    rewrite(folder, good | {"../x": np.ones(3, np.float32)})
    with pytest.raises(lj.AdapterError, match=r"has '../x', and the mapping hasn't"):
        apply_delta(folder, there)
    rewrite(folder, good | {"classifier.bias": np.full(3, np.nan, np.float32)})
    with pytest.raises(lj.AdapterError, match=r"is not usable: NaN or infinity in classifier.bias"):
        apply_delta(folder, there)
    write_safetensors(folder / TENSORS, {**good, "classifier.bias": np.ones(3, np.float32)})
    with pytest.raises(lj.AdapterError, match=r"is not the file that lora_jax_delta.json was written with"):
        apply_delta(folder, there)
    write_safetensors(folder / TENSORS, {**good, "classifier.bias": np.ones(4, np.float32)})
    with pytest.raises(lj.AdapterError, match=r"'classifier.bias' is float32 \(4,\), and lora_jax_delta.json says"):
        apply_delta(folder, there)
    write_safetensors(folder / TENSORS, {**good, "more": np.ones(4, np.float32)})
    with pytest.raises(lj.AdapterError, match="differ at 'more': copy both files again"):
        apply_delta(folder, there)
    (folder / TENSORS).rename(tmp_path / "secret")
    (folder / TENSORS).symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match="is a link that leaves"):
        apply_delta(folder, there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "describes no lora_jax delta: its `format` is not 'lora_jax delta'"),
        ({"version": 2}, "has the format version 2, and this lora_jax reads 1: install a newer lora_jax"),
        ({"tensors": []}, "`tensors` must give an object for each tensor"),
        ({"tensors": {"classifier.bias": 3}}, "`tensors` must give an object for each tensor"),
        ({"sha256": None}, "is not the file that lora_jax_delta.json was written with"),
    ],
)
def test_wrong_descriptions(folder: Path, change: dict[str, Any], message: str) -> None:
    with edited(folder) as description:
        description.update(change)
    with pytest.raises(lj.AdapterError, match=message):
        apply_delta(folder, kit.base(), names=NAMES)
