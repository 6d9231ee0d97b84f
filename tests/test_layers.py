from __future__ import annotations

import pytest

from lora_jax.depth import layer_places, layer_sizes


@pytest.mark.parametrize(
    ("paths", "sizes"),
    [
        (["encoder/layers/0/up/w", "encoder/layers/1/up/w", "head/w"], {"encoder/layers": 2}),
        (["layers/0/w"], {"layers": 1}),
        (["Block_0/Dense_0/kernel", "Block_0/Dense_1/kernel", "Block_1/Dense_0/kernel", "Dense_0/w"], {"Block": 2}),
        (["model/h_0/w", "model/h_1/w", "model/h_10/w"], {}),  # one is missing
        (["Dense_0/kernel", "LayerNorm_0/scale"], {}),  # each alone: no stack
        (["Encoder_0/Block_0/w", "Encoder_0/Block_1/w"], {"Encoder_0/Block": 2}),
        (["encoder/0/w", "encoder/1/w", "decoder/0/w"], {"encoder": 2, "decoder": 1}),
        (["layers/up/kernel", "layers/0"], {}),  # a stack along an axis, a list of leaves
    ],
)
def test_which_stacks_a_tree_has(paths: list[str], sizes: dict[str, int]) -> None:
    assert layer_sizes(layer_places(paths)) == sizes


def test_the_outermost_stack_counts() -> None:
    places = layer_places(["layers/1/experts/0/w", "layers/0/experts/0/w", "layers/0/experts/1/w"])
    assert [tuple(place) for place in places.values()] == [
        ("layers", 1, "experts/0/w"),
        ("layers", 0, "experts/0/w"),
        ("layers", 0, "experts/1/w"),
    ]
