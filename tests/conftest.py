"""Two CPU devices, exact matmuls and quick compilation, for every test. Set before JAX starts."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute. For processes that tests start, too: all round alike.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 2)
# The laws compare two ways to compute one thing: neither may round its operands first.
jax.config.update("jax_default_matmul_precision", "highest")
