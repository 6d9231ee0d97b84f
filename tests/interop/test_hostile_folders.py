"""A PEFT folder from elsewhere is a claim: each false one is refused by name, before memory is taken for it."""

from __future__ import annotations

import json
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.files import FileError
from lora_jax.interop import import_peft
from lora_jax.paths import leaves_by_path

from . import kit
from .kit import EMBED, HEAD, NAMES, NORM, PREFIX, QUERY, VALUE

A, B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
GOOD = kit.factors(QUERY) | kit.factors(VALUE)


def load(folder: Path, **arguments: Any) -> lj.Adapter:
    return import_peft(folder, kit.base(), names=NAMES, **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return kit.write_peft(tmp_path / "adapter")


def write_raw(folder: Path, header: Any, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / kit.WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# The file.


def test_a_corrupt_header(folder: Path) -> None:
    for header in (b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000):
        write_raw(folder, header)
        with pytest.raises(FileError, match=r"adapter_model.safetensors is no whole safetensors file"):
            load(folder)


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_a_truncated_file(folder: Path, length: int) -> None:
    path = folder / kit.WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileError, match=r"adapter_model.safetensors is (truncated|no whole safetensors file)"):
        load(folder)


def test_a_length_beyond_the_file(folder: Path) -> None:
    write_raw(folder, {A: entry([2, 8], 0, 64)}, bytes(32))
    with pytest.raises(FileError, match="is no whole safetensors file"):
        load(folder)
    (folder / kit.WEIGHTS).write_bytes(struct.pack("<Q", 10**11) + b"{}")
    with pytest.raises(FileError, match="claims a header of 100,000,000,000 bytes, and has 10 in all"):
        load(folder)


def test_overlapping_offsets(folder: Path) -> None:
    write_raw(folder, {A: entry([2, 8], 0, 64), B: entry([6, 2], 32, 80)}, bytes(80))
    with pytest.raises(FileError, match="is no whole safetensors file"):
        load(folder)


def test_a_claim_of_100_gigabytes(folder: Path) -> None:
    write_raw(folder, {A: entry([25 * 10**9], 0, 10**11)})
    with pytest.raises(FileError, match="is no whole safetensors file"):
        load(folder)


def test_100_gigabytes_of_nothing(folder: Path) -> None:
    """A sparse file that is as long as it claims: its shapes are refused before a tensor is read."""
    rows = 10**11 // 32
    header = {A: entry([rows, 8], 0, 32 * rows), B: entry([6, 2], 32 * rows, 32 * rows + 48)}
    write_raw(folder, header)
    with (folder / kit.WEIGHTS).open("r+b") as file:
        try:
            file.truncate(8 + len(json.dumps(header)) + 32 * rows + 48)
        except OSError as error:
            pytest.skip(f"no file of this length here: {error}")
    started = time.monotonic()
    with pytest.raises(lj.AdapterError, match=rf"the factors of {QUERY} have two ranks, {rows} and 2"):
        load(folder)
    header[B] = entry([6, rows], 32 * rows, 56 * rows)
    write_raw(folder, header)
    with (folder / kit.WEIGHTS).open("r+b") as file:
        file.truncate(8 + len(json.dumps(header)) + 56 * rows)
    with pytest.raises(lj.AdapterError, match=rf"have the rank {rows}, and `query/kernel` \(8, 6\) allows 1 to 12"):
        load(folder)
    assert time.monotonic() - started < 20


def test_a_name_twice(folder: Path) -> None:
    one, two = (json.dumps({A: entry([2, 8], start, start + 64)})[1:-1] for start in (0, 0))
    write_raw(folder, f"{{{one}, {two}}}".encode(), bytes(64))
    with pytest.raises(FileError, match=f"has two entries named '{A}' in its header"):
        load(folder)
    (folder / kit.CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "r": 3}')
    with pytest.raises(FileError, match="the file has two entries named 'r', and one of each name is expected"):
        load(folder)


def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    for name in (kit.CONFIG, kit.WEIGHTS):
        secret = tmp_path / f"secret-{name}"
        (folder / name).rename(secret)
        (folder / name).symlink_to(secret)
        with pytest.raises(FileError, match=f"The name '{name}' is a link that leaves"):
            load(folder)
        (folder / name).unlink()
        secret.rename(folder / name)
    load(folder)


def test_the_links_of_a_hugging_face_cache(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (kit.CONFIG, kit.WEIGHTS):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    load(snapshot)


def test_pickles_are_not_read(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('the pickle ran')",)

    (folder / kit.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(lj.AdapterError, match=r"adapter_model.bin is a pickle, .* safe_serialization=True"):
        load(folder)
    (folder / "adapter_model.bin").rename(folder / kit.WEIGHTS)
    with pytest.raises(FileError, match="is a pickle"):
        load(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere/adapter_config.json doesn't exist"):
        load(tmp_path / "nowhere")
    (folder / kit.WEIGHTS).unlink()
    with pytest.raises(FileError, match=r"adapter_model.safetensors doesn't exist"):
        load(folder)


# The tensors.


def changed(**changes: Any) -> dict[str, Any]:
    tensors = {**GOOD, **changes}
    return {name: array for name, array in tensors.items() if array is not None}


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: None}, rf"the factors of {QUERY} are no pair: '{A}' is missing"),
        ({B: None}, rf"the factors of {QUERY} are no pair: '{B}' is missing"),
        ({A: None, B: None}, rf"it lacks {A}, by what adapter_config.json says and `names` has"),
        ({A: floats(2, 9)}, rf"'{A}' has the shape \(2, 9\), expected \(r, 8\) beside `query/kernel` \(8, 6\)"),
        ({B: floats(7, 2)}, rf"'{B}' has the shape \(7, 2\), expected \(6, r\) beside `query/kernel` \(8, 6\)"),
        ({A: floats(2, 8, 1)}, rf"'{A}' has the shape \(2, 8, 1\), expected \(r, 8\)"),
        ({A: floats(3, 8)}, rf"the factors of {QUERY} have two ranks, 3 and 2"),
        ({A: floats(3, 8), B: floats(6, 3)}, rf"{QUERY} have the rank 3, and `r` of adapter_config.json says 2"),
        ({A: floats(0, 8), B: floats(6, 0)}, rf"{QUERY} have the rank 0, and `query/kernel` \(8, 6\) allows 1 to 12"),
        ({A: np.ones((2, 8), np.int8)}, rf"'{A}' is int8, and one of float32, float16, bfloat16 is expected"),
        ({A: np.ones((2, 8))}, rf"'{A}' is float64, and one of float32"),
        ({A: np.full((2, 8), np.nan, np.float32)}, rf"is not usable: NaN or infinity in {A}"),
        ({B: np.full((6, 2), np.inf, np.float32)}, rf"is not usable: NaN or infinity in {B}"),
        ({"lora_A.weight": floats(2)}, "the tensor 'lora_A.weight' has no name of PEFT's"),
        ({f"{PREFIX}x.lora_A.weight": floats(2)}, "the factors of x are no pair"),
        (kit.factors(EMBED) | {f"{PREFIX}{EMBED}.lora_embedding_A": floats(2, 9)}, r"expected \(r, 11\) beside `embed"),
        (
            {f"{PREFIX}{EMBED}.lora_A.weight": floats(2, 8), f"{PREFIX}{EMBED}.lora_B.weight": floats(11, 2)},
            f"{EMBED} has a linear layer's factors, and `embed/embedding` is an embedding",
        ),
        (
            {f"{PREFIX}{NORM}.lora_A.weight": floats(2, 8), f"{PREFIX}{NORM}.lora_B.weight": floats(8, 2)},
            rf"{NORM} has factors, and `norm/scale` \(8,\) is no weight",
        ),
        (
            {f"{PREFIX}{QUERY}.lora_A.default.weight": floats(2, 8)},
            "If it has an adapter's name in it, save the adapter",
        ),
        ({f"{PREFIX}{QUERY}.lora_magnitude_vector": floats(6)}, "is there, and `use_dora` of .* is false"),
        ({f"{PREFIX}{QUERY}.lora_B.bias": floats(6)}, "is a bias beside `lora_B`"),
        ({f"{PREFIX}{QUERY}.lora_diag": floats(2)}, "is no tensor of a plain LoRA"),
        ({f"{PREFIX}{HEAD}.running_mean": floats(3)}, "is neither a factor nor a `weight` or `bias`"),
        ({f"{PREFIX}weight": floats(3)}, "is neither a factor nor a `weight` or `bias`"),
        ({f"{PREFIX}{HEAD}.weight": floats(3, 8)}, r"is another value of `classifier/kernel`, which .* isn't trained"),
        ({f"{PREFIX}{QUERY}.base_layer.bias": floats(6)}, "is another value of `query/bias`"),
        ({f"{PREFIX}{QUERY}.bias": floats(6)}, rf"{QUERY} has factors, so PEFT has it as '.*query.base_layer.bias'"),
        (
            {f"{PREFIX}{HEAD}.base_layer.bias": floats(3)},
            rf"{HEAD} has no factors, so PEFT has it as '.*classifier.bias'",
        ),
        ({f"{PREFIX}{HEAD}.original_module.bias": floats(3)}, "of a module that `modules_to_save` doesn't have"),
        ({f"{PREFIX}model.lm_head.weight": floats(3, 8)}, r"and `names` has no leaf for it. Nearest modules"),
        ({f"{PREFIX}../../etc/passwd.weight": floats(3, 8)}, r"and `names` has no leaf for it. Nearest modules"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    kit.write_peft(tmp_path, changed(**tensors))
    with pytest.raises(lj.AdapterError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "entries", "message"),
    [
        (kit.whole(f"{HEAD}.weight"), {"modules_to_save": [HEAD]}, r"it lacks .*classifier\.bias"),
        ({}, {"modules_to_save": [HEAD]}, r"it lacks .*classifier\.weight, .*classifier\.bias"),
        (
            {f"{PREFIX}{HEAD}.weight": floats(4, 8)},
            {"modules_to_save": [HEAD]},
            r"\(4, 8\), expected \(3, 8\) for `class",
        ),
        (kit.whole(f"{QUERY}.base_layer.bias"), {"bias": "lora_only"}, r"it lacks .*value\.base_layer\.bias"),
        (kit.whole(f"{QUERY}.base_layer.bias"), {"bias": "all"}, r"it lacks .*norm\.bias|value"),
        ({}, {"modules_to_save": ["query"]}, "has factors, and `modules_to_save` says that it is trained in full"),
        ({}, {"target_modules": ["query", "value", HEAD]}, r"it lacks .*classifier\.lora_A\.weight"),
        (
            {},
            {"rank_pattern": {"query": 3}},
            "have the rank 2, and `rank_pattern` 'query' of adapter_config.json says 3",
        ),
        (
            {},
            {"alpha_pattern": {"(v|q)+": 3}},
            r"the `alpha_pattern` '\(v\|q\)\+' is a regular expression, and a stranger",
        ),
    ],
)
def test_tensors_that_contradict_the_config(
    tmp_path: Path, tensors: dict[str, Any], entries: dict[str, Any], message: str
) -> None:
    kit.write_peft(tmp_path, changed(**tensors), **entries)
    with pytest.raises(lj.AdapterError, match=message):
        load(tmp_path)


def test_a_file_without_factors(tmp_path: Path) -> None:
    kit.write_peft(tmp_path, kit.whole(f"{HEAD}.weight", f"{HEAD}.bias"), modules_to_save=[HEAD])
    with pytest.raises(lj.AdapterError, match="it has no factor, so it is no LoRA"):
        load(tmp_path)


def test_a_base_with_factors(folder: Path) -> None:
    params = load(folder).params
    with pytest.raises(lj.AdapterError, match="`base_params` has factors already, at query/kernel, value/kernel"):
        import_peft(folder, params, names=NAMES)


def test_an_error_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    """Nothing is half done: the only result is the return value."""
    tree = kit.base()
    before = {path: np.asarray(leaf).copy() for path, leaf in leaves_by_path(tree).items()}
    kit.write_peft(tmp_path, changed(**{B: np.full((6, 2), np.nan, np.float32)}))
    with pytest.raises(lj.AdapterError):
        import_peft(tmp_path, tree, names=NAMES)
    for path, leaf in leaves_by_path(tree).items():
        np.testing.assert_array_equal(leaf, before[path])


# The config.


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": "8"}, "`r` must be a whole number of at least 1, got '8'"),
        ({"r": True}, "`r` must be a whole number of at least 1, got True"),
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"r": 10**30}, "`r` must be a whole number"),
        ({"lora_alpha": [1]}, r"`lora_alpha` must be a positive number, got \[1\]"),
        ({"lora_alpha": -1}, "`lora_alpha` must be a positive number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` must be a positive number"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` must be a positive number"),
        ({"unknown": {"a": [1, float("nan")]}}, "has a NaN or an infinity, which JSON lacks, in unknown"),
        ({"revision": float("inf")}, "has a NaN or an infinity, which JSON lacks, in revision"),
        ({"lora_dropout": 1.5}, r"`lora_dropout` must be a number in \[0, 1\)"),
        ({"lora_dropout": None}, r"`lora_dropout` must be a number in \[0, 1\), got None"),
        ({"bias": "some"}, '`bias` must be "none", "all" or "lora_only", got \'some\''),
        ({"bias": ["all"]}, "`bias` must be"),
        ({"use_rslora": 1}, "`use_rslora` must be true or false, got 1"),
        ({"fan_in_fan_out": "no"}, "`fan_in_fan_out` must be true or false"),
        ({"target_modules": {"query": 1}}, "`target_modules` must be a list of names, an expression or null"),
        ({"target_modules": [3]}, "`target_modules` must be a list of names"),
        ({"modules_to_save": "classifier"}, "`modules_to_save` must be a list of names or null, got 'classifier'"),
        ({"modules_to_save": [""]}, "`modules_to_save` must be a list of names"),
        ({"rank_pattern": [1]}, "`rank_pattern` must be an object of whole numbers"),
        ({"rank_pattern": {"query": 2.5}}, "`rank_pattern` must be an object of whole numbers"),
        ({"rank_pattern": {str(i): 2 for i in range(20_000)}}, "`rank_pattern` must be an object"),
        ({"alpha_pattern": {"query": "4"}}, "`alpha_pattern` must be an object of positive numbers"),
        ({"base_model_name_or_path": 5}, "`base_model_name_or_path` must be a string or null"),
        ({"task_type": {}}, "`task_type` must be a string or null"),
        ({"init_lora_weights": 3}, "`init_lora_weights` must be true, false or a string"),
        ({"peft_type": "IA3"}, "is of the type 'IA3', and only LORA can be read"),
        ({"peft_type": None}, "`peft_type` must be a string"),
        # What can't be represented.
        ({"use_dora": True}, "query.lora_magnitude_vector' is missing, and `use_dora` of .* is true"),
        ({"use_dora": 1}, "`use_dora` must be true or false"),
        ({"use_qalora": True}, "`use_qalora`: QALoRA"),
        ({"lora_bias": True}, "`lora_bias`: a bias beside `lora_B`"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens`: aLoRA"),
        ({"layer_replication": [[0, 1]]}, "`layer_replication`: repeated layers"),
        ({"target_parameters": ["experts.up"]}, "`target_parameters`: factors of parameters outside"),
        ({"trainable_token_indices": [5]}, "`trainable_token_indices`: single trained rows"),
        ({"megatron_config": {"a": 1}}, "`megatron_config`: Megatron's"),
        ({"ensure_weight_tying": True}, "`ensure_weight_tying`: adapters shared by tied layers"),
        ({"use_bdlora": {"n": 1}}, "`use_bdlora`: block-diagonal"),
        ({"arrow_config": {"n": 1}}, "`arrow_config`: Arrow"),
        ({"kasa_config": {"n": 1}}, "`kasa_config`: KaSA"),
        ({"velora_config": {"n": 1}}, "`velora_config`: VeLoRA"),
        ({"monteclora_config": {"n": 1}}, "`monteclora_config`: MonteCLoRA"),
        (
            {"init_lora_weights": "pissa"},
            "`init_lora_weights` 'pissa': factors beside a base that the start has changed",
        ),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` 'loftq'"),
        ({"init_lora_weights": "a new one"}, "`init_lora_weights` 'a new one'"),
    ],
)
def test_wrong_configs(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(lj.AdapterError, match=message):
        load(kit.write_peft(tmp_path, **entries))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(tmp_path: Path, start: Any) -> None:
    load(kit.write_peft(tmp_path, init_lora_weights=start))


def test_configs_that_are_none(folder: Path) -> None:
    path = folder / kit.CONFIG
    path.write_text("[1]")
    with pytest.raises(lj.AdapterError, match="must be a JSON object, and is a list"):
        load(folder)
    for name in ("peft_type", "r", "lora_alpha"):
        path.write_text(json.dumps({key: value for key, value in kit.config().items() if key != name}))
        with pytest.raises(lj.AdapterError, match=f"has no `{name}`: it is no LoRA configuration of PEFT"):
            load(folder)
    path.write_text("{")
    with pytest.raises(FileError, match="is not JSON"):
        load(folder)
    path.write_text('{"x": "' + "x" * 5 * 2**20 + '"}')
    with pytest.raises(FileError, match="a JSON file of at most 4,194,304 is expected here"):
        load(folder)


def test_another_base(folder: Path) -> None:
    kit.write_peft(folder, base_model_name_or_path="someone/other-base")
    with pytest.raises(lj.AdapterError, match=r"names the base 'someone/other-base', and `base_name` is 'google/base'"):
        load(folder, base_name="google/base")
    load(folder, base_name="/models/other-base")
    load(folder)


def test_expressions_are_never_run(tmp_path: Path) -> None:
    """Each of these would take longer than the universe has, if it were."""
    endless = "((e|l|m|o|d|a|y|r|s|0|q|u|.)+)+!"
    started = time.monotonic()
    load(kit.write_peft(tmp_path, target_modules=endless))
    load(kit.write_peft(tmp_path, exclude_modules=endless, layers_pattern=endless, rank_pattern={endless: 2}))
    with pytest.raises(lj.AdapterError, match="is a regular expression"):
        load(kit.write_peft(tmp_path, alpha_pattern={endless: 2}))
    load(kit.write_peft(tmp_path, modules_to_save=[endless]))
    # And long lists cost no more than short ones.
    many = [f"module{number}" for number in range(50_000)]
    load(kit.write_peft(tmp_path, target_modules=[*many, "query", "value"], modules_to_save=many))
    load(kit.write_peft(tmp_path, alpha_pattern=dict.fromkeys(many[:10_000], 1)))
    assert time.monotonic() - started < 20
