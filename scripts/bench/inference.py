"""Latency of inference: the base, merged models, factors beside the weights, and what can't be merged.

MiniLM with a classifier on texts of 128 tokens, after each method: LoRA with r = 8 on all linear layers, BitFit, and
what stays in the model: Houlsby's and Pfeiffer's adapters of width 64 and a prefix of 16. A merged model runs the
program that was compiled for the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

import lora_jax as lj

TOKENS = 128
METHODS: dict[str, lj.Method] = {
    "LoRA": lj.LoRA(rank=8, alpha=16, targets="all-linear"),
    "BitFit": lj.BitFit(),
    "Pfeiffer adapters": lj.BottleneckAdapter(size=64, placement="pfeiffer"),
    "Houlsby adapters": lj.BottleneckAdapter(size=64),
    "prefix": lj.PrefixTuning(length=16, hidden=None),
}


def compiled(function: Any) -> int:
    """How many programs a jitted function has."""
    return function._cache_size()


def trained(params: Any, method: lj.Method) -> Any:
    """What is trained has moved, so that nothing is zero and could be left out."""
    tree = lj.attach(params, method, key=jax.random.key(0))
    mask = lj.trainable_mask(tree, method)
    return jax.tree.map(lambda leaf, moves: leaf + 0.01 if moves else leaf, tree, mask)


def main() -> None:
    report = Report("inference", __doc__)
    model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=6)
    trees = {name: trained(model.params, method) for name, method in METHODS.items()}
    merged = {name: lj.merge_params(tree) for name, tree in trees.items()}
    base = jax.jit(lambda params, ids: model.apply(params, ids))
    adapted = jax.jit(lj.adapt(lambda params, ids: model.apply(params, ids), on_materialize="error"))
    rows = []
    for batch in (1,) if report.quick else (1, 8, 32):
        ids = jax.random.randint(jax.random.key(0), (batch, TOKENS), 1000, 20_000)
        assert jnp.allclose(base(merged["LoRA"], ids), adapted(trees["LoRA"], ids), atol=1e-4)
        base(model.params, ids)
        before = compiled(base)
        for name in ("LoRA", "BitFit"):
            base(merged[name], ids)
        assert compiled(base) == before, "a merged model was compiled anew"
        candidates = {
            "base": lambda ids=ids: base(model.params, ids),
            "LoRA, merged": lambda ids=ids: base(merged["LoRA"], ids),
            "LoRA, factors beside the weights": lambda ids=ids: adapted(trees["LoRA"], ids),
            "BitFit": lambda ids=ids: base(merged["BitFit"], ids),
            **{
                name: lambda ids=ids, name=name: base(merged[name], ids)
                for name in ("Pfeiffer adapters", "Houlsby adapters", "prefix")
            },
        }
        times = interleave(candidates, rounds=report.rounds(31 if batch < 32 else 11), warm_up=3)
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
