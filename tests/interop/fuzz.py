"""Folders by chance: good ones, and good ones with damage, for every format that is read from elsewhere.

A case is a kind and a seed. Whatever a folder holds, it is read or refused: refused means a `FileError` or an
`AdapterError` that names the folder, soon. What is read is finite, has the base's shapes, and is what the kind's own
oracle makes of the folder; a folder without damage is read. `scripts/fuzz_interop.py` runs for as long as it is told
to; the tests run the first cases.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.files import FileError, read_safetensors
from lora_jax.interop import apply_delta, export_delta, export_peft, import_peft, read_peft_config
from lora_jax.paths import leaves_by_path

from . import kit

SECONDS = 20.0  # a case takes milliseconds; a stranger's expression that is run may take for ever
LONGEST = 5_000
GOOD = 24  # folders of each kind
LAYERS = 2

Rng = np.random.Generator


class Kind(NamedTuple):
    """A format.

    Attributes:
        write: makes a good folder.
        files: its JSON file and its tensors.
        read: gives parameters, or refuses.
        check: raises `AssertionError` if what was read isn't what the folder says.
    """

    write: Callable[[Path, Rng], Any]
    files: tuple[str, str]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], Any]


class Outcome(NamedTuple):
    """What became of a case: whether its folder was read, the message if it wasn't, what was damaged."""

    was_read: bool
    message: str
    damage: list[str]


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """Makes the case's folder, anew, and reads it.

    Raises:
        AssertionError: it was neither read as it should nor refused as it should; says the kind and the seed.
    """
    number = list(KINDS).index(kind)
    rng = np.random.default_rng([seed, number])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in _good(kind, int(rng.integers(GOOD))).items():
            (folder / name).write_bytes(data)
        files = [folder / choice(rng, KINDS[kind].files) for _ in range(choice(rng, (0, 1, 1, 2)))]
        damage = [damaged(file, rng) for file in files]
        try:
            return _read(kind, folder, damage)
        except Exception as error:  # whatever it is, it is a finding, to be told with what repeats it
            what = f"kind {kind!r}, seed {seed}, damage {damage}: {type(error).__name__}: {error}"
            raise AssertionError(what) from error


@functools.cache
def _good(kind: str, seed: int) -> dict[str, bytes]:
    """The files of a good folder: made once, since to make it takes longer than to read it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "good"
        KINDS[kind].write(folder, np.random.default_rng([seed, 1]))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _read(kind: str, folder: Path, damage: list[str]) -> Outcome:
    started, params, message = time.monotonic(), None, ""
    try:
        params = KINDS[kind].read(folder)
    except (FileError, lj.AdapterError) as error:
        message = str(error)
    taken = time.monotonic() - started
    assert taken < SECONDS, f"it took {taken:.0f} s"
    if params is None:
        assert damage, f"a good folder is refused: {message}"
        assert str(folder) in message, f"the message doesn't name the folder: {message}"
        assert len(message) < LONGEST, "the message is endless"
        return Outcome(False, message, damage)
    for leaf in jax.tree.leaves(params):  # the factors; what they merge to may be beyond float32
        assert np.isfinite(np.asarray(leaf)).all(), "not all of it is finite"
    KINDS[kind].check(folder, params)
    return Outcome(True, "", damage)


# --------------------------------------------------------------------------------------------------------------- damage


def choice(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def damaged(path: Path, rng: Rng) -> str:
    """Damages a file in one of the ways, and says in which."""
    ways: dict[str, Callable[[bytes, Rng], bytes]] = {"bytes": _bytes, "length": _length}
    ways |= {"entries": _header} if path.suffix == ".safetensors" else {"entries": _json}
    if path.suffix == ".safetensors":
        ways["values"] = _values
    way = choice(rng, [*ways, "entries", "entries"])
    data = path.read_bytes()
    try:
        path.write_bytes(ways[way](data, rng))
    except (ValueError, RecursionError, UnicodeDecodeError):  # damaged before, beyond parsing
        path.write_bytes(_bytes(data, rng))
    return f"{way} of {path.name}"


def _bytes(data: bytes, rng: Rng) -> bytes:
    """A few bytes of the beginning changed, taken out or doubled."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        end = min(len(mutated), 8 + int.from_bytes(mutated[:8], "little")) or 1
        place = int(rng.integers(0, end))
        match int(rng.integers(0, 3)):
            case 0:
                mutated[place : place + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                del mutated[place : place + int(rng.integers(1, 9))]
            case _:
                mutated[place:place] = mutated[place : place + int(rng.integers(1, 30))]
    return bytes(mutated)


def _length(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(0, len(data) + 1))] if rng.integers(2) else data + bytes(int(rng.integers(1, 99)))


