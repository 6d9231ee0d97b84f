"""A tiny base, a task that a tiny model learns, and one finished run for all who only look at it."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.training import TrainConfig, train
from tests.tiny_bert import write_tiny_bert

GOOD, BAD = ("good", "great", "love", "thanks"), ("bad", "poor", "hate", "broken")
CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
FILLER = ("the", "film", "was", "very", "plot", "and actor", "this order", "a meeting")


def write_rows(path: Path, count: int, *, seed: int) -> str:
    rng = random.Random(seed)
    lines = ["text\tlabel\tscore"]
    for i in range(count):
        words = rng.choices((BAD, GOOD)[i % 2], k=rng.randint(2, 6))
        text = " ".join([*rng.sample(FILLER, rng.randint(0, 1)), *words])
        lines.append(f"{text}\t{'pos' if i % 2 else 'neg'}\t{i % 2 + 0.5}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing is found or left in the user's cache."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="package", autouse=True)
def _compile_each_program_once(tmp_path_factory):
    """Runs of equal shapes share their compiled programs: compiling is most of a test's time.

    Of this folder alone: JAX has crashed while it wrote another test's program.
    """
    before = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in {**CACHE, "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks for its cache once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    return str(write_tiny_bert(folder, layers=1, hidden=16, heads=2, positions=32))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 60, "dev": 16, "test": 12}
    return {split: write_rows(folder / f"{split}.tsv", n, seed=i) for i, (split, n) in enumerate(sizes.items())}


@pytest.fixture(scope="session")
def options(base, data) -> dict:
    """Of a run with one shape: most of a test's time is compiling."""
    return {
        **data,
        "base": base,
        "epochs": 5,  # of 8 steps
        "batch_size": 8,
        "lr": 3e-2,
        "dropout": 0.02,
        "buckets": 1,
        "log_every": 5,
    }


@pytest.fixture(scope="session")
def finished(options, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    return train(TrainConfig(**options, output=str(output)))
