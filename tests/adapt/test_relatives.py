"""LoRA's relatives where weights are used in other ways than the laws' models use them."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import lora_jax as lj
from tests.models_table import moved

from . import plain_cases
from .kit import TOLERANCE, Case, assert_close, value_and_gradients

METHODS: dict[str, Any] = {
    "dora": lambda targets: lj.DoRA(rank=2, alpha=3, targets=targets),
    "ia3": lambda targets: lj.IA3(targets=targets, feedforward=()),
    "vera": lambda targets: lj.VeRA(rank=9, targets=targets),
}
CASES = (
    "head_major_einsums",
    "ragged_experts",
    "every_token_to_every_expert",
    "tied_embedding",
    "embedding_outside_its_table",
    "embedding_along_the_last_axis",
    "scan_of_scans",
    "fused_qkv_split",
    "scalar_multiples",
    "convolution_in_two_dimensions",
    "transposed_convolution_with_its_kernel_turned",
    "reversed_axes",
    "tiles",
    "unstacked_layers",
    "gradient_inside",
)


def attach_everywhere(method: Any, fn: Any, params: Any, *args: Any) -> Any:
    uses = lj.trace_weights(fn, params, *args)
    chosen = method(lambda path, _: path in uses)
    tree = lj.attach(params, chosen, key=jax.random.key(0), uses=uses)
    return moved(tree, lj.trainable_mask(tree, chosen), seed=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_merged_functions(name: str, method: str) -> None:
    case: Case = getattr(plain_cases, name)()
    params = attach_everywhere(METHODS[method], case.fn, case.params, *case.args)
    adapted = value_and_gradients(lj.adapt(case.fn, on_materialize="error"))
    merged = value_and_gradients(lambda params, *args: case.fn(lj.merge_params(params), *args))
    both = jax.jit(lambda params: (adapted(params, *case.args), merged(params, *case.args)))(params)
    for actual, expected in zip(*both, strict=True):
        assert_close(actual, expected, max(case.tolerance, 2 * TOLERANCE))
