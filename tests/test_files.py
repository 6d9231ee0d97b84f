"""Files from elsewhere are claims: each false one is refused by name. Files written here are whole or not there."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import stat
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax.files import (
    FileError,
    TensorInfo,
    read_bytes,
    read_json,
    read_metadata,
    read_safetensors,
    read_safetensors_header,
    read_text,
    replacing,
    safe_join,
    sha256_file,
    with_checksum,
    without_checksum,
    write_json,
    write_safetensors,
    write_text,
)

TENSORS = {
    "double": np.arange(6.0).reshape(2, 3),
    "column_major": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i2"),
    "brain": np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16),
    "scalar": np.array(True),
    "empty": np.zeros((0, 4), np.int8),
}


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --------------------------------------------------------------------------------------------------------- round trip


def test_tensors_come_back_as_they_were(tmp_path: Path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "a": "ü"})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype.newbyteorder("<")
        np.testing.assert_array_equal(read[name], tensor, strict=False)
        assert read[name].shape == tensor.shape
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "a": "ü"}
    assert read_safetensors_header(tmp_path / "x.safetensors")["brain"] == TensorInfo(
        np.dtype(ml_dtypes.bfloat16), (3,)
    )


def test_the_reference_implementation_reads_and_writes_the_same(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    tensors = {name: tensor for name, tensor in TENSORS.items() if name not in ("big_endian", "column_major")}
    write_safetensors(path, tensors)
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name], tensor)
    safetensors.numpy.save_file(tensors, path, {"format": "np"})
    for name, tensor in read_safetensors(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert read_metadata(path) == {"format": "np"}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_the_bytes_are_those_of_the_reference_implementation(tmp_path: Path, dtype: Any):
    tensors = {name: np.arange(size).astype(dtype) for name, size in (("b", 3), ("ä", 8), ("a", 0), ("c.d", 5))}
    for metadata in ({"format": "pt"}, None):
        write_safetensors(tmp_path / "x", tensors, metadata)
        assert (tmp_path / "x").read_bytes() == safetensors.numpy.save(tensors, metadata)


def test_tensors_are_written_one_at_a_time(tmp_path: Path):
    """A tensor's values are asked for when those before it are on their way, and let go."""
    alive: list[weakref.ref[np.ndarray]] = []
    most, told = [], []

    class Late:
        shape, dtype = (1000,), np.dtype("float32")

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            values = np.full(1000, len(alive), np.float32)
            alive.append(weakref.ref(values))
            most.append(sum(reference() is not None for reference in alive))
            return values

    write_safetensors(tmp_path / "x", {f"{number:02}": Late() for number in range(20)}, written=told.append)
    assert max(most) <= 2  # the one before and the new one, as the name is handed on
    assert told == [4000] * 20
    read = read_safetensors(tmp_path / "x")
    assert [read[f"{number:02}"][0] for number in range(20)] == list(range(20))


def test_values_of_another_shape_than_was_said_are_refused(tmp_path: Path):
    class Other:
        shape, dtype = (2,), np.dtype("float32")

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            return np.zeros(3, np.float32)

    with pytest.raises(FileError, match=r"tensor 'a' has values of shape \(3,\), not \(2,\)"):
        write_safetensors(tmp_path / "x", {"a": Other()})
    assert not list(tmp_path.iterdir())


def test_files_of_an_earlier_write_go_with_it(tmp_path: Path):
    for name in ("old.part", "kept", "last"):
        (tmp_path / name).write_text("earlier")
    with replacing(tmp_path, ("new.part", "last"), obsolete=lambda name: name.endswith(".part")) as staging:
        for name in ("new.part", "last"):
            (staging / name).write_text("new")
        assert (tmp_path / "old.part").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "new.part": "new",
        "kept": "earlier",
        "last": "new",
    }


def test_jax_arrays_are_written(tmp_path: Path):
    write_safetensors(tmp_path / "x", {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.ones(3, jnp.bfloat16)})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "x", ["a"])["a"], [[0, 1], [2, 3]])


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    write_safetensors(tmp_path / "a", TENSORS, {"x": "1"})
    backwards = dict(reversed(TENSORS.items()))
    write_safetensors(tmp_path / "b", backwards, {"x": "1"})
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


def test_only_the_tensors_named_are_read(tmp_path: Path):
    write_safetensors(tmp_path / "x", TENSORS)
    assert list(read_safetensors(tmp_path / "x", ["scalar", "brain"])) == ["scalar", "brain"]
    with pytest.raises(FileError, match=r"holds no tensor named 'absent'; it holds .*'brain'"):
        read_safetensors(tmp_path / "x", ["absent"])


