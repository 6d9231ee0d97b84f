"""What the compiler says of each method's training step: operations and memory, which no machine changes.

Times are measured by `scripts/bench/run` and asserted nowhere.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj
from lora_jax.host_memory import memory_first
from lora_jax.models.families.bert import BertConfig
from lora_jax.models.model import skeleton

HEAD = ("classifier",)
WIDTH, INNER, LAYERS, BATCH, LENGTH = 96, 384, 3, 16, 32
TOKENS = BATCH * LENGTH
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=3,
    intermediate_size=INNER,
    max_position_embeddings=LENGTH,
    type_vocab_size=2,
)
METHODS = {
    "full": lj.FullFineTune(also_train=HEAD),
    "chain": lj.Frozen(also_train=(*HEAD, "embeddings/norm")),
    "head": lj.Frozen(also_train=HEAD),
    "bitfit": lj.BitFit(also_train=HEAD),
    "lora_qv": lj.LoRA(rank=4, alpha=4, targets=("query", "value"), also_train=HEAD),
    "lora_all": lj.LoRA(rank=4, alpha=4, targets="all-linear", also_train=HEAD),
}


class Compiled(NamedTuple):
    flops: float
    temporary: int
    trainable_bytes: int
    moment_bytes: int


@functools.cache
def step(name: str, remat: Any = None, matmul: Any = None) -> Compiled:
    apply, shapes = skeleton(CONFIG, task="classification", num_labels=2, remat=remat)
    method = METHODS[name]
    params = lj.attach(jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes), method, key=jax.random.key(0))
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    tx = lj.make_optimizer(optax.adamw(1e-3), lj.label_params(params, method))
    adapted = lj.adapt(apply, on_materialize="error", matmul=matmul)

    def loss(trainable: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            adapted(lj.combine(trainable, frozen), ids), jnp.zeros(BATCH, jnp.int32)
        ).mean()

    def update(trainable: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(trainable, frozen, ids), state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    arguments = trainable, state, frozen, jnp.zeros((BATCH, LENGTH), jnp.int32)
    options = memory_first() if remat else {}
    compiled = jax.jit(update, donate_argnums=(0, 1), compiler_options=options).lower(*arguments).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost
    assert memory
    return Compiled(
        cost["flops"],
        memory.temp_size_in_bytes,
        sum(leaf.nbytes for leaf in jax.tree.leaves(trainable)),
        sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim),
    )


def matmuls(name: str) -> float:
    """The formula, in operations: linear layers, attention, factors; the pooler sees one token of each text."""
    linear = TOKENS * LAYERS * (4 * WIDTH**2 + 2 * WIDTH * INNER) + BATCH * WIDTH**2
    attention = LAYERS * 2 * TOKENS * LENGTH * WIDTH
    passes = {"full": (6, 6), "head": (2, 2)}.get(name, (4, 6))
    flops = passes[0] * linear + passes[1] * attention
    if name.startswith("lora"):
        square, wide = (2, 0) if name == "lora_qv" else (4, 2)
        sizes = square * 2 * WIDTH + wide * (WIDTH + INNER)
        flops += 6 * 4 * TOKENS * LAYERS * sizes
    return flops


@pytest.mark.parametrize("name", METHODS)
def test_operations_are_the_formulas(name: str) -> None:
    """Elementwise work comes on top: norms, gelu and softmax, the optimizer. The frozen chain shows how much."""
    elementwise = step("chain").flops - matmuls("chain")
    beyond = step(name).flops - matmuls(name)
    # Full fine-tuning also updates every weight, some 12 operations each.
    update = 15 * math.prod((LAYERS, WIDTH, 12 * WIDTH)) if name == "full" else 0
    assert -0.002 * matmuls(name) <= beyond <= 1.35 * elementwise + update


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_state_is_two_moments_of_what_is_trained(name: str) -> None:
    assert step(name).moment_bytes == 2 * step(name).trainable_bytes


@pytest.mark.parametrize(
    ("name", "most"), [("head", 0.25), ("chain", 0.80), ("bitfit", 0.80), ("lora_qv", 0.80), ("lora_all", 1.08)]
)
def test_temporary_memory_beside_full_fine_tuning(name: str, most: float) -> None:
    """Factors everywhere need every activation that full fine-tuning needs, and no gradient of a weight or embedding,
    of which there are few here."""
    assert step(name).temporary <= most * step("full").temporary


def test_rematerialization_takes_less_memory_and_more_operations() -> None:
    plain, again = step("lora_all"), step("lora_all", remat="nothing_saveable")
    assert again.temporary < 0.7 * plain.temporary
    assert plain.flops < again.flops < 1.7 * plain.flops


def test_merging_first_takes_no_more_operations_than_the_low_rank_path() -> None:
    """At these sizes tokens are many: it's what `choose_strategy` promises."""
    low_rank, merged, chosen = (step("lora_all", matmul=m) for m in ("low_rank_first", "merged_weight", None))
    assert merged.flops <= low_rank.flops
    assert chosen.flops == merged.flops
    assert merged.temporary <= 1.15 * low_rank.temporary
