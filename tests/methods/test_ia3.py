from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

KEY = jax.random.key(0)


def random(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def layer() -> Any:
    def linear(inputs: int, outputs: int) -> Any:
        return {"kernel": random(inputs, outputs), "bias": random(outputs, seed=1)}

    attention = {name: linear(4, 4) for name in ("query", "key", "value", "output")}
    return {"attention": attention, "mlp": {"up": linear(4, 6), "down": linear(6, 4)}}


def test_the_preset_is_the_paper_s() -> None:
    """Keys and values at their outputs, the MLP's inner activations at the input of the weight that takes them."""
    tree = lj.attach(layer(), lj.IA3(), key=KEY)
    found = {path: leaf for path, leaf in lj.paths.leaves_by_path(tree).items() if isinstance(leaf, lj.IA3Weight)}
    assert list(found) == ["attention/key/kernel", "attention/value/kernel", "mlp/down/kernel"]
    scales = [(leaf.output_scale, leaf.input_scale) for leaf in found.values()]
    assert [[scale if scale is None else scale.tolist() for scale in pair] for pair in scales] == [
        [[1] * 4, None],
        [[1] * 4, None],
        [None, [1] * 6],
    ]
    count = lj.count_params(tree, lj.label_params(tree, lj.IA3()))
    assert count.trainable == count.per_label["ia3"].params == 4 + 4 + 6


def test_outputs_and_inputs_are_rescaled() -> None:
    weight, x, scales = random(6, 4), random(5, 6), {"output": random(4), "input": random(6)}
    apply = lj.adapt(lambda params, x: x @ params["w"], on_materialize="error")
    outputs = {"w": lj.IA3Weight(weight, output_scale=scales["output"], axes="io")}
    inputs = {"w": lj.IA3Weight(weight, input_scale=scales["input"], axes="io")}
    np.testing.assert_allclose(apply(outputs, x), (x @ weight) * scales["output"][None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(inputs, x), (x * scales["input"][None]) @ weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["w"].merge(), weight * scales["output"][None])
    np.testing.assert_array_equal(inputs["w"].merge(), weight * scales["input"][:, None])


@pytest.mark.parametrize(
    ("shape", "axes", "outputs", "inputs"),
    [
        ((6, 2, 3), "ioo", (2, 3), (6,)),
        ((2, 3, 6), "iio", (6,), (2, 3)),
        ((4, 6), "oi", (4,), (6,)),
        ((5, 6, 4), "sio", (5, 4), (5, 6)),
        ((6, 5, 4), "iso", (5, 4), (5, 6)),
    ],
)
def test_shapes(shape: Any, axes: str, outputs: Any, inputs: Any) -> None:
    uses = {"w": lj.Use("dot_general", axes)}
    for feedforward, wanted in (((), outputs), (("w",), inputs)):
        tree = lj.attach({"w": random(*shape)}, lj.IA3(targets=("w",), feedforward=feedforward), key=KEY, uses=uses)
        (scale,) = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim < len(shape) or leaf.shape != shape]
        assert scale.shape == wanted
        np.testing.assert_array_equal(lj.merge_params(tree)["w"], random(*shape))


def test_it_comes_back_from_a_file(tmp_path: Any) -> None:
    method = lj.IA3()
    tree = lj.attach(layer(), method, key=KEY)
    loaded = lj.load_adapter(lj.save_adapter(tmp_path, tree, method), layer())
    assert loaded.method == lj.IA3(
        targets=("/attention/key/kernel", "/attention/value/kernel", "/mlp/down/kernel"),
        feedforward=("/mlp/down/kernel",),
    )
    assert jax.tree.structure(loaded.params) == jax.tree.structure(tree)


def test_a_node_has_one_scale() -> None:
    node = lj.IA3Weight(random(6, 4), axes="io")
    message = "it must have exactly one of `output_scale` and `input_scale`"
    assert node.misfit({}) == node.misfit({"output_scale": (4,), "input_scale": (6,)}) == message
    assert node.misfit({"output_scale": (4,)}) is None
    assert "`input_scale` has the shape (4,), expected (6,)" in str(node.misfit({"input_scale": (4,)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("key",)}, "`feedforward` is missing: name the targets whose input is rescaled"),
        ({"feedforward": "mlp/down"}, "`feedforward` must be a sequence of names, got 'mlp/down'"),
        ({"feedforward": (1,)}, r"`feedforward` must be .* got \(1,\)"),
        ({"targets": ()}, "`targets` is empty"),
    ],
)
def test_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.IA3(**settings)


def test_names_that_match_nothing() -> None:
    with pytest.raises(lj.SelectionError, match="`feedforward` entry 'up' matches none of the targets: attention/key"):
        lj.attach(layer(), lj.IA3(targets=("key",), feedforward=("up",)), key=KEY)
    with pytest.raises(
        lj.SelectionError, match="this tree has none of them: name the modules, or say which they are by"
    ):
        lj.attach({"w": random(3, 4)}, lj.IA3(), key=KEY)