def test_no_tensors_is_a_file_too(tmp_path: Path):
    write_safetensors(tmp_path / "x", {})
    assert read_safetensors(tmp_path / "x") == {}
    assert read_metadata(tmp_path / "x") == {}


# ------------------------------------------------------------------------------------------------------ false claims


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2], 0, 8)}, b"1234"),
        ({"a": entry([2], 8, 0)}, bytes(8)),
        ({"a": entry([3], 0, 8)}, bytes(8)),
        ({"a": entry([10**15, 10**15], 0, 8)}, bytes(8)),
        ({"a": entry([0, 10**30], 0, 0)}, b""),
        ({"a": entry([0, 2**62], 0, 0)}, b""),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)),
        ({"a": entry([1], 0, 4), "b": entry([1], 6, 10)}, bytes(10)),
        ({"a": entry([1], 4, 8)}, bytes(8)),
        ({"a": entry([1], 0, 4)}, bytes(9)),
        ({"a": entry([1], 0, 4, "Q7")}, bytes(4)),
        ({"a": entry([4], 0, 4, "F8_E8M0")}, bytes(4)),
        ({"a": entry([-1], 0, 4)}, bytes(4)),
        ({"a": entry([1.5], 0, 4)}, bytes(4)),
        ({"a": entry([1], 0, "4")}, bytes(4)),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": 3}, b""),
        ({"__metadata__": {"a": 1}}, b""),
        ([1, 2], b""),
        (b"{not json", b""),
        (b'{"a": "\xff"}', b""),
        (b"[" * 100_000, b""),
    ],
)
def test_a_false_header_is_refused(tmp_path: Path, header: Any, data: bytes):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(
        FileError, match=r"bad.safetensors(: tensor 'a'.*| is no whole safetensors file \(.*\)\. Fetch)"
    ):
        read_safetensors(path)


def test_a_header_of_100_gigabytes_takes_no_memory(tmp_path: Path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 100 * 10**9) + b"{}")
    with pytest.raises(FileError, match=r"claims a header of 100,000,000,000 bytes, and has 10 in all"):
        read_safetensors_header(path)


def test_a_header_over_the_format_limit_is_refused(tmp_path: Path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(8 + 300_000_000)  # sparse
    with pytest.raises(FileError, match=r"is no whole safetensors file \(.*header too large"):
        read_safetensors_header(path)


def test_a_header_with_a_name_twice_is_refused(tmp_path: Path):
    """`safetensors` itself takes one of them without a word."""
    pair = ", ".join(f'"x": {json.dumps(entry(shape, 0, 16))}' for shape in ([4], [2, 2]))
    path = write_raw(tmp_path / "x", f"{{{pair}}}".encode(), bytes(16))
    with pytest.raises(FileError, match="has two entries named 'x' in its header"):
        read_safetensors_header(path)
    assert safetensors.numpy.load_file(path)["x"].size == 4


def test_every_truncation_is_refused(tmp_path: Path):
    write_safetensors(tmp_path / "x", {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float32)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(FileError, match="cut"):
            read_safetensors(tmp_path / "cut")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "a.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    (tmp_path / "b.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(FileError, match=r"is a pickle .*safetensors.*save_pretrained"):
            read_safetensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path):
    header = json.dumps({"a": entry([1], 0, 4)}).encode()
    write_raw(tmp_path / "x", header + b" " * (0x0280 - len(header)), bytes(4))
    assert read_safetensors(tmp_path / "x")["a"] == 0


def test_other_kinds_of_files_are_named(tmp_path: Path):
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(FileError, match=r"Git LFS pointer.*git lfs pull"):
        read_safetensors(tmp_path / "lfs")
    with pytest.raises(FileError, match=r"absent doesn't exist"):
        read_safetensors(tmp_path / "absent")
    with pytest.raises(FileError, match=r"is a folder"):
        read_safetensors(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FileError, match=r"and has 0 in all"):
        read_safetensors(tmp_path / "empty")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.ones(2, np.complex128)}, {}, r"tensor 'a' has dtype complex128, which safetensors can't hold"),
        ({"a": np.array(["x"])}, {}, r"tensor 'a' has dtype <U1"),
        ({"a": jax.random.key(0)}, {}, r"tensor 'a' has dtype key<"),
        ({"__metadata__": np.ones(2)}, {}, r"`__metadata__` is no tensor name"),
        ({}, {"a": 1}, r"`metadata` must map strings to strings, not \{'a': 1\}"),
    ],
)
def test_what_the_format_lacks_is_not_written(tmp_path: Path, tensors: Any, metadata: Any, message: str):
    with pytest.raises(FileError, match=message):
        write_safetensors(tmp_path / "x", tensors, metadata)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- atomic writing


