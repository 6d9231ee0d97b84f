"""One training step of every method of the family, on one model: time, operations and memory.

The columns are those of `step`, and so is the *frozen chain*. Adapters and a prefix are inserted into the model; a
random subspace, whose step recomputes its projection, is timed in [the study](study.md#13-a-random-subspace).
"""

from __future__ import annotations

import workloads
from report import Report
from step import measure


def main() -> None:
    report = Report("family", __doc__)
    title = "MiniLM with embeddings, 2 × 16 tokens" if report.quick else "MiniLM with embeddings, 32 × 64 tokens"
    workload = workloads.minilm(batch=2, length=16) if report.quick else workloads.minilm()
    print(f"\n{title}", flush=True)
    rows = [{"workload": title, **row} for row in measure(workload, None, report.rounds(15))]
    for row in rows:
        report.show(row)
    report.write(rows)


if __name__ == "__main__":
    main()
