"""Attacks every reader of files with damaged ones; keeps what is neither read as it should nor refused.

    .venv/bin/python scripts/fuzz.py --minutes 10 --seed 1
    .venv/bin/python scripts/fuzz.py --kind adapter --seed 1234 --cases 1      # one trial again

A trial is a kind of file and a seed: a good file is made, damaged byte by byte or as the JSON, YAML, table or tensors
that it is, and read, in a process that may take 10 seconds and 1 GB (`tests/attack` has the kinds, the damage and the
process). A finding is an error that isn't ours, a trial that is ended by a limit, a message that doesn't name the file,
values that aren't the file's, or other values though a checksum covers what was changed. Each is kept, with what
repeats it, in a folder of its own below `--findings`. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests are no package that is installed

from tests.attack.kinds import KINDS
from tests.attack.trial import Outcome, Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, if not for a number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial; the next ones follow")
    parser.add_argument("--cases", type=int, help="how many trials of each kind, in place of --minutes")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="default: all")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder to keep them in")
    arguments = parser.parse_args()

    end = time.monotonic() + 60 * arguments.minutes
    kinds = arguments.kind or list(KINDS)
    read, refused = collections.Counter[str](), collections.Counter[str]()
    findings = 0
    with tempfile.TemporaryDirectory() as name, Worker() as worker:
        folder = Path(name) / "case"
        for seed in itertools.count(arguments.seed):
            if arguments.cases is not None and seed - arguments.seed >= arguments.cases:
                break
            if arguments.cases is None and time.monotonic() >= end:
                break
            for kind in kinds:
                if arguments.cases is None and np.random.default_rng([seed, 2]).random() > KINDS[kind].share:
                    continue
                outcome = worker.run(kind, seed, folder)
                if outcome.is_finding:
                    findings += 1
                    keep(outcome, kind, seed, folder, arguments.findings)
                else:
                    (read if outcome.was_read else refused)[kind] += 1
    for kind in kinds:
        print(f"{kind}: {read[kind]:,} read, {refused[kind]:,} refused")
    print(f"{findings:,} findings")
    sys.exit(bool(findings))


def keep(outcome: Outcome, kind: str, seed: int, folder: Path, findings: Path) -> None:
    """Copies the damaged folder, with what was found and how it is found again."""
    kept = findings / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():  # a pipe or a link would be waited for or followed
            (kept / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept / path.relative_to(folder))
    again = f"scripts/fuzz.py --kind '{kind}' --seed {seed} --cases 1"
    (kept / "FINDING.txt").write_text(f"{outcome.message}\n\ndamage: {outcome.damage}\nagain: {again}\n")
    print(f"FINDING  {kind}, seed {seed}, {outcome.damage}: {outcome.message!r:.300}\n  {again}", flush=True)


if __name__ == "__main__":
    main()