WRITERS: list[Callable[[Path], None]] = [
    lambda path: write_safetensors(path, {"a": np.ones(1000)}),
    lambda path: write_json(path, {"new": 1}),
    lambda path: write_text(path, "new"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"file needs [\d,]+ bytes, and the disk \(or the quota\) is full. Nothing was changed"),
        (errno.EIO, r"file can't be written: .*Nothing was changed"),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_earlier_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], code: int, message: str, step: str
):
    path = tmp_path / "file"
    path.write_text("earlier")

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileError, match=message):
        write(path)
    monkeypatch.undo()
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_the_earlier_file_whole(tmp_path: Path):
    class Interrupted:
        shape, dtype = (2,), np.dtype("float32")

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise KeyboardInterrupt

    write_safetensors(tmp_path / "file", {"a": np.ones(2)})
    before = sha256_file(tmp_path / "file")
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "file", {"a": Interrupted()})
    assert sha256_file(tmp_path / "file") == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = builtins.open
    monkeypatch.setattr(Path, "open", lambda _, mode="r": opened("/dev/full", mode.replace("x", "w")))
    with pytest.raises(FileError, match=r"x needs 1,000,000 bytes, and the disk"):
        write_text(tmp_path / "x", "a" * 1_000_000)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileError, match=r"the folder .*absent doesn't exist. Make it first"):
        write_text(tmp_path / "absent" / "x", "a")


def test_files_get_the_ordinary_mode(tmp_path: Path):
    write_text(tmp_path / "x", "a")
    (tmp_path / "y").write_text("a")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)


# ------------------------------------------------------------------------------------------------------ JSON and names


