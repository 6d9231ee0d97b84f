"""Fixtures of the tests of `adapt`."""

from __future__ import annotations

import pytest

from lora_jax.adapt import transform
from lora_jax.matmul import STRATEGIES


@pytest.fixture(params=STRATEGIES)
def every_strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each strategy in turn for every matmul that can follow it, whatever its size.

    As `adapt(..., matmul=...)` does, with which a matmul's program is another one: a `choose_strategy` put in the
    place of ours would not be asked again for shapes that have been traced.
    """
    new_walker = transform.new_walker
    monkeypatch.setattr(
        transform, "new_walker", lambda *args, **about: new_walker(*args, **{**about, "matmul": request.param})
    )
    return request.param
