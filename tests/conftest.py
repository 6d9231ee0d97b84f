"""Two CPU devices, exact matmuls and quick compilation, for every test; and the two tiers of the tests."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

# Set before JAX starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike. On the CPU
# alone: with JAX_PLATFORMS=cuda,cpu the tests run on a GPU, as its compiler is.
# A module split into parts costs more than its parts save when it is tiny. XLA's fusion emitters take half of the time;
# jaxlib 0.11 and newer refuse to start with the flag that leaves them out.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        *(["--xla_backend_optimization_level=0"] if os.environ["JAX_PLATFORMS"] == "cpu" else []),
        "--xla_cpu_parallel_codegen_split_count=1",
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

from . import programs, tiers

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


# Optax raises floats to an integer count and multiplies gradients by a boolean; Flax computes statistics, and
# normalizes, in the wider of two dtypes, and asks by promotion what dtype a layer of two computes in.
for _owner, _name in (
    (optax.tree, "bias_correction"),
    (optax.tree_utils, "tree_bias_correction"),
    (optax.MultiSteps, "update"),
    (linen_normalization, "_compute_stats"),
    (linen_normalization, "_normalize"),
    (nnx_normalization, "_compute_stats"),
    (nnx_normalization, "_normalize"),
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


if os.environ.get(programs.FOLDER):
    programs.keep_in(os.environ[programs.FOLDER])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the quick tier: see tests/tiers.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what isn't of the tier. Costly files come first, so that no process works on one alone at the end."""
    if config.getoption("--quick"):
        left_out = tiers.left_out(items)
        items[:] = [item for item in items if item.nodeid not in left_out]
        config.stash[_LEFT_OUT] = Counter(left_out.values())
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: tiers.order(item, slow))


# What was left out, told at the end: by the process that collected, or by the workers to the one that prints.

_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of a worker of pytest-xdist
    if output is not None:
        output["left_out"] = dict(session.config.stash.get(_LEFT_OUT, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    config, output = getattr(node, "config"), getattr(node, "workeroutput", {})  # noqa: B009
    config.stash[_LEFT_OUT] = Counter(output.get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in sorted(config.stash.get(_LEFT_OUT, Counter()).items()):
        terminalreporter.write_line(f"left out by --quick: {count:,} {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    return tiers.scheduler(config, log)