def test_json_comes_back(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": [1, 2.5, None], "a": "ü"})
    assert read_json(tmp_path / "x.json") == {"b": [1, 2.5, None], "a": "ü"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the file has two entries named 'c', and one of each name is expected"),
        (b"{", r"the file is not JSON \(.*line 1, column 2\)"),
        (b"\xff\xfe", r"the file is not UTF-8 \(byte 0\)"),
        (b'"' + b"a" * 200 + b'"', r"has 202 bytes, and a JSON file of at most 100 is expected"),
        (b"", r"the file is not JSON"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_json(tmp_path / "x.json", max_bytes=100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_lacks_is_not_written(tmp_path: Path, value: Any):
    with pytest.raises(FileError, match=r"x.json: this can't be written as JSON"):
        write_json(tmp_path / "x.json", {"a": value})


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\\b", "..\\x", "C:/x", "C:x", "\0", "a\0b", "//host/x"],
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(FileError, match=r"The name .* would leave .*: a name inside the folder is expected"):
        safe_join(tmp_path, name)


def test_a_link_that_leaves_its_folder_is_refused(tmp_path: Path):
    folder, blobs = tmp_path / "cache" / "folder", tmp_path / "cache" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("")
    (folder / "x").symlink_to("../blobs/x")
    (folder / "out").symlink_to("/")
    for name in ("x", "out/etc/passwd"):
        with pytest.raises(FileError, match=r"is a link that leaves .*folder"):
            safe_join(folder, name)
    assert safe_join(folder, "x", links_within=tmp_path / "cache").read_text() == ""
    with pytest.raises(FileError, match=r"is a link that leaves"):
        safe_join(folder, "out/etc/passwd", links_within=tmp_path / "cache")


def test_a_name_inside_the_folder_is_joined(tmp_path: Path):
    assert safe_join(tmp_path, "a/b..c/d.safetensors") == tmp_path / "a" / "b..c" / "d.safetensors"


@pytest.mark.parametrize(
    "content",
    [{}, {"a": 1}, {"a": [1.0, 1e-300, None, {"ü": "\u2028"}], "b": True}, {"checksum": "stale", "a": 10**30}],
)
def test_a_checksum_is_of_all_else(tmp_path: Path, content: dict[str, Any]):
    plain = {name: value for name, value in content.items() if name != "checksum"}
    write_json(tmp_path / "x", with_checksum(content))
    read = read_json(tmp_path / "x")
    assert without_checksum(read, "x") == plain
    assert without_checksum(dict(reversed(read.items())), "x") == plain  # the order is nothing
    assert without_checksum(plain, "x") == plain  # as earlier versions wrote it
    for other in (plain | {"more": 0}, {**plain, "a": "1"}, {"b": 1}):
        with pytest.raises(
            FileError, match=r"^x isn't what its `checksum` was written for: .* remove the entry `checksum`"
        ):
            without_checksum({**other, "checksum": read["checksum"]}, "x")
    with pytest.raises(FileError, match="isn't what its `checksum`"):
        without_checksum({**plain, "checksum": None}, "x")


def test_sha256(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------------------------------------------- what is no file


def _instead(path: Path, what: str) -> None:
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a circle":
        path.symlink_to(path.name)
    else:
        path.symlink_to(what)


READERS: dict[str, Callable[[Path], Any]] = {
    "read_json": read_json,
    "read_text": lambda path: read_text(path, max_bytes=100),
    "read_bytes": lambda path: read_bytes(path, max_bytes=100),
    "read_safetensors": read_safetensors,
    "read_safetensors_header": read_safetensors_header,
    "read_metadata": read_metadata,
    "sha256_file": sha256_file,
}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a pipe", r"x\.json is a pipe, and a regular file is expected here"),
        ("/dev/zero", r"x\.json is a device, and a regular file is expected here"),
        ("/dev/null", r"x\.json is a device, and a regular file is expected here"),
        ("a folder", r"x\.json is a folder, and a file is expected here"),
        ("a circle", r"x\.json can't be opened: Too many levels of symbolic links"),
        ("gone", r"x\.json doesn't exist"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, reader: str, what: str, message: str):
    _instead(tmp_path / "x.json", what)
    with pytest.raises(FileError, match=message):
        READERS[reader](tmp_path / "x.json")


def test_a_link_to_itself_is_no_name_inside(tmp_path: Path):
    _instead(tmp_path / "x", "a circle")
    with pytest.raises(FileError, match=r"x is a link that leads to itself|can't be opened"):
        read_bytes(safe_join(tmp_path, "x"), max_bytes=1)


def test_a_file_is_read_at_its_size_and_not_its_limits(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert read_bytes(tmp_path / "x", max_bytes=2**62) == b"abc"
    with pytest.raises(FileError, match=r"x has 3 bytes, and a file of at most 2 is expected here"):
        read_bytes(tmp_path / "x", max_bytes=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"nested too deeply"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, r"nested too deeply"),
        (b"[" * 200 + b"]" * 200, r"nested too deeply"),  # parsed, and then too deep for `repr`
        (b"[" + b"7" * 5_000 + b"]", r"Exceeds the limit"),
        (b"[" + b"[]," * 4_000_000 + b"[]]", r"JSON of some 8,000,00\d values, and at most 4,000,000 are expected"),
    ],
)
def test_json_that_would_take_for_ever_is_refused(tmp_path: Path, content: bytes, message: str):
    started = time.monotonic()
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FileError, match=rf"x\.json: the file is .*{message}"):
        read_json(tmp_path / "x.json")
    assert time.monotonic() - started < 10


def test_half_a_character_is_refused_and_a_pair_is_not(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600"}
    for content in ('{"a": "\\ud83d"}', '{"\\uDE00": 1}', '[["\\ude00\\ud83d"]]'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(FileError, match=r"x\.json: the file has half a character"):
            read_json(tmp_path / "x.json")


def test_a_header_of_millions_of_values_is_refused(tmp_path: Path):
    path = write_raw(tmp_path / "x.safetensors", b'{"a":[' + b"[]," * 4_000_000 + b"[]]}")
    with pytest.raises(FileError, match=r"x\.safetensors: the header is JSON of some 8,000,0\d\d values"):
        read_safetensors(path)


def test_many_tensors_take_time_in_proportion(tmp_path: Path):
    """Twenty thousand, which took minutes where each name was looked for among all."""
    tensors = {f"layers/{i}/kernel": np.float32(i) for i in range(20_000)}
    started = time.monotonic()
    write_safetensors(tmp_path / "x", tensors)
    assert len(read_safetensors(tmp_path / "x", list(tensors))) == len(tensors)
    with pytest.raises(FileError, match="holds no tensor named 'other'"):
        read_safetensors(tmp_path / "x", ["other"])
    assert time.monotonic() - started < 60


def test_a_message_stays_readable_whatever_it_quotes(tmp_path: Path):
    write_safetensors(tmp_path / "x", {"n" * 100_000 + "end": np.zeros(1)})
    with pytest.raises(FileError, match=r"holds no tensor named 'm+ … m+'; it holds 'n+ … n+end'") as caught:
        read_safetensors(tmp_path / "x", ["m" * 100_000])
    assert len(str(caught.value)) < 1_000
    assert len(str(FileError("x" * 100_000))) < 5_000


def test_half_a_character_is_not_written(tmp_path: Path):
    with pytest.raises(FileError, match=r"x\.txt: this can't be written as UTF-8"):
        write_text(tmp_path / "x.txt", "\ud800")
    assert not list(tmp_path.iterdir())
