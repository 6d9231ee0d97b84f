"""The one table of models that the laws are held against.

A model is a pure function `apply(params, x)` with its base parameters, however it was written. Every leaf is random and
far from zero, so that a forgotten term shows. A new row here puts a model, or a new way to write one, under every law.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lj
from lora_jax.methods.weight_method import WeightMethod
from lora_jax.paths import flatten_with_paths

from .tiny_bert import write_tiny_bert

WORDS, TIME, BATCH, CLASSES = 11, 5, 3, 4
WIDTH, HEADS, HIDDEN = 8, 2, 12
TOKENS = np.random.default_rng(9).integers(0, WORDS, (BATCH, TIME)).astype(np.int32)
VECTORS = np.random.default_rng(8).normal(size=(BATCH, TIME, WIDTH)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row: a model, and how the methods name its parts."""

    name: str
    apply: Callable[[Any, Any], jax.Array]
    params: Any
    x: jax.Array
    targets: tuple[str, ...]
    head: tuple[str, ...]
    dtype: Any

    def lora(self, **settings: Any) -> lj.LoRA:
        return lj.LoRA(**{"rank": 2, "alpha": 3, "targets": self.targets, "also_train": self.head, **settings})

    def bitfit(self) -> lj.BitFit:
        return lj.BitFit(also_train=self.head)

    def method(self, name: str) -> lj.Method:
        return METHODS[name](self)

    @functools.cached_property
    def uses(self) -> dict[str, lj.Use]:
        return lj.trace_weights(self.apply, self.params, self.x)

    def attach(self, method: lj.Method, *, seed: int = 0) -> Any:
        """The tree as it is when training starts."""
        return lj.attach(self.params, method, key=jax.random.key(seed), uses=self.uses)

    def trained(self, method: lj.Method, *, seed: int = 0) -> Any:
        """The tree as training might have left it: every trainable leaf has moved, so `B` is not zero."""
        params = self.attach(method, seed=seed)
        return moved(params, lj.trainable_mask(params, method), seed=seed + 1)

    def error(self, other: float | None = None) -> float:
        """The laws' tolerance: float32 rounding over a few layers; in bfloat16 a merged weight has 8 bits."""
        return 3e-2 if self.dtype == jnp.bfloat16 else other or 1e-5


def with_defaults(cls: type[lj.Method]) -> Callable[[Case], lj.Method]:
    """A registered method with the options of its class, on the row's targets."""

    def make(row: Case) -> lj.Method:
        targets = {"targets": row.targets} if issubclass(cls, WeightMethod) else {}
        return cls(**{**cls.defaults, **targets, "also_train": row.head})

    return make


# Every method as the laws try it. Those that aren't here yet join with their defaults.
METHODS: dict[str, Callable[[Case], lj.Method]] = {
    "lora": Case.lora,
    "pissa": lambda row: row.lora(init="pissa"),
    "orthogonal": lambda row: row.lora(init="orthogonal"),
    "dora": lambda row: lj.DoRA(rank=2, alpha=3, targets=row.targets, also_train=row.head),
    "ia3": lambda row: lj.IA3(targets=row.targets, feedforward=row.targets[-1:], also_train=row.head),
    "vera": lambda row: lj.VeRA(rank=16, d_initial=0.5, targets=row.targets, also_train=row.head),
    "lora_fa": lambda row: row.lora(freeze_a=True),
    "bitfit": Case.bitfit,
    "full": lambda row: lj.FullFineTune(also_train=row.head),
    "frozen": lambda row: lj.Frozen(also_train=row.head),
    "random_entries": lambda row: lj.RandomMask(size=0.2, also_train=row.head),
    "random_rows": lambda row: lj.RandomMask(size=0.3, kind="rows", also_train=row.head),
    "random_columns": lambda row: lj.RandomMask(size=0.3, kind="columns", also_train=row.head),
    "subspace": lambda row: lj.RandomSubspace(dimension=24, also_train=row.head),
    "structured_subspace": lambda row: lj.RandomSubspace(dimension=24, structure_aware=True, also_train=row.head),
    "houlsby": lambda row: lj.BottleneckAdapter(size=3, also_train=row.head),
    "pfeiffer": lambda row: lj.BottleneckAdapter(size=3, placement="pfeiffer", also_train=row.head),
    "prefix": lambda row: lj.PrefixTuning(length=3, hidden=5, also_train=row.head),
    "direct_prefix": lambda row: lj.PrefixTuning(length=3, hidden=None, also_train=row.head),
    "norms": lambda row: lj.NormTuning(also_train=row.head),
    "top_layers": lambda row: lj.TopLayers(count=1, also_train=row.head),
}
HELD = {
    "random-mask": "random_entries",
    "random-subspace": "subspace",
    "adapter": "houlsby",
    "top-layers": "top_layers",
}
METHODS |= {name: with_defaults(cls) for name, cls in lj.Method.by_name.items() if HELD.get(name, name) not in METHODS}


