"""Fixtures of the tests of `adapt`."""

from __future__ import annotations

import pytest

from lora_jax.matmul import STRATEGIES
from lora_jax.methods import low_rank


@pytest.fixture(params=STRATEGIES)
def every_strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each strategy in turn for every matmul that can follow it, whatever its size."""
    monkeypatch.setattr(low_rank, "choose_strategy", lambda *sizes, **about: request.param)
    return request.param
