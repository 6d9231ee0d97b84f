"""Two CPU devices, exact matmuls and quick compilation, for every test. Set before JAX starts."""

from __future__ import annotations

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike.
quick = " --xla_backend_optimization_level=0"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # newer ones refuse to start with it
    quick += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + quick

import jax

jax.config.update("jax_num_cpu_devices", 2)
# The laws compare two ways to compute one thing: neither may round its operands first.
jax.config.update("jax_default_matmul_precision", "highest")
