"""`merge_params` beside a plain copy of the same bytes.

Bytes are those of the adapted weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

import lora_jax as lj
from lora_jax.weights import is_adapted


def tree(width: int, layers: int, dtype: Any) -> Any:
    key = jax.random.key(0)
    shapes = {"query": (width, width), "value": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    base = {
        f"{layer}": {name: jax.random.normal(key, shape).astype(dtype) for name, shape in shapes.items()}
        for layer in range(layers)
    }
    method = lj.LoRA(rank=8, alpha=16, targets=lambda path, leaf: True)
    params = lj.attach(base, method, key=key)

    def filled(leaf: Any) -> Any:
        return lj.LoRAWeight(leaf.base, leaf.a, leaf.b + 0.01, scale=leaf.scale, axes=leaf.axes)

    return jax.tree.map(filled, params, is_leaf=is_adapted)


def main() -> None:
    report = Report("merge", __doc__)
    rows = []
    for title, width, layers, dtype in (
        ("MiniLM's layers, float32", 384, 6, jnp.float32),
        ("8 layers, d = 2048, float32", 2048, 8, jnp.float32),
        ("8 layers, d = 2048, bfloat16", 2048, 8, jnp.bfloat16),
    ):
        if report.quick:
            width, layers = 64, 2
        params = tree(width, layers, dtype)
        bases = lj.detach(params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(bases))
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        candidates = {"copy": lambda p=bases, c=copy: c(p), "merge": lambda p=params: lj.merge_params(p)}
        times = interleave(candidates, rounds=report.rounds(11), warm_up=2)
        rows.append(
            {
                "tree": title,
                "MB": size / 1e6,
                "merge GB/s": size / times.median("merge") / 1e9,
                "copy GB/s": size / times.median("copy") / 1e9,
                "merge / copy, GB/s": times.ratio("copy", "merge"),
            }
        )
        report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
