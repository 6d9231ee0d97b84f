"""One training step of LoRA and BitFit: time, operations and memory, each beside its formula.

*Frozen chain* trains one vector before the first layer and the head: no gradient of a weight, but one through all of
them. It is the floor for methods that train something in every layer. AdamW throughout; the same batch every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import workloads
from report import Report
from timing import interleave

KEEP_NOTHING = "nothing_saveable"


def cases(quick: bool) -> dict[str, tuple[Callable[[], workloads.Workload], tuple[str, ...], int]]:
    """Workload, the methods and the rounds, by title."""
    if quick:
        small = {"batch": 2, "length": 16}
        tiny: dict[str, Any] = {"width": 64, "layers": 2, "heads": 2, **small}
        few = ("full", "frozen chain", "LoRA all linear, r=8")
        return {
            "encoder": (lambda: workloads.encoder_layers(**tiny), few, 1),
            "decoder": (lambda: workloads.decoder(**tiny, inner=128, vocabulary=64, dtype=jnp.bfloat16), few, 1),
        }
    some = ("full", "frozen chain", "LoRA q, v, r=8", "LoRA all linear, r=8")
    lora = ("LoRA attention, r=8", "LoRA all linear, r=4", "LoRA all linear, r=64")
    more = (*some, "head only", "BitFit", *lora)
    base = {"width": 768, "layers": 4, "heads": 12}
    short: dict[str, Any] = {"batch": 1}
    layers: dict[str, Any] = {"width": 384, "layers": 6, "heads": 12}
    return {
        "MiniLM with embeddings, 32 × 64 tokens": (workloads.minilm, more, 15),
        "MiniLM with embeddings, 32 × 32 tokens": (lambda: workloads.minilm(length=32), some, 15),
        "MiniLM's encoder layers alone, 32 × 64 tokens": (lambda: workloads.encoder_layers(**layers), more, 15),
        "these layers, rematerialized": (lambda: workloads.encoder_layers(**layers, remat=KEEP_NOTHING), some, 9),
        "these layers, bfloat16 base": (lambda: workloads.encoder_layers(**layers, dtype=jnp.bfloat16), some, 7),
        "BERT-base's shape, 4 of its 12 layers, 32 × 64 tokens": (lambda: workloads.encoder_layers(**base), more, 9),
        "decoder, 2 layers, 1 × 512 tokens": (lambda: workloads.decoder(**short), some, 7),
        "this decoder, rematerialized": (lambda: workloads.decoder(**short, remat=KEEP_NOTHING), some, 7),
        "this decoder, bfloat16 base": (lambda: workloads.decoder(**short, dtype=jnp.bfloat16), some, 5),
    }


def measure(workload: workloads.Workload, chosen: tuple[str, ...] | None, rounds: int) -> list[dict[str, Any]]:
    """A row for each method; for all of them if `None` are chosen."""
    named = {name: m for name, m in workloads.methods(workload).items() if chosen is None or name in chosen}
    candidates = {name: workloads.Candidate(workload, method) for name, method in named.items()}
    times = interleave(candidates, rounds=rounds, warm_up=2)
    full = candidates["full"]
    return [
        {
            "method": name,
            "step, ms": 1000 * times.median(name),
            "/ full": times.ratio(name, "full"),
            "/ frozen chain": times.ratio(name, "frozen chain"),
            "compiled GFLOP": candidate.flops / 1e9,
            "formula": workloads.matmul_flops(workload, named[name]) / 1e9,
            "temporary MB": candidate.temporary_bytes / 1e6,
            "of full": candidate.temporary_bytes / max(full.temporary_bytes, 1),
            "gradient bytes": candidate.gradient_bytes,
            "optimizer bytes": candidate.optimizer_bytes,
            "2 · trainable bytes": 2 * candidate.gradient_bytes,
        }
        for name, candidate in candidates.items()
    ]


def main() -> None:
    report = Report("step", __doc__)
    rows = []
    for title, (build, chosen, rounds) in cases(report.quick).items():
        print(f"\n{title}", flush=True)
        for row in measure(build(), chosen, rounds):
            report.show(row)
            rows.append({"workload": title, **row})
        report.write(rows)


if __name__ == "__main__":
    main()
