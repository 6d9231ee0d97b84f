from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import adapters
from lora_jax.adapters.fingerprint import fingerprint
from lora_jax.files import FileError, read_safetensors, sha256_file, write_safetensors

KEY = jax.random.key(0)
DESCRIPTION, TENSORS = "lora_jax_adapter.json", "adapter.safetensors"
METHOD = lj.LoRA(rank=2, alpha=3, targets=("dense",), also_train=("head",), dropout=0.25)


def base(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    return {"dense": {"kernel": draw(8, 4), "bias": draw(4)}, "head": {"kernel": draw(4, 2)}}


def trained(method: lj.Method = METHOD, seed: int = 0) -> Any:
    params = lj.attach(base(seed), method, key=KEY)
    mask = lj.trainable_mask(params, method)
    return jax.tree.map(lambda leaf, moves: leaf + 0.5 if moves else leaf, params, mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lj.save_adapter(tmp_path / "adapter", trained(), METHOD)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@contextlib.contextmanager
def edited(folder: Path) -> Iterator[Any]:
    """The description, to be changed."""
    description = json.loads((folder / DESCRIPTION).read_text())
    yield description
    (folder / DESCRIPTION).write_text(json.dumps(description))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], *, announce: bool = False) -> None:
    """Changes tensors on disk; with `announce` in the description too, as a careful forger would."""
    tensors = read_safetensors(folder / TENSORS)
    change(tensors)
    write_safetensors(folder / TENSORS, tensors)
    if announce:
        with edited(folder) as description:
            description["sha256"] = sha256_file(folder / TENSORS)
            description["tensors"] = {
                name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in tensors.items()
            }


# There and back.


def _any(value: Any) -> Any:
    """NumPy's numbers do as well, though not by their types."""
    return value


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        lj.LoRA(rank=2, alpha=3, targets=r"dense/.*", scaling="rank_stabilized", rank_overrides={"dense": 3}),
        lj.LoRA(rank=_any(np.int64(2)), alpha=_any(np.float32(3)), targets=lambda path, leaf: path == "dense/kernel"),
        lj.BitFit(also_train=("head",)),
        lj.FullFineTune(also_train=("head",)),
        lj.Frozen(also_train="head/.*"),
    ],
    ids=["names", "regex", "callable", "bitfit", "full", "frozen"],
)
def test_what_is_loaded_is_what_was_saved(method: lj.Method, tmp_path: Path) -> None:
    params = trained(method)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, method), base())
    chex.assert_trees_all_equal(loaded.params, params)
    chex.assert_trees_all_equal_structs(loaded.params, params)
    assert lj.label_params(loaded.params, loaded.method) == lj.label_params(params, method)
    # What is saved again is the same, byte for byte: the method has been resolved.
    again = lj.save_adapter(tmp_path / "again", loaded.params, loaded.method)
    assert (again / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()
    assert (again / DESCRIPTION).read_bytes() == (tmp_path / DESCRIPTION).read_bytes()


def test_it_holds_what_was_trained_and_its_settings(folder: Path) -> None:
    assert sorted(read_safetensors(folder / TENSORS)) == ["dense/kernel/a", "dense/kernel/b", "head/kernel"]
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, DESCRIPTION]
    method = lj.load_adapter(folder, base()).method
    assert method == lj.LoRA(rank=2, alpha=3, targets=("/dense/kernel",), also_train=("/head/kernel",), dropout=0.25)


def test_overrides_are_resolved_to_paths(tmp_path: Path) -> None:
    method = lj.LoRA(rank=2, alpha=3, targets=("dense",), rank_overrides={"dense": 4}, alpha_overrides={"dense": 5})
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, trained(method), method), base()).method
    assert isinstance(loaded, lj.LoRA)
    assert loaded.rank_overrides == {"/dense/kernel": 4}
    assert loaded.alpha_overrides == pytest.approx({"/dense/kernel": 5})


