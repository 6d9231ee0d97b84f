"""Freed memory stays with the process: a computation's temporary pages are cleared once, not at every call."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from lora_jax.host_memory import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
compute = jax.jit(lambda x: (jnp.sin(x @ x) @ x).sum())
x = jnp.ones((2000, 2000))  # temporary memory of 16 MB an array: some 8,000 pages a call
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for call in range(6):
    before = faults()
    compute(x).block_until_ready()
    print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is the GNU C library's")
def test_a_computation_reuses_the_memory_of_the_one_before() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    took, *faults = done.stdout.split()
    if took == "False":
        pytest.skip("this system's C library is not GNU's")
    assert int(faults[0]) > 4000
    assert min(map(int, faults[1:])) < 400
