"""The two tiers of the tests, and how they are shared out among processes.

The full tier is every test. The quick one (`pytest --quick`) leaves out

- tests marked `full`: whole runs that are killed, notebooks, benchmarks, whose parts have tests of their own;
- in the files of `CROSSED`, whose tests are made of tables crossed with tables, the combinations: each value of each
  parameter of a test stays, in at least one case. `laws[bert-float32-lora]` goes where other cases of that law have
  `bert`, `float32` and `lora`.

`scripts/mutations.py` shows what trust the quick tier has kept: it breaks the code, and looks which tests fail.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # single processes do without it
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

# Tests whose cases are products of tables, and take most of the time.
CROSSED = (
    "tests/adapt/",
    "tests/methods/test_inserted.py",
    "tests/methods/test_random_mask.py",
    "tests/methods/test_random_subspace.py",
    "tests/models/",
    "tests/parity/",
    "tests/test_dtypes.py",
    "tests/test_laws.py",
    "tests/test_low_rank.py",
    "tests/test_matmul.py",
    "tests/test_state.py",
)
# Files that take longest, first.
COSTLY = (
    "tests/test_laws.py",
    "tests/test_dtypes.py",
    "tests/models/test_decoders.py",
    "tests/methods/test_inserted.py",
    "tests/models/test_generate.py",
)
# Files of which every test is a task of its own.
SPREAD = ("tests/test_notebooks.py", "tests/test_benchmarks.py")


def left_out(items: Sequence[pytest.Item]) -> dict[str, str]:
    """What the quick tier leaves out, by node id, with the reason in words."""
    found: dict[str, str] = {}
    seen: dict[str, set[Hashable]] = {}
    for item in items:
        if item.get_closest_marker("full"):
            found[item.nodeid] = "tests that are marked `full`"
        elif item.nodeid.startswith(CROSSED) and (case := getattr(item, "callspec", None)) is not None:
            test = item.nodeid.partition("[")[0]
            values = {(name, _told(value)) for name, value in case.params.items()}
            if values <= seen.setdefault(test, set()):
                found[item.nodeid] = "combinations of parameters that other cases have one by one"
            seen[test] |= values
    return found


def _told(value: object) -> Hashable:
    return repr(value) if type(value).__repr__ is not object.__repr__ else id(value)


def order(item: pytest.Item, slow: Collection[object]) -> tuple[int, int]:
    """By which tests are sorted: spread ones, costly files, files with slow tests, the rest."""
    file = file_of(item.nodeid)
    if file in SPREAD:
        return 0, 0
    if file in COSTLY:
        return 1, COSTLY.index(file)
    return (2 if item.path in slow else 3), 0


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """A process gets a whole file, whose tests share what they have compiled; of `SPREAD`, a test."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if file_of(nodeid) in SPREAD else file_of(nodeid)

    return Scheduling(config, log)
