"""`merge_params` beside a plain copy of the same bytes.

Bytes are those of the adapted weights. Memory is what the process holds at most while merging, beyond what it holds
before and the result, beside the largest weight.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import interleave

import lora_jax as lj
from lora_jax.weights import is_adapted


class PeakMemory:
    """The most resident memory of the process while the block runs, looked at every millisecond (Linux)."""

    def __enter__(self) -> PeakMemory:
        self.before = self.most = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, _resident())
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


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
        with PeakMemory() as memory:
            merged = jax.block_until_ready(lj.merge_params(params))
        beyond = memory.most - memory.before - size
        rows.append(
            {
                "tree": title,
                "MB": size / 1e6,
                "merge GB/s": size / times.median("merge") / 1e9,
                "copy GB/s": size / times.median("copy") / 1e9,
                "merge / copy, GB/s": times.ratio("copy", "merge"),
                "beyond inputs and outputs, MB": max(beyond, 0) / 1e6,
                "largest weight, MB": max(leaf.nbytes for leaf in jax.tree.leaves(bases)) / 1e6,
            }
        )
        del merged
        report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
