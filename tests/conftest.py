"""Two CPU devices, exact matmuls and quick compilation, for every test; and the two tiers of the tests."""

from __future__ import annotations

import os
from collections import Counter
from importlib import metadata
from typing import Any

# Set before JAX starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike.
# A module split into parts costs more than its parts save when it is tiny. XLA's fusion emitters take half of the time;
# jaxlib 0.11 and newer refuse to start with the flag that leaves them out.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib").startswith("0.10.") else []),
    ]
)

import jax
import pytest

from . import programs, tiers

jax.config.update("jax_num_cpu_devices", 2)
# The laws compare two ways to compute one thing: neither may round its operands first.
jax.config.update("jax_default_matmul_precision", "highest")

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
