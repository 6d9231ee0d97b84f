"""What doctests find in their namespace, beside what each imports for itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    import lora_jax as lj  # not before `tests/conftest.py` has installed the checks of annotations

    doctest_namespace.update(jax=jax, jnp=jnp, lj=lj, optax=optax)