def test_it_fits_its_base_in_bfloat16_too(folder: Path) -> None:
    """The fingerprint is of values rounded to bfloat16; factors stay float32, the head as it was saved."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base())
    loaded = lj.load_adapter(folder, half).params
    assert loaded["dense"]["kernel"].base is half["dense"]["kernel"]
    assert loaded["dense"]["kernel"].a.dtype == loaded["head"]["kernel"].dtype == jnp.float32


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base())
    params = lj.attach(half, METHOD, key=KEY)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, METHOD), half).params
    chex.assert_trees_all_equal_dtypes(loaded, params)
    chex.assert_trees_all_equal(loaded, params)


def test_frozen_leaves_are_those_of_the_base(folder: Path) -> None:
    tree = base()
    loaded = lj.load_adapter(folder, tree).params
    assert loaded["dense"]["bias"] is tree["dense"]["bias"]
    assert loaded["dense"]["kernel"].base is tree["dense"]["kernel"]


def test_an_adapter_at_the_root_of_a_tree(tmp_path: Path) -> None:
    method = lj.LoRA(rank=1, alpha=1, targets=lambda path, leaf: True)
    params = lj.attach(jnp.ones((4, 3)), method, key=KEY)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, params, method), jnp.ones((4, 3)))
    chex.assert_trees_all_equal(loaded.params, params)


def test_a_loaded_adapter_lies_as_an_attached_one_does(folder: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x", None))
    tree = jax.device_put(base(), {"dense": {"kernel": sharding, "bias": None}, "head": {"kernel": sharding}})
    attached, loaded = lj.attach(tree, METHOD, key=KEY), lj.load_adapter(folder, tree).params
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(attached), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        assert ours.committed == theirs.committed


def test_two_adapters_of_one_base_replace_each_other(tmp_path: Path) -> None:
    first, second = trained(), jax.tree.map(lambda leaf: leaf, trained())
    second["head"]["kernel"] = -second["head"]["kernel"]
    lj.save_adapter(tmp_path, first, METHOD)
    lj.save_adapter(tmp_path, second, METHOD)
    chex.assert_trees_all_equal(lj.load_adapter(tmp_path, base()).params, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS, DESCRIPTION]


# Another base.


def test_another_base_is_refused(folder: Path) -> None:
    other = base(seed=1)
    with pytest.raises(
        lj.AdapterError, match=r"was trained on another base: .*`dense/kernel` has other values.*check_base"
    ):
        lj.load_adapter(folder, other)
    with pytest.warns(UserWarning, match="was trained on another base"):
        lj.load_adapter(folder, other, check_base="warn")
    assert lj.load_adapter(folder, other, check_base="ignore").params["dense"]["bias"] is other["dense"]["bias"]
    with pytest.raises(ValueError, match='`check_base` must be "error", "warn" or "ignore", got True'):
        lj.load_adapter(folder, other, check_base=True)  # type: ignore[arg-type]


def test_the_fingerprint_covers_the_frozen_leaves_alone(folder: Path) -> None:
    """A head that was trained since differs from the base's, and that is as it should be."""
    tree = base()
    tree["head"]["kernel"] = tree["head"]["kernel"] + 1
    lj.load_adapter(folder, tree)
    tree["dense"]["bias"] = tree["dense"]["bias"] + 1
    with pytest.raises(lj.AdapterError, match="another base: `dense/bias` has other values"):
        lj.load_adapter(folder, tree)


def test_a_base_of_another_structure_or_shape(folder: Path) -> None:
    tree = base()
    tree["extra"] = jnp.ones(2)
    with pytest.raises(lj.AdapterError, match="another base: `extra` was not in it"):
        lj.load_adapter(folder, tree)
    tree = base()
    del tree["dense"]["bias"]
    with pytest.raises(lj.AdapterError, match="another base: `dense/bias` is missing here"):
        lj.load_adapter(folder, tree)
    tree = base()
    tree["dense"]["bias"] = jnp.ones(5)
    with pytest.raises(lj.AdapterError, match=r"`dense/bias` had the shape \(4,\), not \(5,\)"):
        lj.load_adapter(folder, tree)
    tree = base()
    tree["dense"]["kernel"] = jnp.ones((9, 4))
    with pytest.raises(lj.AdapterError, match=r"`dense/kernel`: `a` has the shape \(2, 8\), expected \(2, 9\)"):
        lj.load_adapter(folder, tree, check_base="ignore")
    tree = base()
    tree["head"]["kernel"] = jnp.ones((4, 3))
    with pytest.raises(
        lj.AdapterError, match=r"`head/kernel` has the shape \(4, 2\), and the base's leaf has \(4, 3\)"
    ):
        lj.load_adapter(folder, tree, check_base="ignore")
    tree = base()
    tree["dense"] = {"weight": tree["dense"]["kernel"], "bias": tree["dense"]["bias"]}
    with pytest.raises(lj.AdapterError, match=r"has `dense/kernel`, and the base has no such leaf.*Nearest: "):
        lj.load_adapter(folder, tree)


