"""What the benchmarks train: encoders and a decoder stack, each with its methods and its formulas."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lj
from lora_jax.models.families.bert import BertConfig, Encoder
from lora_jax.paths import leaf_paths

HEAD = ("classifier",)


class Workload(NamedTuple):
    """A model, a batch and a loss.

    Attributes:
        apply: `apply(params, inputs)` gives logits `(rows, classes)`.
        params: the base.
        inputs: what `apply` takes, a pytree of arrays.
        labels: classes, `(rows,)`.
        chain: the leaf before all layers whose training makes the *frozen chain*: no gradient of a weight, but one
            through all of them, the floor for methods that train something in every layer.
        linear: `(in, out, tokens)` of every linear layer's weight in the chain.
        attention_flops: of the attention's two products, forward.
    """

    name: str
    apply: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    labels: jax.Array
    chain: str
    linear: list[tuple[int, int, int]]
    attention_flops: int
    head: tuple[str, ...] = HEAD
    uses: Any = None


def methods(workload: Workload) -> dict[str, lj.Method]:
    """By the names of the tables."""
    head = workload.head

    def lora(targets: Any, rank: int = 8) -> lj.LoRA:
        return lj.LoRA(rank=rank, alpha=2 * rank, targets=targets, also_train=head)

    rows: dict[str, lj.Method] = {
        "full": lj.FullFineTune(also_train=head),
        "frozen chain": lj.Frozen(also_train=(*head, workload.chain)),
        "head only": lj.Frozen(also_train=head),
        "BitFit": lj.BitFit(also_train=head),
        "LoRA q, v, r=8": lora(("attention/query", "attention/value")),
        "LoRA attention, r=8": lora("attention"),
        "LoRA all linear, r=4": lora("all-linear", 4),
        "LoRA all linear, r=8": lora("all-linear"),
        "LoRA all linear, r=64": lora("all-linear", 64),
        "PiSSA all linear, r=8": dataclasses.replace(lora("all-linear"), init="pissa"),
        "LoRA-FA all linear, r=8": dataclasses.replace(lora("all-linear"), freeze_a=True),
        "DoRA all linear, r=8": lj.DoRA(rank=8, alpha=16, targets="all-linear", also_train=head),
        "IA3": lj.IA3(also_train=head),
        "VeRA all linear, r=256": lj.VeRA(rank=256, targets="all-linear", also_train=head),
    }
    if workload.chain.startswith("embeddings"):  # a bundled model as a whole: its function reads what is inserted
        rows |= {
            "Houlsby adapters, m=8": lj.BottleneckAdapter(size=8, also_train=head),
            "Pfeiffer adapters, m=16": lj.BottleneckAdapter(size=16, placement="pfeiffer", also_train=head),
            "prefix, m=16": lj.PrefixTuning(length=16, also_train=head),
        }
    has_biases = any(path.endswith("/bias") and "attention" in path for path in leaf_paths(workload.params))
    return rows if has_biases else {name: method for name, method in rows.items() if name != "BitFit"}


class Candidate:
    """A method's compiled training step, its state, and what the compiler says of it."""

    def __init__(
        self,
        workload: Workload,
        method: lj.Method,
        *,
        compiler_options: Mapping[str, str] | None = None,
    ) -> None:
        params = lj.attach(workload.params, method, key=jax.random.key(0), uses=workload.uses)
        labels = lj.label_params(params, method)
        self.trainable, self.frozen = lj.partition(params, lj.trainable_mask(params, method))
        self.counts = lj.count_params(params, labels)
        tx = lj.make_optimizer(optax.adamw(1e-4), labels)
        apply = lj.adapt(workload.apply, on_materialize="error")
        self.state = tx.init(self.trainable)

        def loss(trainable: Any, frozen: Any, inputs: Any, classes: jax.Array) -> jax.Array:
            logits = apply(lj.combine(trainable, frozen), inputs).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        @functools.partial(
            jax.jit, donate_argnames=("trainable", "state"), compiler_options=dict(compiler_options or {})
        )
        def step(
            trainable: Any, state: Any, frozen: Any, inputs: Any, classes: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(trainable, frozen, inputs, classes)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        self.batch = workload.inputs, workload.labels
        self.step = step.lower(self.trainable, self.state, self.frozen, *self.batch).compile()

    def __call__(self) -> Any:
        self.trainable, self.state, value = self.step(self.trainable, self.state, self.frozen, *self.batch)
        return self.trainable, value

    @property
    def flops(self) -> float:
        cost = self.step.cost_analysis()
        return float(cost["flops"]) if cost and "flops" in cost else math.nan

    @property
    def temporary_bytes(self) -> int:
        memory = self.step.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0

    @property
    def optimizer_bytes(self) -> int:
        """Of the moments, without the steps' counters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state) if leaf.ndim or leaf.dtype != jnp.int32)

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.trainable))


def matmul_flops(workload: Workload, method: lj.Method) -> float:
    """The formula: 2 operations a weight and token forward; again for the gradient of the activations, which a frozen
    base has too; again for the weight's own in full fine-tuning; `6 · r · (in + out)` for factors beside it, of which
    `2 · r · in` are the gradient of `a`. Starts from the weight have twice the rank; DoRA's norms take
    `2 · (r + 1) · in · out` a weight, however many tokens there are. An adapter of width `m` is two weights of `m · d`,
    forward, backward and their own gradients; a prefix is `m` more keys and values in each attention, and its network.
    """
    dense = sum(2 * i * o * tokens for i, o, tokens in workload.linear)
    attention = workload.attention_flops
    if isinstance(method, lj.FullFineTune):
        return 3 * dense + 3 * attention
    if isinstance(method, lj.Frozen) and method.also_train == workload.head:
        return dense + attention
    total = 2 * dense + 3 * attention
    if isinstance(method, lj.LoRA):
        chosen = range(len(workload.linear))
        if method.targets != "all-linear":
            layer = ("query", "key", "value", "output")
            names = layer if method.targets == "attention" else ("query", "value")
            per_layer = _weights_per_layer(workload)
            chosen = [index for index in chosen if index % per_layer in {layer.index(name) for name in names}]
        total += sum(_low_rank_flops(method, *workload.linear[index]) for index in chosen)
    layers = len(workload.linear) // _weights_per_layer(workload)
    inner, _, tokens = workload.linear[0]
    if isinstance(method, lj.BottleneckAdapter):
        places = layers * (2 if method.placement == "houlsby" else 1)
        total += places * 12 * method.size * inner * tokens
    if isinstance(method, lj.PrefixTuning):
        assert method.hidden is not None
        network = method.length * method.hidden * inner * (1 + 2 * layers)
        total += 3 * layers * 4 * method.length * inner * tokens + 6 * network
    if isinstance(method, lj.VeRA):
        total += sum(method.rank * (4 * i + 6 * o) * tokens for i, o, tokens in workload.linear)
    return total


def _low_rank_flops(method: lj.LoRA, inner: int, outer: int, tokens: int) -> float:
    rank = method.rank * (2 if method.init in ("pissa", "orthogonal") else 1)
    norms = 2 * (rank + 1) * inner * outer if isinstance(method, lj.DoRA) else 0
    return rank * ((4 if method.freeze_a else 6) * inner + 6 * outer) * tokens + norms


def _weights_per_layer(workload: Workload) -> int:
    return 7 if "gate" in str(leaf_paths(workload.params)) else 6


def _labels(rows: int, classes: int) -> jax.Array:
    return jnp.arange(rows) % classes


def minilm(batch: int = 32, length: int = 64, remat: Any = None, dtype: Any = None) -> Workload:
    """The default base with its embeddings, pretrained weights, random tokens."""
    model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=6, remat=remat, dtype=dtype)
    config = model.config
    ids = jax.random.randint(jax.random.key(0), (batch, length), 1000, 20_000)
    return Workload(
        "MiniLM with embeddings",
        lambda params, ids: model.apply(params, ids),
        _float32_where_trained(model.params) if dtype is not None else model.params,
        ids,
        _labels(batch, 6),
        "embeddings/norm",
        *_encoder_formula(config, batch, length),
    )


def _float32_where_trained(params: Any) -> Any:
    """Biases, norms and the head in float32 beside bfloat16 weights, so that small updates are kept."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.ndim == 1 else leaf, params)


def encoder_layers(
    width: int, layers: int, heads: int, batch: int = 32, length: int = 64, remat: Any = None, dtype: Any = jnp.float32
) -> Workload:
    """Encoder layers alone, on random hidden states: no embeddings, whose update is all memory traffic."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=512,
        type_vocab_size=2,
    )
    module = Encoder(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    tree = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(state))
    params = {
        "input": {"bias": jnp.zeros(width, jnp.float32)},
        "encoder": {"layers": {str(index): layer for index, layer in tree["layers"].items()}},
        "classifier": {"kernel": jax.random.normal(jax.random.key(1), (width, 6)) * 0.02, "bias": jnp.zeros(6)},
    }
    if dtype != jnp.float32:
        params = _float32_where_trained(params)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        numbered = {"layers": {int(index): layer for index, layer in params["encoder"]["layers"].items()}}
        hidden = nnx.merge(graph, numbered)((x + params["input"]["bias"]).astype(dtype), None, None)
        pooled = hidden.mean(axis=1).astype(jnp.float32)
        return pooled @ params["classifier"]["kernel"].astype(jnp.float32) + params["classifier"]["bias"]

    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    linear, attention = _encoder_formula(config, batch, length, pooler=False)
    name = f"encoder layers, d = {width}, {layers} layers"
    return Workload(name, apply, params, x, _labels(batch, 6), "input/bias", linear, attention)


def _encoder_formula(
    config: BertConfig, batch: int, length: int, pooler: bool = True
) -> tuple[list[tuple[int, int, int]], int]:
    d, inner, tokens = config.hidden_size, config.intermediate_size, batch * length
    layer = [(d, d, tokens)] * 4 + [(d, inner, tokens), (inner, d, tokens)]
    linear = layer * config.num_hidden_layers + ([(d, d, batch)] if pooler else [])
    return linear, config.num_hidden_layers * 4 * tokens * length * d


def decoder(
    width: int = 2048,
    layers: int = 2,
    heads: int = 16,
    inner: int = 5632,
    vocabulary: int = 1024,
    batch: int = 4,
    length: int = 512,
    dtype: Any = jnp.float32,
    remat: str | None = None,
) -> Workload:
    """A stack of pre-norm decoder layers as in the Llama family, in a scan over stacked weights; plain functions.

    Rotary embeddings and grouped heads are left out: they cost little and nothing of theirs is trained.
    """
    keys = itertools.count()

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(next(keys)), shape, dtype) * shape[-2] ** -0.5

    square, up, down = (layers, width, width), (layers, width, inner), (layers, inner, width)
    params = {
        "embeddings": {"table": normal(vocabulary, width), "bias": jnp.zeros(width, jnp.float32)},
        "layers": {
            "attention": {name: {"kernel": normal(*square)} for name in ("query", "key", "value", "output")},
            "mlp": {
                "gate": {"kernel": normal(*up)},
                "up": {"kernel": normal(*up)},
                "down": {"kernel": normal(*down)},
            },
            "norm_1": {"scale": jnp.ones((layers, width), jnp.float32)},
            "norm_2": {"scale": jnp.ones((layers, width), jnp.float32)},
        },
        "norm": {"scale": jnp.ones(width, jnp.float32)},
        "classifier": {"kernel": normal(width, vocabulary)},
    }
    apply = functools.partial(_decode, heads=heads, dtype=dtype, remat=remat)
    ids = jax.random.randint(jax.random.key(0), (batch, length), 0, vocabulary)
    tokens = batch * length
    linear = [(width, width, tokens)] * 4 + [(width, inner, tokens)] * 2 + [(inner, width, tokens)]
    name = f"decoder, d = {width}, {layers} layers, {length} tokens"
    workload = Workload(
        f"{name}, {jnp.dtype(dtype)}",
        apply,
        params,
        ids,
        ids.reshape(-1),
        "embeddings/bias",
        linear * layers,
        layers * 4 * tokens * length * width,
    )
    return workload._replace(uses=lj.trace_weights(apply, params, ids))


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def _decode(params: Any, ids: jax.Array, *, heads: int, dtype: Any, remat: str | None) -> jax.Array:
    x = jnp.take(params["embeddings"]["table"], ids, axis=0) + params["embeddings"]["bias"].astype(dtype)

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        batch, time, width = x.shape
        h = _norm(x, p["norm_1"]["scale"])
        q, k, v = (
            (h @ p["attention"][name]["kernel"]).reshape(batch, time, heads, width // heads)
            for name in ("query", "key", "value")
        )
        context = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=_kernel(dtype))
        x = x + context.reshape(batch, time, width) @ p["attention"]["output"]["kernel"]
        h = _norm(x, p["norm_2"]["scale"])
        hidden = jax.nn.silu(h @ p["mlp"]["gate"]["kernel"]) * (h @ p["mlp"]["up"]["kernel"])
        return x + hidden @ p["mlp"]["down"]["kernel"], None

    body = layer if remat is None else jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, remat))
    x = jax.lax.scan(body, x, params["layers"])[0]
    x = _norm(x, params["norm"]["scale"])
    return (x @ params["classifier"]["kernel"]).reshape(-1, params["classifier"]["kernel"].shape[-1])


def _kernel(dtype: Any) -> Any:
    """cuDNN's where there is one; it takes 16-bit numbers only."""
    return "cudnn" if jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2 else None