def _values(data: bytes, rng: Rng) -> bytes:
    """Numbers that are none, after the header."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin + 4 > len(data):
        return data
    place = begin + 4 * int(rng.integers(0, (len(data) - begin) // 4))
    number = choice(rng, (math.nan, math.inf, -math.inf, 3e38, -0.0, 1e-45))
    return data[:place] + np.float32(number).tobytes() + data[place + 4 :]


def _header(data: bytes, rng: Rng) -> bytes:
    """Another header that is JSON, with the right length before it."""
    length = int.from_bytes(data[:8], "little")
    text = _json(data[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _json(data: bytes, rng: Rng) -> bytes:
    content = json.loads(data.decode())
    for _ in range(int(rng.integers(1, 3))):
        content = strange(content, rng)
    return json.dumps(content).encode()


def strange_value(rng: Rng) -> Any:
    return choice(
        rng,
        (
            *(None, True, False, -1, 0, 1, 2, 3, 2**31, 10**40, 0.5, 1e300, math.nan, math.inf),
            *("", "all", "none", "lora_only", "query", "lm_head", "F32", "BF16", "I8", "../x", "\0", "é", "x" * 300),
            *("(a+)+$", ".*", "^model", "all-linear", "gaussian", "pissa", "LORA", "float32"),
            *([], ["query"], [[]], [None], [0, 10**12], {}, {"a": {}}, {"query": 3}, {"(x+x+)+y": 4}),
        ),
    )


def strange(value: Any, rng: Rng) -> Any:
    """The same JSON with one thing in it changed, taken out, added, renamed or exchanged."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or rng.integers(8) == 0:
        return strange_value(rng) if rng.integers(4) or not isinstance(value, int) else value + int(rng.integers(-8, 9))
    key = choice(rng, children)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    match int(rng.integers(0, 7)):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[choice(rng, (f"{key}x", str(key)[1:], str(strange_value(rng)), str(key).replace("A", "B")))] = (
                copy.pop(key)
            )
        case 2:
            other = choice(rng, children)
            copy[key], copy[other] = copy[other], copy[key]
        case 3 if isinstance(copy, dict):
            copy[str(strange_value(rng))] = strange_value(rng)
        case 4:
            copy[key] = strange_value(rng)
        case _:
            copy[key] = strange(copy[key], rng)
    return copy


# --------------------------------------------------------------------------------------------------------- PEFT folders


class Setting(NamedTuple):
    """A base with two names for everything, and what of it may be adapted and trained."""

    base: dict[str, Any]
    names: Mapping[str, Any]
    uses: dict[str, lj.Use] | None
    targets: tuple[str, ...]
    whole: tuple[str, ...]


def _draw(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng([7, *shape]).normal(size=shape).astype(np.float32))


PLAIN = Setting(
    kit.base(), kit.NAMES, None, ("embed", "query", "value"), ("classifier", "norm", "query/bias", "value/bias")
)
TIED = Setting(
    {"words": {"embedding": _draw(7, 4)}, "up": {"kernel": _draw(4, 5)}, "down": {"kernel": _draw(5, 4)}},
    {"words/embedding": ("model.words", "lm_head"), "up/kernel": "model.up", "down/kernel": "model.down"},
    None,
    ("up", "words"),
    ("down",),
)
STACKED = Setting(
    {
        "layers": {
            "query": {"kernel": _draw(LAYERS, 4, 6), "bias": _draw(LAYERS, 6)},
            "up": {"kernel": _draw(LAYERS, 4, 5)},
        }
    },
    {
        f"layers/{number}/{path}": f"model.layers.{number}.{module}"
        for number in range(LAYERS)
        for path, module in (("query/kernel", "query"), ("query/bias", "query"), ("up/kernel", "up"))
    },
    {f"layers/{name}/kernel": lj.Use("dot_general", "sio") for name in ("query", "up")},
    ("query", "up"),
    ("query/bias",),
)