def test_a_base_with_factors_is_refused(folder: Path) -> None:
    with pytest.raises(lj.AdapterError, match="`base_params` has factors already, at dense/kernel: pass the base"):
        lj.load_adapter(folder, trained())


# Files from elsewhere.


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere/lora_jax_adapter.json doesn't exist"):
        lj.load_adapter(tmp_path / "nowhere", base())
    (folder / TENSORS).unlink()
    with pytest.raises(FileError, match=r"adapter.safetensors doesn't exist"):
        lj.load_adapter(folder, base())


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_truncated_file(folder: Path, length: int) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileError, match=r"truncated|needs 8 or more"):
        lj.load_adapter(folder, base())


def test_a_header_that_claims_100_gigabytes(folder: Path) -> None:
    (folder / TENSORS).write_bytes(struct.pack("<Q", 100 * 10**9) + b"{}")
    with pytest.raises(FileError, match="claims a header of 100,000,000,000 bytes, and has 10"):
        lj.load_adapter(folder, base())


def test_tensors_that_claim_100_gigabytes(folder: Path) -> None:
    header = json.dumps({"dense/kernel/a": {"dtype": "F32", "shape": [25 * 10**9], "data_offsets": [0, 10**11]}})
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(FileError, match=r"adapter.safetensors is no whole safetensors file"):
        lj.load_adapter(folder, base())


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("dense/kernel/b"))
    with pytest.raises(lj.AdapterError, match=r"lacks dense/kernel/b, compared with what lora_jax_adapter.json lists"):
        lj.load_adapter(folder, base())
    rewrite(folder, lambda tensors: None, announce=True)
    with pytest.raises(lj.AdapterError, match="lacks dense/kernel/b"):
        lj.load_adapter(folder, base())


def test_an_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(more=np.ones(2, np.float32)))
    with pytest.raises(lj.AdapterError, match=r"also has more, compared with what lora_jax_adapter.json lists"):
        lj.load_adapter(folder, base())
    rewrite(folder, lambda tensors: None, announce=True)
    with pytest.raises(lj.AdapterError, match="has `more`, and the base has no such leaf"):
        lj.load_adapter(folder, base())


def test_a_tensor_that_the_method_does_not_train(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"dense/bias": np.ones(4, np.float32)}), announce=True)
    with pytest.raises(lj.AdapterError, match="its tensors aren't those that its method trains, at dense/bias"):
        lj.load_adapter(folder, base(), check_base="ignore")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "dense/../head/kernel", "C:\\evil"])
def test_a_name_that_leads_out_is_no_leaf(folder: Path, name: str) -> None:
    """Names are looked up in the base and nowhere else."""
    before = set(folder.parent.rglob("*"))
    rewrite(folder, lambda tensors: tensors.update({name: tensors.pop("head/kernel")}), announce=True)
    with pytest.raises(lj.AdapterError, match="and the base has no such leaf"):
        lj.load_adapter(folder, base())
    with edited(folder) as description:
        description["adapted"][name] = description["adapted"].pop("dense/kernel")
    with pytest.raises(lj.AdapterError, match="and the base has no such leaf"):
        lj.load_adapter(folder, base())
    assert set(folder.parent.rglob("*")) == before


def test_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    params = trained()
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(lj.AdapterError, match="cannot be saved: NaN or infinity in head/kernel"):
        lj.save_adapter(tmp_path / "new", params, METHOD)
    assert not (tmp_path / "new").exists()
    rewrite(folder, lambda tensors: tensors["dense/kernel/a"].__setitem__((0, 0), np.inf), announce=True)
    with pytest.raises(lj.AdapterError, match="is not usable: NaN or infinity in dense/kernel/a"):
        lj.load_adapter(folder, base())


def test_a_wrong_dtype_or_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"head/kernel": tensors["head/kernel"].astype(np.float16)}))
    with pytest.raises(
        lj.AdapterError, match=r"`head/kernel` is float16 \(4, 2\), and lora_jax_adapter.json says float32"
    ):
        lj.load_adapter(folder, base())
    rewrite(folder, lambda tensors: tensors.update({"head/kernel": np.ones((4, 2), np.int32)}), announce=True)
    with pytest.raises(lj.AdapterError, match="`head/kernel` is int32, and a trained leaf has a floating dtype"):
        lj.load_adapter(folder, base())
    rewrite(folder, lambda tensors: tensors.update({"head/kernel": np.ones((2, 2), np.float32)}), announce=True)
    with pytest.raises(
        lj.AdapterError, match=r"`head/kernel` has the shape \(2, 2\), and the base's leaf has \(4, 2\)"
    ):
        lj.load_adapter(folder, base())


