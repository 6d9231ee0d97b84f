"""Which strategy is fast for one matmul with an adapted weight, by its sizes: the evidence for `choose_strategy`.

One measurement is the value and the gradients by activations and factors of four such matmuls in a row, each with its
own weight, as in a training step.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

import lora_jax as lj
from lora_jax.matmul import STRATEGIES, choose_strategy

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (2048, 2048))
RANKS = (8, 64)
# Tokens as multiples of the line at which the two strategies cost the same FLOPs.
PLACES = (0.25, 0.5, 1.0, 2.0, 4.0)
LAYERS = 4


def layers(params: list[Any], x: jax.Array, cotangent: jax.Array) -> jax.Array:
    # Elementwise work between matmuls, or XLA would not have to keep their order.
    total = jnp.zeros(())
    for weight in params:
        y = jnp.tanh(x) @ weight
        total += jnp.vdot(y, cotangent)
        x = x + 0.1 * jnp.roll(x, 1, axis=0) + jnp.sum(y, axis=1, keepdims=True) * 1e-3
    return total


def candidate(inner: int, outer: int, rank: int, tokens: int, strategy: Any) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 2 + LAYERS))
    x, cotangent = jax.random.normal(next(keys), (tokens, inner)), jax.random.normal(next(keys), (tokens, outer))
    base = [jax.random.normal(next(keys), (inner, outer)) for _ in range(LAYERS)]
    trainable, frozen = None, base
    if strategy is not None:
        method = lj.LoRA(rank=rank, alpha=rank, targets=lambda path, leaf: True)
        params = lj.attach(base, method, key=jax.random.key(1))
        trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))

    def loss(trainable: Any, x: jax.Array, frozen: Any, cotangent: jax.Array) -> jax.Array:
        whole = frozen if trainable is None else lj.combine(trainable, frozen)
        return lj.adapt(layers, on_materialize="error", matmul=strategy)(whole, x, cotangent)

    arguments = (trainable, x, frozen, cotangent)
    step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return lambda: step(*arguments)


def main() -> None:
    report = Report("matmul", __doc__)
    rounds = report.rounds(9)
    cases = itertools.product(SHAPES, RANKS, PLACES)
    rows = []
    for (inner, outer), rank, place in [((64, 64), 8, 1.0)] if report.quick else cases:
        line = 2 * inner * outer / (inner + outer)
        tokens = max(int(place * line), 1)
        candidates = {name: candidate(inner, outer, rank, tokens, name) for name in STRATEGIES}
        times = interleave({"frozen": candidate(inner, outer, rank, tokens, None), **candidates}, rounds=rounds)
        ratios = {name: times.ratio(name, "frozen") for name in STRATEGIES}
        chosen = choose_strategy(tokens, inner, outer, dtype=jnp.float32, backend=jax.default_backend())
        fastest = min(STRATEGIES, key=lambda name: times.median(name))
        rows.append(
            {
                "weight": f"{inner} × {outer}",
                "rank": rank,
                "tokens": tokens,
                "of the line": place,
                **{f"{name} / frozen": ratios[name] for name in STRATEGIES},
                "merged / low-rank first": times.ratio("merged_weight", "low_rank_first"),
                "chosen": chosen,
                "fastest": fastest,
            }
        )
        report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
