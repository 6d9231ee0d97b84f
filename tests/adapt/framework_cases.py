"""Layers of Flax NNX, Flax Linen and Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.paths import flatten_with_paths

from .kit import Case, normal

B, T, D, H, K = 2, 3, 8, 2, 4
IDS = jnp.array([[0, 3, 1], [5, 5, 2]])


def _x(*shape: int) -> jax.Array:
    return normal("x", *(shape or (B, T, D)))


def _drawn(shapes: Any) -> Any:
    """Values for a tree of shapes, weights small enough for deep stacks."""
    paths, leaves, treedef = flatten_with_paths(shapes)
    values = [normal(path, *leaf.shape) / D**0.5 for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, values)


# Flax NNX.


def _nnx(build: Callable[[nnx.Rngs], nnx.Module], x: jax.Array, call: Any = None, **labels: str) -> Case:
    """`build` makes the module; `call(module, x)` uses it. Labels are given by path with `__` for `/`."""
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "a case without random state is simpler"

    def fn(state: Any, x: jax.Array) -> Any:
        return (call or (lambda module, x: module(x)))(nnx.merge(graph, state, rest), x)

    return Case(fn, _drawn(state), (x,), {path.replace("__", "/"): each for path, each in labels.items()})


def nnx_linear() -> Case:
    return _nnx(lambda rngs: nnx.Linear(D, 6, rngs=rngs), _x(), kernel="io")


def nnx_linear_general() -> Case:
    build = lambda rngs: nnx.Sequential(  # noqa: E731
        nnx.LinearGeneral(D, (H, K), rngs=rngs), nnx.LinearGeneral((H, K), D, axis=(-2, -1), rngs=rngs)
    )
    return _nnx(build, _x(), layers__0__kernel="ioo", layers__1__kernel="iio")


def nnx_einsum() -> Case:
    return _nnx(lambda rngs: nnx.Einsum("btd,dnh->btnh", (D, H, K), (H, K), rngs=rngs), _x(), kernel="ioo")


def nnx_conv() -> Case:
    return _nnx(lambda rngs: nnx.Conv(D, 6, 3, rngs=rngs), _x(B, 5, D), kernel="iio")


def nnx_strided_conv() -> Case:
    build = lambda rngs: nnx.Conv(3, 6, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)), rngs=rngs)  # noqa: E731
    return _nnx(build, _x(B, 6, 7, 3), kernel="iiio")


def nnx_conv_transpose() -> Case:
    return _nnx(lambda rngs: nnx.ConvTranspose(D, 6, 3, strides=2, rngs=rngs), _x(B, 5, D), kernel="iio")


def nnx_conv_transpose_with_its_kernel_turned() -> Case:
    build = lambda rngs: nnx.ConvTranspose(D, 6, 3, strides=2, transpose_kernel=True, rngs=rngs)  # noqa: E731
    return _nnx(build, _x(B, 5, D), kernel="ioi")


def nnx_embed() -> Case:
    return _nnx(lambda rngs: nnx.Embed(7, D, rngs=rngs), IDS, embedding="io")


def nnx_tied_embed() -> Case:
    call = lambda module, ids: module.attend(jnp.tanh(module(ids)))  # noqa: E731
    return _nnx(lambda rngs: nnx.Embed(7, D, rngs=rngs), IDS, call, embedding="io")


def nnx_attention() -> Case:
    build = lambda rngs: nnx.MultiHeadAttention(H, D, qkv_features=H * K, decode=False, rngs=rngs)  # noqa: E731
    return _nnx(build, _x(), query__kernel="ioo", key__kernel="ioo", value__kernel="ioo", out__kernel="iio")


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, 6, rngs=rngs)
        self.down = nnx.Linear(6, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


def _nnx_stack(rngs: nnx.Rngs) -> NNXBlock:
    return nnx.split_rngs(splits=3)(nnx.vmap(NNXBlock, in_axes=0, out_axes=0))(rngs)


def nnx_scan() -> Case:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, block: NNXBlock) -> jax.Array:
        return block(x)

    return _nnx(_nnx_stack, _x(), lambda stack, x: forward(x, stack), up__kernel="sio", down__kernel="sio")


def nnx_scan_of_remat() -> Case:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def forward(x: jax.Array, block: NNXBlock) -> jax.Array:
        return block(x)

    return _nnx(_nnx_stack, _x(), lambda stack, x: forward(x, stack), up__kernel="sio", down__kernel="sio")


def nnx_remat_and_jit() -> Case:
    """Both return the module's weights as outputs that nobody reads."""
    remat, jit = nnx.remat(NNXBlock.__call__), nnx.jit(NNXBlock.__call__)
    return _nnx(NNXBlock, _x(), lambda block, x: jit(block, remat(block, x)), up__kernel="io", down__kernel="io")