def test_factors_of_two_ranks(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"dense/kernel/b": np.ones((3, 4), np.float32)}), announce=True)
    with pytest.raises(
        lj.AdapterError, match=r"`b` has the shape \(3, 4\), expected \(2, 4\) beside a base of \(8, 4\)"
    ):
        lj.load_adapter(folder, base())


def test_tensors_of_another_adapter(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["head/kernel"].__iadd__(1))
    with pytest.raises(
        lj.AdapterError, match=r"is not the file that lora_jax_adapter.json was written with: copy both"
    ):
        lj.load_adapter(folder, base())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "other", "describes no lora_jax adapter: its `format` is not 'lora_jax adapter'"),
        (("version",), 2, "has the format version 2, and this lora_jax reads 1: install a newer lora_jax"),
        (
            ("method", "name"),
            "AdaLoRA",
            "no method .AdaLoRA., only BitFit, BottleneckAdapter, DoRA, Frozen, FullFineTune",
        ),
        (
            ("method", "rank"),
            0,
            "the description of the method LoRA is not usable: `rank` must be a positive integer, got 0",
        ),
        (("method", "surprise"), 1, "the description of the method LoRA is not usable: .*surprise"),
        (("method", "also_train"), "(h+)+x", "`also_train` of the method must be a list of leaf paths"),
        (
            ("method", "also_train"),
            ["/other"],
            "its method does not fit the base: `also_train` entry '/other' matches no",
        ),
        (("method", "also_train"), [], "its tensors aren't those that its method trains, at head/kernel"),
        (("adapted", "dense/kernel", "node"), "OtherWeight", "`dense/kernel` is adapted in a way that this lora_jax"),
        (
            ("adapted", "dense/kernel", "axes"),
            "ioo",
            r"the axis labels 'ioo' of `dense/kernel` do not fit the base's \(8",
        ),
        (("adapted", "dense/kernel", "axes"), "ix", "the axis labels 'ix' of `dense/kernel` do not fit"),
        (("adapted", "dense/kernel", "scale"), "1", "`dense/kernel` has settings that are no finite float32 numbers"),
        (("adapted", "dense/kernel", "scale"), float("nan"), "settings that are no finite float32 numbers"),
        (
            ("adapted", "dense/kernel", "dropout"),
            1.5,
            r"does not fit LoRAWeight: `dropout` must be in \[0, 1\), got 1.5",
        ),
        (("adapted", "dense/kernel", "more"), 1, "the description of `dense/kernel` does not fit LoRAWeight: .*more"),
        (("tensors",), [], "`tensors` must be a JSON dict, got list"),
        (("tensors", "head/kernel"), "x", "`tensors` must give a `shape` for head/kernel, got 'x'"),
        (("base", "dense/bias"), {"shape": 4}, "`base` must give a `shape` for dense/bias"),
    ],
)
def test_a_description_that_was_edited(folder: Path, place: tuple[str, ...], value: Any, message: str) -> None:
    with edited(folder) as description:
        entry = description
        for name in place[:-1]:
            entry = entry[name]
        entry[place[-1]] = value
    with pytest.raises(lj.AdapterError, match=message):
        lj.load_adapter(folder, base())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d["adapted"]["dense/kernel"].update(scale=1500.0), d["method"].update(alpha=3000)),
        lambda d: d["adapted"]["dense/kernel"].update(dropout=0.5),
        lambda d: d["method"].update(freeze_a=True),
        lambda d: d["base"].pop("dense/bias"),
        lambda d: d.update(note="mine"),
        lambda d: d.update(checksum="sha256:"),
    ],
    ids=["scale", "dropout", "frozen", "base", "more", "checksum"],
)
def test_a_change_that_fits_everything_but_the_checksum(folder: Path, change: Callable[[Any], object]) -> None:
    with edited(folder) as description:
        change(description)
    message = r"lora_jax_adapter.json isn't what its `checksum` was written for: .* remove the entry `checksum`"
    with pytest.raises(FileError, match=message):
        lj.load_adapter(folder, base(), check_base="ignore")
    with pytest.raises(FileError, match=message):
        adapters.read_description(folder)
    with edited(folder) as description:
        del description["checksum"]  # as earlier versions wrote it
    lj.load_adapter(folder, base(), check_base="ignore")


