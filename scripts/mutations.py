"""Breaks the code in one place after the other, and looks whether the tests see it.

    python scripts/mutations.py                     the quick tier (tests/tiers.py)
    python scripts/mutations.py --suite full        all tests of the files that should see it
    python scripts/mutations.py --root OTHER        another checkout, with its own tests; its files may lie elsewhere
    python scripts/mutations.py --only resume -j 2  those whose name has `resume`, two at a time

Each mutation is applied to a temporary copy, never to the working tree. The exit status is 1 if one survives.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One change that makes the code wrong.

    Attributes:
        name: What is broken, after the subject that it belongs to.
        file: Where the text is; in a checkout without this file, it is looked for.
        old: The text, which occurs once.
        new: What takes its place.
        tests: Arguments of pytest: the tests that should see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Outcome(NamedTuple):
    """What the tests said of a mutation; `seen` is the first test that failed."""

    mutation: Mutation
    is_killed: bool
    seen: str


LAWS, MERGING, ADAPTERS = "tests/test_laws.py", "tests/test_merging.py", "tests/test_adapters.py"
PEFT, HOSTILE = "tests/interop/test_peft_files.py", "tests/interop/test_hostile_folders.py"
LOOP, RECOMMEND = "tests/training/test_loop.py", "tests/study/test_recommend.py"
MATMUL, WEIGHT = "lora_jax/matmul.py", "lora_jax/methods/lora/weight.py"
MASKS, CAUSAL, STORE = "lora_jax/masks.py", "lora_jax/models/nn/causal.py", "lora_jax/adapters/store.py"
LAYOUT, WRITE = "lora_jax/interop/layout.py", "lora_jax/interop/peft/write.py"
CHOICE = "lora_jax/study/runs/recommend.py"
RESUMED = (LOOP, "-k", "interrupted or damaged")

MUTATIONS = (
    Mutation(
        "law: the low-rank path forgets its scale",
        MATMUL,
        "lax.dot_general(hidden * scale, expand",
        "lax.dot_general(hidden, expand",
        (LAWS, "-k", "law_2"),
    ),
    Mutation(
        "law: the lookup forgets its scale",
        WEIGHT,
        "rows.astype(wider(rows.dtype, compute)) * self.scale",
        "rows.astype(wider(rows.dtype, compute))",
        (LAWS, "-k", "law_2"),
    ),
    Mutation(
        "law: every leaf draws with one key",
        "lora_jax/paths.py",
        'return jax.random.fold_in(key, int.from_bytes(digest, "big"))',
        "return key",
        (LAWS, "-k", "law_10"),
    ),
    Mutation(
        "law: trained leaves of the base are not copied",
        MASKS,
        "trainable.append(copied(leaf) if keep else None)",
        "trainable.append(leaf if keep else None)",
        (LAWS, "-k", "law_5"),
    ),
    Mutation(
        "law: merging first differentiates one factor only",
        MATMUL,
        "lambda dbase, da, db, dx: low_rank(x, a, db),",
        "lambda dbase, da, db, dx: 0 * low_rank(x, a, db),",
        ("tests/test_matmul.py", "tests/test_low_rank.py"),
    ),
    Mutation(
        "merge: the factors are subtracted",
        WEIGHT,
        "return self.base.astype(self._wide()) + self.delta()",
        "return self.base.astype(self._wide()) - self.delta()",
        (MERGING, LAWS, "-k", "merging or law_2"),
    ),
    Mutation(
        "merge: the sum is rounded before it is cast",
        "lora_jax/merging.py",
        "return _widened(node, dtype).merge().astype(dtype)",
        "return node.merge().astype(dtype)",
        (MERGING,),
    ),
    Mutation(
        "merge: a start from the weight is added",
        WEIGHT,
        "-self.start_b.astype(self.b.dtype)",
        "self.start_b.astype(self.b.dtype)",
        (LAWS, "-k", "law_1 and pissa"),
    ),
    Mutation(
        "merge: the product of the factors has half a derivative",
        MATMUL,
        "_product(da, b, stack) + _product(a, db, stack)",
        "_product(da, b, stack)",
        (LAWS, "-k", "law_2"),
    ),
    Mutation(
        "save: the tensors' checksum is another",
        STORE,
        '"sha256": sha256_file(staging / TENSORS),\n            "base": fingerprint(_frozen_leaves(leaves, labels)),',
        '"sha256": "0" * 64,\n            "base": fingerprint(_frozen_leaves(leaves, labels)),',
        (ADAPTERS,),
    ),
    Mutation(
        "save: the head is left out",
        STORE,
        "elif label != FROZEN:",
        'elif label not in (FROZEN, "head"):',
        (ADAPTERS,),
    ),
    Mutation(
        "load: another base is no error",
        STORE,
        'if check_base == "error":',
        'if check_base == "never":',
        (ADAPTERS,),
    ),
    Mutation(
        "PEFT import: B is not transposed",
        LAYOUT,
        "b.T.reshape(rank, *outside)",
        "b.reshape(rank, *outside)",
        (PEFT,),
    ),
    Mutation(
        "PEFT import: rank-stabilized scaling is read as the standard one",
        "lora_jax/interop/peft/adapter_config.py",
        "float(alpha / math.sqrt(rank) if rank_stabilized else alpha / rank)",
        "float(alpha / rank)",
        (PEFT,),
    ),
    Mutation(
        "PEFT import: factors of two ranks pass the plan",
        "lora_jax/interop/peft/read_plan.py",
        "if rank != ranks_of_b:",
        "if rank < 0:",
        (HOSTILE, PEFT),
    ),
    Mutation(
        "PEFT import: NaN is read",
        "lora_jax/interop/peft/read.py",
        "\n    _require_finite(tensors, file)\n",
        "\n",
        (HOSTILE, PEFT),
    ),
    Mutation(
        "PEFT export: B goes out in another order",
        LAYOUT,
        "np.asarray(pair.b).reshape(pair.rank, -1).T",
        "np.asarray(pair.b).reshape(-1, pair.rank)",
        (PEFT,),
    ),
    Mutation(
        "PEFT export: whole weights are not transposed",
        LAYOUT,
        "np.asarray(array).transpose(self.order).reshape(self.there)",
        "np.asarray(array).reshape(self.there)",
        (PEFT,),
    ),
    Mutation(
        "PEFT export: other ranks are not written",
        WRITE,
        "for module, target in modules.items() if target.rank != rank}",
        "for module, target in modules.items() if target.rank < 0}",
        (PEFT,),
    ),
    Mutation(
        "PEFT export: other alphas are not written",
        WRITE,
        "for module, target in modules.items() if target.alpha != alpha}",
        "for module, target in modules.items() if target.alpha < 0}",
        (PEFT,),
    ),
    Mutation(
        "resume: batches begin anew",
        "lora_jax/training/run/loop.py",
        "run.batches.iterator(self.position)",
        "run.batches.iterator(0)",
        RESUMED,
    ),
    Mutation(
        "resume: what was counted is forgotten",
        "lora_jax/training/run/loop.py",
        'Meter(**progress["meter"]), step',
        "Meter(), step",
        RESUMED,
    ),
    Mutation(
        "resume: the optimizer's state is forgotten",
        "lora_jax/training/run/checkpoint.py",
        'filled(template.optimizer, arrays["optimizer"])',
        "template.optimizer",
        RESUMED,
    ),
    Mutation(
        "resume: every step draws the same dropout",
        "lora_jax/training/run/step.py",
        "key = jax.random.fold_in(key, state.step)",
        "key = jax.random.fold_in(key, 0)",
        ("tests/training/test_step.py",),
    ),
    Mutation(
        "packing: the fullest row in place of the first",
        "lora_jax/training/data/packing.py",
        "int(first[length:].argmin())",
        "int((first[length:] < none).argmax())",
        ("tests/training/test_token_sequences.py",),
    ),
    Mutation(
        "packing: positions run on over the texts of a row",
        CAUSAL,
        "dtype=jnp.int32), slots - first",
        "dtype=jnp.int32), slots + 0 * first",
        ("tests/models/test_segments.py",),
    ),
    Mutation(
        "packing: texts of a row see each other",
        CAUSAL,
        "seen & (segments[:, :, None] == segments[:, None, :])",
        "seen & (segments[:, :, None] == segments[:, :, None])",
        ("tests/models/test_segments.py",),
    ),
    Mutation(
        "mask: padding is attended to",
        CAUSAL,
        "seen if mask is None else seen & mask[:, None, :]",
        "seen",
        ("tests/models/test_decoders.py",),
    ),
    Mutation(
        "mask: the window is one slot too wide",
        CAUSAL,
        "(distance >= 0) & (distance < window)",
        "(distance >= 0) & (distance <= window)",
        ("tests/models/test_decoders.py",),
    ),
    Mutation(
        "mask: the frozen side keeps what is trained",
        MASKS,
        "frozen.append(None if keep else leaf)",
        "frozen.append(leaf)",
        ("tests/test_masks.py",),
    ),
    Mutation(
        "mask: the head is frozen",
        MASKS,
        "labels |= dict.fromkeys(method.head(leaves), HEAD)",
        "labels |= dict.fromkeys(method.head(leaves), FROZEN)",
        ("tests/test_masks.py",),
    ),
    Mutation(
        "choose: merging first pays at half the tokens",
        MATMUL,
        "pays = tokens * (inner + outer) >= 2 * inner * outer",
        "pays = tokens * (inner + outer) >= inner * outer",
        ("tests/test_matmul.py", "tests/test_step_cost.py"),
    ),
    Mutation(
        "choose: merging first on every backend",
        MATMUL,
        'jnp.dtype(dtype) == jnp.float32 and backend == "cpu"',
        "jnp.dtype(dtype) == jnp.float32",
        ("tests/test_matmul.py",),
    ),
    Mutation(
        "choose: less than one row of dev is a difference",
        CHOICE,
        "margin = max(margin, 1 / dev_rows)",
        "margin = min(margin, 1 / dev_rows)",
        (RECOMMEND,),
    ),
    Mutation(
        "choose: the largest within the margin is recommended",
        CHOICE,
        "chosen = min(near, key=",
        "chosen = max(near, key=",
        (RECOMMEND,),
    ),
    Mutation(
        "choose: the worst checkpoint is the adapter",
        "lora_jax/training/run/checkpoint.py",
        "return max(scored)[1] if scored else None",
        "return min(scored)[1] if scored else None",
        ("tests/training/test_checkpoint.py", LOOP, "-k", "best"),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", choices=["quick", "full"], default="quick", help="tier of the tests (default: quick)"
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="checkout to break")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name has this text")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="mutations at a time (default: 1)")
    options = parser.parse_args()
    root = options.root.resolve()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    # An older checkout has one tier.
    quick = options.suite == "quick" and (root / "tests" / "tiers.py").exists()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.jobs):
            copies.put(_copy(root, Path(name) / str(number)))

        def tried(mutation: Mutation) -> Outcome:
            copy = copies.get()
            try:
                outcome = _try(mutation, copy, quick=quick)
            finally:
                copies.put(copy)
            print(f"{'killed  ' if outcome.is_killed else 'SURVIVED'}  {mutation.name:65s} {outcome.seen}", flush=True)
            return outcome

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(tried, chosen))
    killed = sum(outcome.is_killed for outcome in outcomes)
    print(f"\n{killed} of {len(outcomes)} mutations were seen by the tests ({'quick' if quick else 'full'} tier)")
    return int(killed < len(outcomes))


def _copy(root: Path, folder: Path) -> Path:
    """The checkout's tracked files, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def _try(mutation: Mutation, copy: Path, *, quick: bool) -> Outcome:
    file = _find(mutation, copy)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else []), *mutation.tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(text, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    # Tests that can't be collected see a mutation, too; no test at all, or a wrong argument, is a defect here.
    if done.returncode != 0 and not failed:
        raise SystemExit(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr}")
    seen = failed[0].split(" - ")[0].partition(" ")[2] if failed else ""
    return Outcome(mutation, done.returncode != 0, seen)


def _find(mutation: Mutation, copy: Path) -> Path:
    """The file of a mutation; where it doesn't exist, the one file of the library that has its text."""
    file = copy / mutation.file
    files = [file] if file.exists() else sorted((copy / "lora_jax").rglob("*.py"))
    found = [path for path in files if path.read_text(encoding="utf-8").count(mutation.old) == 1]
    if len(found) != 1:
        raise SystemExit(f"{mutation.name}: {len(found)} files have once\n{mutation.old}\nFix scripts/mutations.py.")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
