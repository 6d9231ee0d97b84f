"""What memory does to a step on the CPU: the C library's habits, and the compiler's order of operations.

LoRA with r = 8 on all linear layers of MiniLM, 32 texts of 64 tokens, each row in processes of its own, which take
turns. *Freed memory* is returned to the system (the C library's default) or kept (`keep_freed_memory`); *order* is the
compiler's default or memory first (`memory_first`), both of `lora_jax.host_memory`; *kept of a layer* is the policy of
rematerialization.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import workloads
from report import Report

from lora_jax.host_memory import keep_freed_memory, memory_first

CASES = (
    ("returned", "default", "all"),
    ("kept", "default", "all"),
    ("kept", "memory first", "all"),
    ("kept", "default", "nothing_saveable"),
    ("kept", "memory first", "nothing_saveable"),
    ("kept", "memory first", "dots_with_no_batch_dims_saveable"),
)


def one(freed: str, order: str, remat: str, steps: int, batch: int, length: int) -> dict[str, Any]:
    if freed == "kept":
        keep_freed_memory()
    options = memory_first() if order == "memory first" else {}
    workload = workloads.minilm(batch, length, remat=None if remat == "all" else remat)
    method = workloads.methods(workload)["LoRA all linear, r=8"]
    candidate = workloads.Candidate(workload, method, compiler_options=options)
    for _ in range(2):
        jax.block_until_ready(candidate())
    seconds, faults = [], []
    for _ in range(steps):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        jax.block_until_ready(candidate())
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        "seconds": statistics.median(seconds),
        "faults": statistics.median(faults),
        "temporary": candidate.temporary_bytes,
        "gflop": candidate.flops / 1e9,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        freed, order, remat, *sizes = sys.argv[2:]
        print(json.dumps(one(freed, order, remat, *map(int, sizes))))
        return
    report = Report("memory", __doc__)
    sizes = ["1", "2", "8"] if report.quick else ["9", "32", "64"]
    cases = CASES[1:2] if report.quick else CASES
    results: dict[tuple[str, ...], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(report.rounds(3)):
        for case in cases:
            command = [sys.executable, __file__, "--one", *case, *sizes]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    plain = statistics.median(result["seconds"] for result in results["kept", "default", "all"])
    for case, runs in results.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append(
            {
                **dict(zip(("freed memory", "order", "kept of a layer"), case, strict=True)),
                "step, ms": 1000 * middle["seconds"],
                "/ kept, default, all": middle["seconds"] / plain,
                "page faults a step": int(middle["faults"]),
                "temporary MB": middle["temporary"] / 1e6,
                "compiled GFLOP": middle["gflop"],
                "process's peak, MB": middle["resident"] / 1e6,
            }
        )
        report.show(rows[-1])
    report.write(rows)


if __name__ == "__main__":
    main()