def nnx_scan_applied_twice() -> Case:
    """The second pass uses the weights that the first returned, slice by slice."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def forward(x: jax.Array, block: NNXBlock) -> jax.Array:
        return block(x)

    call = lambda stack, x: forward(forward(x, stack), stack)  # noqa: E731
    return _nnx(_nnx_stack, _x(), call, up__kernel="sio", down__kernel="sio")


def nnx_cond() -> Case:
    """Both branches return the weights that they were given."""

    def call(block: NNXBlock, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: -block(x), block, x)
        return x

    return _nnx(NNXBlock, _x(), call, up__kernel="io", down__kernel="io")


# Flax Linen.


def _linen(module: nn.Module, x: jax.Array, method: Any = None, **labels: str) -> Case:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, method=method))["params"]

    def fn(params: Any, x: jax.Array) -> Any:
        return module.apply({"params": params}, x, method=method)

    return Case(fn, _drawn(shapes), (x,), {path.replace("__", "/"): each for path, each in labels.items()})


def linen_dense() -> Case:
    return _linen(nn.Dense(6), _x(), kernel="io")


def linen_dense_general() -> Case:
    module = nn.Sequential([nn.DenseGeneral((H, K)), nn.DenseGeneral(D, axis=(-2, -1))])
    return _linen(module, _x(), layers_0__kernel="ioo", layers_1__kernel="iio")


def linen_einsum() -> Case:
    return _linen(nn.Einsum((D, H, K), "btd,dnh->btnh"), _x(), kernel="ioo")


def linen_conv() -> Case:
    return _linen(nn.Conv(6, (3,)), _x(B, 5, D), kernel="iio")


def linen_strided_conv() -> Case:
    module = nn.Conv(6, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)), kernel_dilation=(1, 2))
    return _linen(module, _x(B, 6, 7, 3), kernel="iiio")


def linen_conv_transpose_with_its_kernel_turned() -> Case:
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), transpose_kernel=True)
    return _linen(module, _x(B, 4, 5, D), kernel="iioi")


def linen_tied_embed() -> Case:
    def tied(embed: nn.Embed, ids: jax.Array) -> jax.Array:
        return embed.attend(jnp.tanh(embed(ids)))

    return _linen(nn.Embed(7, D), IDS, tied, embedding="io")


def linen_attention() -> Case:
    module = nn.MultiHeadDotProductAttention(H, qkv_features=H * K)
    return _linen(module, _x(), query__kernel="ioo", key__kernel="ioo", value__kernel="ioo", out__kernel="iio")


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        hidden = nn.Dense(6, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(D, name="down")(jnp.tanh(hidden)), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(LinenBlock, prevent_cse=False)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="blocks")(x, None)[0]


def linen_scan_of_remat() -> Case:
    return _linen(LinenStack(), _x(), blocks__up__kernel="sio", blocks__down__kernel="sio")


# Equinox stores `(out, in)`.


def _equinox(build: Callable[[jax.Array], Any], call: Callable[[Any, jax.Array], Any], x: Any, **labels: str) -> Case:
    shapes = eqx.filter_eval_shape(build, jax.random.key(0))
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def fn(arrays: Any, x: jax.Array) -> Any:
        return call(eqx.combine(arrays, static), x)

    return Case(fn, _drawn(arrays), (x,), {path.replace("__", "/"): each for path, each in labels.items()})


def equinox_linear() -> Case:
    return _equinox(lambda key: eqx.nn.Linear(D, 6, key=key), lambda m, x: m(x), _x(D), weight="oi")


def equinox_mlp() -> Case:
    build = lambda key: eqx.nn.MLP(D, 3, 6, 2, key=key)  # noqa: E731
    labels = {f"layers__{i}__weight": "oi" for i in range(3)}
    return _equinox(build, lambda m, x: jax.vmap(m)(x), _x(T, D), **labels)


def equinox_attention() -> Case:
    build = lambda key: eqx.nn.MultiheadAttention(H, D, key=key)  # noqa: E731
    labels = {f"{name}_proj__weight": "oi" for name in ("query", "key", "value", "output")}
    return _equinox(build, lambda m, x: jax.vmap(lambda x: m(x, x, x))(x), _x(), **labels)


def equinox_embedding() -> Case:
    build = lambda key: eqx.nn.Embedding(7, D, key=key)  # noqa: E731
    return _equinox(build, lambda m, ids: jax.vmap(jax.vmap(m))(ids), IDS, weight="io")


def equinox_conv() -> Case:
    build = lambda key: eqx.nn.Conv1d(D, 6, 3, key=key)  # noqa: E731
    return _equinox(build, lambda m, x: jax.vmap(m)(x), _x(B, D, 5), weight="oii")


def equinox_conv_transpose() -> Case:
    build = lambda key: eqx.nn.ConvTranspose1d(D, 6, 3, stride=2, key=key)  # noqa: E731
    return _equinox(build, lambda m, x: jax.vmap(m)(x), _x(B, D, 5), weight="oii")


CASES = {
    name: build
    for name, build in list(globals().items())
    if callable(build) and getattr(build, "__annotations__", {}).get("return") == "Case" and not name.startswith("_")
}
