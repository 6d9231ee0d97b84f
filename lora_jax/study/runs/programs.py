"""Shares compiled programs between runs, by JAX's compilation cache in the comparison's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def shared_programs(folder: Path) -> Iterator[None]:
    """Caches compiled programs in `folder` for the block, unless the user has configured another cache.

    A training step doesn't depend on the learning rate or the seed, so a candidate's runs share one program per batch
    shape, also with a later process that resumes.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {**_OPTIONS, "jax_compilation_cache_dir": str(folder)}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks for its cache only once, at the first compilation
    try:
        yield
    finally:
        for name, value in {**before, "jax_compilation_cache_dir": None}.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
