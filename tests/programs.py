"""Compiled programs that are kept from one run of the tests to the next.

A program is found by what it is compiled from: its HLO, the flags and the versions of XLA. Code that has changed gives
another program, and is compiled. `scripts/test` names a folder for them; without one, nothing is kept.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax

FOLDER = "LORA_JAX_TEST_PROGRAMS"


def keep_in(folder: str) -> None:
    """Has this process look for its programs in `folder`, and leave there what it compiles."""
    if not _write_whole():
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _write_whole() -> bool:
    """JAX writes in place, and the process beside would read half a program: a whole file takes its place here."""
    try:
        from jax._src.lru_cache import LRUCache
    except ImportError:  # private: a newer JAX may have it elsewhere
        return False

    def put(self: LRUCache, key: str, value: bytes) -> None:
        path = Path(str(self.path)) / f"{key}-cache"
        if not path.exists():
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(value)
            os.replace(name, path)

    LRUCache.put = put
    return True