def moved(params: Any, mask: Any, *, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def move(leaf: Any, trained: bool) -> Any:
        if not trained:
            return leaf
        return jnp.asarray((np.asarray(leaf) + rng.normal(0, 0.3, leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(move, params, mask)


def randomized(params: Any, dtype: Any) -> Any:
    """Every leaf drawn anew: weights of deviation 1/√width, vectors around 0 (biases) or 1 (scales).

    By NumPy, which has nothing to compile.
    """
    rng = np.random.default_rng(1)
    paths, leaves, treedef = flatten_with_paths(params)

    def draw(path: str, leaf: Any) -> Any:
        noise = rng.normal(size=leaf.shape)
        name = path.rpartition("/")[2]
        if name in ("bias", "b"):
            noise = 0.3 * noise
        elif name == "scale" or "norm" in path:
            noise = 1 + 0.2 * noise
        else:
            noise = noise / WIDTH**0.5
        return jnp.asarray(noise.astype(dtype))

    return jax.tree.unflatten(treedef, [draw(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


# Plain functions of nested dictionaries.


def plain_attention(params: Any, tokens: jax.Array) -> jax.Array:
    """A tied embedding, attention on 3-axis kernels, an MLP."""
    x = jnp.take(params["embed"]["table"], tokens, axis=0)
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", x, params["attention"][name]["kernel"])
        + params["attention"][name]["bias"][None, None]
        for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, v)
    output = params["attention"]["output"]
    x = x + jnp.einsum("btnh,nhd->btd", mixed, output["kernel"]) + output["bias"][None, None]
    up, down = params["mlp"]["up"], params["mlp"]["down"]
    x = x + jnp.tanh(x @ up["kernel"] + up["bias"][None, None]) @ down["kernel"] + down["bias"][None, None]
    words = x @ params["embed"]["table"].T
    return jnp.mean(words, axis=1) @ params["head"]["kernel"] + params["head"]["bias"][None]


def _plain_shapes() -> Any:
    def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Any:
        return {"kernel": jnp.zeros(inputs + outputs), "bias": jnp.zeros(outputs)}

    size = WIDTH // HEADS
    return {
        "embed": {"table": jnp.zeros((WORDS, WIDTH))},
        "attention": {name: linear((WIDTH,), (HEADS, size)) for name in ("query", "key", "value")}
        | {"output": linear((HEADS, size), (WIDTH,))},
        "mlp": {"up": linear((WIDTH,), (HIDDEN,)), "down": linear((HIDDEN,), (WIDTH,))},
        "head": linear((WORDS,), (CLASSES,)),
    }


def _plain(dtype: Any) -> Case:
    return Case(
        name="plain",
        apply=plain_attention,
        params=randomized(_plain_shapes(), dtype),
        x=jnp.asarray(TOKENS),
        targets=("embed/table", "query", "key", "value", "output", "up", "down"),
        head=("head",),
        dtype=dtype,
    )


# Flax NNX.


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jax.nn.gelu(self.norm(self.up(x))).mean(1))


class NnxAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x))
        return self.head((x + self.embed.attend(x) @ self.embed.embedding[...].astype(x.dtype)).mean(1))


def _nnx(build: Callable[[nnx.Rngs], nnx.Module], dtype: Any, **row: Any) -> Case:
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(x)  # pyright: ignore[reportCallIssue]

    return Case(apply=apply, params=randomized(params, dtype), dtype=dtype, **row)


def _nnx_mlp(dtype: Any) -> Case:
    return _nnx(
        NnxMlp, dtype, name="nnx_mlp", x=jnp.asarray(VECTORS.astype(dtype)), targets=("up",), head=("head", "norm")
    )


def _nnx_attention(dtype: Any) -> Case:
    targets = ("embed", "query", "key", "value", "out")
    return _nnx(NnxAttention, dtype, name="nnx_attention", x=jnp.asarray(TOKENS), targets=targets, head=("head",))


# Flax Linen.


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = x + nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(x)))
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        hidden = nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(jnp.tanh(hidden)), None


class LinenStack(nn.Module):
    """Three layers as one: scanned over stacked weights, and recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


def _linen(model: nn.Module, dtype: Any, **row: Any) -> Case:
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros_like(row["x"], VECTORS.dtype if row["x"].dtype == dtype else None)
        )
    )
    params = randomized(shapes["params"], dtype)
    return Case(apply=lambda params, x: model.apply({"params": params}, x), params=params, dtype=dtype, **row)  # type: ignore[arg-type]


def _linen_attention(dtype: Any) -> Case:
    targets = ("embed", "query", "key", "value", "out", "up", "down")
    return _linen(LinenAttention(), dtype, name="linen", x=jnp.asarray(TOKENS), targets=targets, head=("head",))


def _linen_scanned(dtype: Any) -> Case:
    row = {"x": jnp.asarray(VECTORS.astype(dtype)), "targets": ("up", "down"), "head": ("head",)}
    return _linen(LinenStack(), dtype, name="linen_scanned", **row)


# Equinox: weights are stored (out, in), the model is written for one example.


class EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self) -> None:
        key = jax.random.key(0)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, use_query_bias=True, use_key_bias=True, key=key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, depth=1, key=key)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens)
        x = jax.vmap(self.norm)(x + self.attention(x, x, x))
        return self.head((x + jax.vmap(self.mlp)(x)).mean(0))


def _equinox(dtype: Any) -> Case:
    params, static = eqx.partition(eqx.filter_eval_shape(EqxModel), lambda leaf: hasattr(leaf, "shape"))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(tokens)

    return Case(
        name="equinox",
        apply=apply,
        params=randomized(params, dtype),
        x=jnp.asarray(TOKENS),
        targets=("embed", "query_proj", "value_proj", "output_proj", "layers/0", "layers/1"),
        head=("head",),
        dtype=dtype,
    )


# The bundled BERT.


def _bert(dtype: Any) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_bert(folder, layers=1, hidden=WIDTH, heads=HEADS)
        model = lj.models.load(folder, task="classification", num_labels=CLASSES, dtype=dtype)

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        mask = jnp.arange(TIME)[None] < jnp.array([[TIME], [TIME - 2], [TIME]])
        return model.apply(params, tokens, mask)

    return Case(
        name="bert",
        apply=apply,
        params=randomized(model.params, dtype),
        x=jnp.asarray(TOKENS),
        targets=("attention/query", "attention/key", "attention/value", "attention/output", "mlp/up", "mlp/down"),
        head=("pooler", "classifier"),
        dtype=dtype,
    )


TABLE: dict[str, Callable[[Any], Case]] = {
    "plain": _plain,
    "nnx_mlp": _nnx_mlp,
    "nnx_attention": _nnx_attention,
    "linen": _linen_attention,
    "linen_scanned": _linen_scanned,
    "equinox": _equinox,
    "bert": _bert,
}


@functools.cache
def case(name: str, dtype: str = "float32") -> Case:
    return TABLE[name](jnp.dtype(dtype))
