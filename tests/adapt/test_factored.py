"""`adapt` keeps weights factored, with the merged function's values and gradients, however the function is written."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import lora_jax as lj
from lora_jax.weights import is_adapted

from . import framework_cases, plain_cases
from .kit import Case, assert_as_merged, attach_everywhere

CASES = plain_cases.CASES | framework_cases.CASES


@pytest.fixture(name="case", params=CASES)
def build_case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]()


@pytest.mark.usefixtures("every_strategy")
def test_values_and_gradients_are_the_merged_functions(case: Case) -> None:
    params = attach_everywhere(case.fn, case.params, *case.args)
    leaves = jax.tree.leaves(params, is_leaf=is_adapted)
    assert sum(map(is_adapted, leaves)) == len(case.labels)
    assert_as_merged(case.fn, params, *case.args, tolerance=case.tolerance)


def test_labels(case: Case) -> None:
    uses = lj.trace_weights(case.fn, case.params, *case.args)
    assert {path: use.labels for path, use in uses.items()} == case.labels, uses
    assert all(use.reason == "" for use in uses.values())


def test_explanation_has_every_weight_and_no_merge(case: Case) -> None:
    rows = lj.explain(case.fn, attach_everywhere(case.fn, case.params, *case.args), *case.args)
    assert {row.path for row in rows} == set(case.labels)
    assert rows.materialized == []
