"""Reads folders that chance has made, good and damaged; prints what is neither read as it should nor refused.

    .venv/bin/python scripts/fuzz_interop.py --minutes 5
    .venv/bin/python scripts/fuzz_interop.py --seed 1234 --cases 1      # one case again, of each kind

The cases are those of `tests/interop/fuzz.py`, whose first the tests run. The exit status is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests are no package that is installed

from tests.interop import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, if not for a number of cases")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first case; the next ones follow")
    parser.add_argument("--cases", type=int, help="how many of each kind")
    parser.add_argument("--kind", choices=list(fuzz.KINDS), action="append", help="default: all")
    arguments = parser.parse_args()

    end = time.monotonic() + 60 * arguments.minutes
    read, refused = collections.Counter[str](), collections.Counter[str]()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count(arguments.seed):
            done = seed - arguments.seed
            if (done >= arguments.cases) if arguments.cases is not None else (time.monotonic() >= end):
                break
            for kind in arguments.kind or fuzz.KINDS:
                try:
                    outcome = fuzz.run(kind, seed, Path(folder) / "case")
                except AssertionError as error:
                    findings.append(str(error))
                    print(f"FINDING  {error}\n", flush=True)
                    continue
                (read if outcome.was_read else refused)[kind] += 1
    for kind in arguments.kind or fuzz.KINDS:
        print(f"{kind}: {read[kind]:,} read, {refused[kind]:,} refused")
    print(f"{len(findings):,} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
