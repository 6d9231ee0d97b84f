"""Latency of inference: the base, the merged model, and the adapted model with its factors beside the weights.

MiniLM with a classifier, 64 tokens, LoRA with r = 8 on all linear layers. The merged model runs the program that was
compiled for the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

import lora_jax as lj


def compiled(function: Any) -> int:
    """How many programs a jitted function has."""
    return function._cache_size()


def main() -> None:
    report = Report("inference", __doc__)
    model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=6)
    method = lj.LoRA(rank=8, alpha=16, targets="all-linear")
    params = lj.attach(model.params, method, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.01 if leaf.shape[0] == 8 else leaf, params)  # factors that act
    merged = lj.merge_params(params)
    base = jax.jit(lambda params, ids: model.apply(params, ids))
    adapted = jax.jit(lj.adapt(lambda params, ids: model.apply(params, ids), on_materialize="error"))
    rows = []
    for batch in (1,) if report.quick else (1, 8, 64):
        ids = jax.random.randint(jax.random.key(0), (batch, 64), 1000, 20_000)
        assert jnp.allclose(base(merged, ids), adapted(params, ids), atol=1e-4)
        candidates = {
            "base": lambda ids=ids: base(model.params, ids),
            "merged": lambda ids=ids: base(merged, ids),
            "adapted": lambda ids=ids: adapted(params, ids),
        }
        before = compiled(base)
        times = interleave(candidates, rounds=report.rounds(31 if batch < 64 else 11), warm_up=3)
        assert compiled(base) == before, "the merged model was compiled anew"
        for name in candidates:
            rows.append(
                {
                    "batch": batch,
                    "model": name,
                    "latency, ms": 1000 * times.median(name),
                    "/ base": times.ratio(name, "base"),
                }
            )
            report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
