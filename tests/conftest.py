"""Two CPU devices, exact matmuls and quick compilation, for every test. Set before JAX starts."""

from __future__ import annotations

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike. On the CPU alone:
# with JAX_PLATFORMS=cuda,cpu the tests run on a GPU, as its compiler is.
# XLA's fusion emitters take half of the time; jaxlib 0.11 and newer refuse to start with the flag that leaves them out.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        *(["--xla_backend_optimization_level=0"] if os.environ["JAX_PLATFORMS"] == "cpu" else []),
        *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib").startswith("0.10.") else []),
    ]
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
# The laws compare two ways to compute one thing: neither may round its operands first.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process works on one at the end, alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