def trained(setting: Setting, rng: Rng) -> tuple[Any, lj.LoRA]:
    """A random adapter: some targets, ranks and scales of their own, some leaves in full."""
    targets = tuple(name for name in setting.targets if rng.integers(3)) or setting.targets[:1]
    kind = lj.LoRA if setting is TIED or rng.integers(4) else lj.DoRA  # a tied leaf has no one magnitude
    method = kind(
        rank=int(rng.integers(1, 4)),
        alpha=choice(rng, (1, 4, 2.5, 16)),
        targets=targets,
        also_train=tuple(name for name in setting.whole if rng.integers(2)),
        rank_overrides={name: int(rng.integers(1, 4)) for name in targets if rng.integers(4) == 0},
        alpha_overrides={name: choice(rng, (1, 3, 0.5)) for name in targets if rng.integers(4) == 0},
        scaling=choice(rng, ("standard", "rank_stabilized")),
        dropout=choice(rng, (0.0, 0.1)),
    )
    start = lj.attach(setting.base, method, key=jax.random.key(0), uses=setting.uses)
    mask = lj.trainable_mask(start, method)
    return jax.tree.map(
        lambda x, own: x + rng.normal(size=x.shape).astype(np.float32) if own else x, start, mask
    ), method


def peft(setting: Setting) -> Kind:
    def write(folder: Path, rng: Rng) -> None:
        params, method = trained(setting, rng)
        export_peft(folder, params, method, names=setting.names, dtype=choice(rng, (None, None, "float16", "bfloat16")))

    def read(folder: Path) -> Any:
        return import_peft(folder, setting.base, names=setting.names).params

    def check(folder: Path, params: Any) -> None:
        merged = lj.merge_params(params)
        assert_shapes(merged, setting.base)
        if setting is PLAIN and not read_peft_config(folder).get("use_dora"):
            _assert_peft_agrees(folder, merged)
        # Out and in again it is the same.
        params, method = import_peft(folder, setting.base, names=setting.names)
        again = folder.with_name("again")
        export_peft(again, params, method, names=setting.names, config=read_peft_config(folder))
        assert_equal(lj.merge_params(import_peft(again, setting.base, names=setting.names).params), merged)

    return Kind(write, (kit.CONFIG, kit.WEIGHTS), read, check)


def _assert_peft_agrees(folder: Path, merged: Any) -> None:
    try:
        theirs = kit.peft_result(folder, kit.state_dict(kit.base()))
    except Exception:  # what PEFT's own rules don't make a model of
        return
    ours = kit.state_dict(merged)
    for name in ours:
        if np.abs(theirs[name]).max() < 1e30:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4 * np.abs(theirs[name]).max())


def assert_shapes(params: Any, base: Any) -> None:
    found, expected = ({p: (x.shape, x.dtype) for p, x in leaves_by_path(tree).items()} for tree in (params, base))
    assert found == expected


def assert_equal(one: Any, other: Any) -> None:
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


# ------------------------------------------------------------------------------------------------------ our own formats


def write_delta(folder: Path, rng: Rng) -> None:
    base = kit.base()
    chosen = [path for path in leaves_by_path(base) if rng.integers(2)] or ["norm/bias"]
    tuned = jax.tree.map(lambda leaf: leaf, base)
    for path in chosen:
        module, name = path.split("/")
        tuned[module][name] = base[module][name] + 1
    export_delta(folder, tuned, base, names=kit.NAMES)


def check_delta(folder: Path, params: Any) -> None:
    assert_shapes(params, kit.base())
    tensors, there = read_safetensors(folder / "delta.safetensors"), kit.state_dict(params)
    assert tensors.keys() <= there.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(there[name], array)
    other = apply_delta(folder, kit.state_dict(kit.base()))
    for name, array in there.items():
        np.testing.assert_array_equal(other[name], array)


def write_adapter(folder: Path, rng: Rng) -> None:
    params, method = trained(PLAIN, rng)
    lj.save_adapter(folder, params, method)


def read_adapter(folder: Path) -> Any:
    return lj.load_adapter(folder, kit.base()).params


KINDS = {
    "peft": peft(PLAIN),
    "peft, tied": peft(TIED),
    "peft, stacked": peft(STACKED),
    "delta": Kind(
        write_delta,
        ("lora_jax_delta.json", "delta.safetensors"),
        lambda folder: apply_delta(folder, kit.base(), names=kit.NAMES),
        check_delta,
    ),
    "adapter": Kind(
        write_adapter,
        ("lora_jax_adapter.json", "adapter.safetensors"),
        read_adapter,
        lambda _, params: assert_shapes(lj.merge_params(params), kit.base()),
    ),
}
