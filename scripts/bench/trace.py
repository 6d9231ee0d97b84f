"""What `adapt` costs before the first step: tracing and compilation against the base's, and the time to import.

*Adapted* is the gradient by LoRA's factors. It stands beside two gradients of the same function with plain weights: by
all its parameters (*base*), and by its biases alone (*biases*), which forms fewer products than any LoRA needs.
*Unrolled* layers are written out one after the other, *scanned* ones are one body over stacked weights.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from report import Report
from timing import Times

import lora_jax as lj

WIDTH = 64


def unrolled(layers: int) -> tuple[Callable[..., jax.Array], Any, Any]:
    shapes = {"query": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    params = {
        str(index): {name: {"kernel": jnp.ones(s), "bias": jnp.ones(s[1])} for name, s in shapes.items()}
        for index in range(layers)
    }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for index in range(layers):
            x = _layer(x, params[str(index)])
        return x

    return apply, params, None


def scanned(layers: int) -> tuple[Callable[..., jax.Array], Any, Any]:
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), unrolled(1)[1]["0"])

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, p: (_layer(x, p), None), x, params)[0]

    return apply, params, lj.trace_weights(apply, params, jnp.ones((2, 8, WIDTH)))


def _layer(x: jax.Array, p: Any) -> jax.Array:
    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ p[name]["kernel"] + p[name]["bias"]

    scores = jnp.einsum("btd,bsd->bts", linear("query", x), x)
    x = x + jax.nn.softmax(scores) @ linear("value", x)
    return x + linear("down", jax.nn.gelu(linear("up", x)))


METHODS = {
    "base": lj.FullFineTune(),
    "biases": lj.BitFit(),
    "adapted": lj.LoRA(rank=8, alpha=8, targets=("query", "value", "up", "down")),
}


def prepared(apply: Callable[..., jax.Array], params: Any, uses: Any, method: lj.Method) -> Callable[[], Any]:
    """Traces and compiles the gradient, from nothing."""
    params = lj.attach(params, method, key=jax.random.key(0), uses=uses)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    transform = lj.adapt if isinstance(method, lj.LoRA) else (lambda fn: fn)

    def run() -> tuple[float, float]:
        def loss(trainable: Any, frozen: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(transform(apply)(lj.combine(trainable, frozen), x))

        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, jnp.ones((2, 8, WIDTH)))
        middle = time.perf_counter()
        lowered.compile()
        return middle - start, time.perf_counter() - middle

    return run


def import_seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    report = Report("trace", __doc__)
    rounds = report.rounds(5)
    rows: list[dict[str, Any]] = []
    for kind, build in (("unrolled", unrolled), ("scanned", scanned)):
        for layers in (2,) if report.quick else (6, 24, 80):
            apply, params, uses = build(layers)
            runs = {name: prepared(apply, params, uses, method) for name, method in METHODS.items()}
            traced: dict[str, list[float]] = {name: [] for name in runs}
            whole: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, run in runs.items():
                    tracing, compiling = run()
                    traced[name].append(tracing)
                    whole[name].append(tracing + compiling)
            rows.append(
                {
                    "layers": f"{layers} {kind}",
                    **{f"trace, {name}, s": statistics.median(seconds) for name, seconds in traced.items()},
                    **{f"trace + compile, {name}, s": statistics.median(seconds) for name, seconds in whole.items()},
                    "adapted / base": Times(whole).ratio("adapted", "base"),
                    "adapted / biases": Times(whole).ratio("adapted", "biases"),
                }
            )
            report.show(rows[-1])
    imports: dict[str, list[float]] = {
        "import jax, optax": [],
        "import lora_jax": [],
        "import jax, optax, lora_jax": [],
    }
    for _ in range(report.rounds(11)):
        for statement, seconds in imports.items():
            seconds.append(import_seconds(statement))
    row: dict[str, Any] = {f"{statement}, s": statistics.median(seconds) for statement, seconds in imports.items()}
    row["ratio"] = Times(imports).ratio("import lora_jax", "import jax, optax")
    row["ratio, all three"] = Times(imports).ratio("import jax, optax, lora_jax", "import jax, optax")
    report.show(row)
    report.write(rows, imports=row)


if __name__ == "__main__":
    main()
