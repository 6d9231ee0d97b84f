"""The tiny base, data and finished run of the training tests."""

from __future__ import annotations

from tests.training.conftest import (  # noqa: F401
    _compile_each_program_once,
    base,
    data,
    finished,
    options,
)
