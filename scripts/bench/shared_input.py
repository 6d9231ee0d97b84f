"""Query, key and value share one input: their factors one by one, or joined into one thin product.

Joined, the input is read once for three reductions, and once for the gradients of three `a`. One measurement is the
value and the gradients by activations and factors of four such triples in a row, each with its own weights. `adapt`
keeps them one by one; this is the evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

from lora_jax.matmul import STRATEGIES, low_rank_matmul

# (width, tokens, rank)
CASES = ((384, 2048, 8), (768, 2048, 8), (384, 2048, 64), (2048, 512, 16))
LAYERS, MEMBERS, SCALE = 4, 3, 2.0


def one_by_one(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The low-rank paths `(members, tokens, width)`: `a` and `b` are `(members, r, width)`."""
    return jnp.stack([low_rank_matmul(x, a[i], b[i], scale=SCALE) for i in range(MEMBERS)])


def joined(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    rank, width = a.shape[1:]
    hidden = jax.lax.dot_general(a.reshape(-1, width), x, (((1,), (1,)), ((), ()))).reshape(MEMBERS, rank, -1)
    return jnp.stack([jax.lax.dot_general(hidden[i] * SCALE, b[i], (((0,), (0,)), ((), ()))) for i in range(MEMBERS)])


def products(strategy: str, paths: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`x W` and the low-rank path of every member, by one of the strategies of `lora_jax.matmul`."""

    def base(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.stack([x @ w[i] for i in range(MEMBERS)])

    def merged(x: jax.Array, a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        return base(x, w + SCALE * jnp.einsum("mri,mro->mio", a, b))

    if strategy == "low_rank_first":
        return lambda x, a, b, w: base(x, w) + paths(x, a, b)
    product = jax.custom_jvp(merged)

    @product.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x, a, b, w), (dx, da, db, _) = primals, tangents
        return merged(x, a, b, w), merged(dx, a, b, w) + paths(x, da, b) + paths(x, a, db)

    return product


def candidate(product: Callable[..., jax.Array], width: int, tokens: int, rank: int) -> Callable[[], Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, width))
    a = jax.random.normal(keys[1], (LAYERS, MEMBERS, rank, width)) / rank
    b = jax.random.normal(keys[2], (LAYERS, MEMBERS, rank, width)) / width
    w = jax.random.normal(keys[3], (LAYERS, MEMBERS, width, width)) * width**-0.5

    def loss(x: jax.Array, a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        for layer in range(LAYERS):
            q, k, v = product(x, a[layer], b[layer], w[layer])
            x = jnp.tanh(q) + jnp.tanh(k) * v
        return jnp.sum(x**2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return lambda: step(x, a, b, w)


def main() -> None:
    report = Report("shared_input", __doc__)
    rows = []
    for width, tokens, rank in ((32, 16, 2),) if report.quick else CASES:
        for strategy in STRATEGIES:
            candidates = {
                path.__name__: candidate(products(strategy, path), width, tokens, rank) for path in (one_by_one, joined)
            }
            values = [call()[0] for call in candidates.values()]
            assert jnp.allclose(*values, rtol=1e-4), "joined and one by one differ"
            times = interleave(candidates, rounds=report.rounds(21), warm_up=3)
            rows.append(
                {
                    "width": width,
                    "tokens": tokens,
                    "rank": rank,
                    "strategy": strategy,
                    "one by one, ms": 1000 * times.median("one_by_one"),
                    "joined, ms": 1000 * times.median("joined"),
                    "joined / one by one": times.ratio("joined", "one_by_one"),
                }
            )
            report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