def test_a_damaged_description_never_raises_anything_else(folder: Path) -> None:
    """Every value in turn is replaced by what does not belong there, or dropped."""
    original = json.loads((folder / DESCRIPTION).read_text())

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield (*path, key)
            yield from places(item, (*path, key))

    refused = 0
    for place in places(original):
        for junk in (None, True, -1, 1e300, 10**400, "../x", [[]], {"a": []}, "absent"):
            broken = copy.deepcopy(original)
            entry = broken
            for key in place[:-1]:
                entry = entry[key]
            entry[place[-1]] = junk
            if junk == "absent":
                del entry[place[-1]]
            (folder / DESCRIPTION).write_text(json.dumps(broken))
            try:
                lj.load_adapter(folder, base())
            except (lj.AdapterError, FileError):
                refused += 1
    assert refused > 300


def test_a_description_that_is_no_json(folder: Path) -> None:
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(FileError, match=r"lora_jax_adapter.json: the file is not JSON"):
        lj.load_adapter(folder, base())
    (folder / DESCRIPTION).write_text("[]")
    with pytest.raises(lj.AdapterError, match="describes no lora_jax adapter"):
        lj.load_adapter(folder, base())


# Saving.


def test_the_trainable_part_alone_is_refused(tmp_path: Path) -> None:
    trainable, _ = lj.partition(trained(), lj.trainable_mask(trained(), METHOD))
    with pytest.raises(lj.AdapterError, match=r"`params` lacks the base weights, at dense/kernel: save `lj.combine\("):
        lj.save_adapter(tmp_path, trainable, METHOD)


def test_dropout_keys_are_not_saved(tmp_path: Path, folder: Path) -> None:
    keyed = lj.save_adapter(tmp_path / "keyed", lj.with_dropout(trained(), KEY), METHOD)
    assert files(keyed) == files(folder)


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_a_save_cut_short_leaves_the_earlier_adapter_or_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The tensors take their place first; from then on it is the new adapter, wherever its description is."""
    earlier = trained()
    trainable, frozen = lj.partition(earlier, lj.trainable_mask(earlier, METHOD))
    new = lj.combine(jax.tree.map(lambda leaf: 2 * leaf, trainable), frozen)
    replace = os.replace

    def cut_short(source: Any, target: Any) -> None:
        if Path(target) == folder / name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            lj.save_adapter(folder, new, METHOD)
    chex.assert_trees_all_equal(lj.load_adapter(folder, base()).params, earlier if name == TENSORS else new)

    lj.save_adapter(folder, earlier, METHOD)
    chex.assert_trees_all_equal(lj.load_adapter(folder, base()).params, earlier)
    assert sorted(files(folder)) == sorted([DESCRIPTION, TENSORS])


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_earlier_adapter_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = files(folder)
    other = trained()
    other["head"]["kernel"] = -other["head"]["kernel"]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "open") if step == "open" else (os, step)), full)
        with pytest.raises(FileError, match=r"needs [\d,]+ bytes, and the disk \(or the quota\) is full"):
            lj.save_adapter(folder, other, METHOD)
    assert files(folder) == before
    chex.assert_trees_all_equal(lj.load_adapter(folder, base()).params, trained())
    lj.save_adapter(folder, other, METHOD)
    chex.assert_trees_all_equal(lj.load_adapter(folder, base()).params, other)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file cannot hold an adapter: .* Choose another folder"):
        lj.save_adapter(tmp_path / "file", trained(), METHOD)


def test_file_names_of_peft_are_not_used(folder: Path) -> None:
    """PEFT would load such a folder with B = 0 and only warn."""
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(files(folder))


def test_the_fingerprint_does_not_depend_on_where_and_how_leaves_lie() -> None:
    rng = np.random.default_rng(0)
    host = {"w": rng.normal(size=(8, 6, 4)).astype(np.float32), "scalar": np.float32(3), "empty": np.ones((0, 3))}
    wanted = fingerprint(host)
    assert len({entry["sample"] for entry in wanted.values()}) == 3
    mesh = jax.make_mesh((2,), ("x",))
    for spec in (jax.P("x"), jax.P(None, None, "x"), jax.P()):
        sharded = jax.device_put(jnp.asarray(host["w"]), jax.NamedSharding(mesh, spec))
        assert fingerprint({"w": sharded})["w"] == fingerprint({"w": jnp.asarray(host["w"])})["w"] == wanted["w"]
    changed = host["w"].copy()
    changed[-1, -1, -1] += 1
    assert fingerprint({"w": changed})["w"] != wanted["w"]
