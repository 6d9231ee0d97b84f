"""`merge_params` beside a plain copy of the same bytes.

Bytes are those of the adapted weights. For the times, the process keeps the memory that it frees, so that what is timed
is the moving of weights and not the clearing of new pages. Memory is the most that a process of its own, which returns
what it frees, holds while merging, beyond what it held before and the result; beside the largest weight.
"""

from __future__ import annotations

import resource
import subprocess
import sys
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


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def beyond(width: int, layers: int, dtype: str) -> int:
    """Bytes that merging takes beyond inputs and outputs; looked at every millisecond (Linux)."""
    params = tree(width, layers, jnp.dtype(dtype))
    jax.block_until_ready(lj.merge_params(params))  # compiled, and freed again
    seen, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(_resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    merged = jax.block_until_ready(lj.merge_params(params))
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(merged))
    return max(seen) - seen[0] - size


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
    if len(sys.argv) > 1 and sys.argv[1] == "--beyond":
        width, layers, dtype = sys.argv[2:]
        print(beyond(int(width), int(layers), dtype))
        return
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
        command = [sys.executable, __file__, "--beyond", str(width), str(layers), jnp.dtype(dtype).name]
        extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        rows.append(
            {
                "tree": title,
                "MB": size / 1e6,
                "merge GB/s": size / times.median("merge") / 1e9,
                "copy GB/s": size / times.median("copy") / 1e9,
                "merge / copy, GB/s": times.ratio("copy", "merge"),
                "beyond inputs and outputs, MB": extra / 1e6,
                "largest weight, MB": max(leaf.nbytes for leaf in jax.tree.leaves(bases)) / 1e6,
            }
        )
        report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
