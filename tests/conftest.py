"""Two CPU devices, exact matmuls and quick compilation, for every test. Set before JAX starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike.
# XLA's fusion emitters take half of the time; jaxlib 0.11 and newer refuse to start with the flag that leaves them out.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib").startswith("0.10.") else []),
    ]
)

import jax
import jaxtyping
import optax
import pytest
from flax.linen import normalization as linen_normalization
from flax.nnx.nn import dtypes as nnx_dtypes
from flax.nnx.nn import normalization as nnx_normalization

jax.config.update("jax_num_cpu_devices", 2)
# The laws compare two ways to compute one thing: neither may round its operands first.
jax.config.update("jax_default_matmul_precision", "highest")
# Nothing may widen or broadcast by accident: users' own code may run with both.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules whose annotations the tests check.
TYPED = (
    "adapt", "attach", "depth", "draws", "dropout", "masks", "masters", "matmul", "merging", "optimizer", "paths",
    "selection", "state",
)  # fmt: skip


def _leniently(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def lenient(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return lenient


# Optax raises floats to an integer count and multiplies gradients by a boolean; Flax computes a batch's statistics in
# the wider of two dtypes, and asks by promotion what dtype a layer of two computes in.
for _owner, _name in (
    (optax.tree, "bias_correction"),
    (optax.tree_utils, "tree_bias_correction"),
    (optax.MultiSteps, "update"),
    (linen_normalization, "_compute_stats"),
    (nnx_normalization, "_compute_stats"),
    (nnx_dtypes, "canonicalize_dtype"),
):
    setattr(_owner, _name, _leniently(getattr(_owner, _name)))

# Annotations of the core hold at run time. For users they cost nothing: only the tests check them.
jaxtyping.install_import_hook([f"lora_jax.{name}" for name in TYPED], "beartype.beartype")


@pytest.fixture(autouse=True)
def _unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without the checks of annotations where a test is about the library's own message for a wrong type."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("wrong_types") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process works on one at the end, alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
