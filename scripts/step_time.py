"""Step times of all methods in one interleaved run: ratios that a busy machine cannot bend.

    scripts/step_time.py --length 32 --rounds 15 --output runs/results/step_time.json

Every round runs each method's training step once, on the same batch of the default base. The *frozen chain* trains the
first normalization and the classifier: no gradient of any other weight, but one through all of them, which is the floor
for methods that train something in every layer.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj

HEAD = ("classifier",)
METHODS: dict[str, lj.Method] = {
    "full fine-tuning": lj.FullFineTune(also_train=HEAD),
    "frozen chain": lj.Frozen(also_train=(*HEAD, "embeddings/norm")),
    "frozen (head only)": lj.Frozen(also_train=HEAD),
    "BitFit": lj.BitFit(also_train=HEAD),
    "LoRA, query and value": lj.LoRA(rank=8, alpha=16, targets=("query", "value"), also_train=HEAD),
    "LoRA, all linear": lj.LoRA(rank=8, alpha=16, targets="all-linear", also_train=HEAD),
}


class Candidate:
    """A method's compiled training step and its state."""

    def __init__(self, model: lj.models.Model, method: lj.Method, batch: tuple[jax.Array, jax.Array]) -> None:
        params = lj.attach(model.params, method, key=jax.random.key(0))
        labels = lj.label_params(params, method)
        self.trainable, self.frozen = lj.partition(params, lj.trainable_mask(params, method))
        tx = lj.make_optimizer(optax.adamw(1e-4), labels)
        apply = lj.adapt(model.apply, on_materialize="error")
        self.state = tx.init(self.trainable)

        def loss(trainable: Any, frozen: Any, ids: jax.Array, classes: jax.Array) -> jax.Array:
            logits = apply(lj.combine(trainable, frozen), ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        @functools.partial(jax.jit, donate_argnames=("trainable", "state"))
        def step(
            trainable: Any, state: Any, frozen: Any, ids: jax.Array, classes: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(trainable, frozen, ids, classes)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        self.batch = batch
        self.step = step.lower(self.trainable, self.state, self.frozen, *batch).compile()
        self.optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        cost, memory = self.step.cost_analysis(), self.step.memory_analysis()
        assert cost, "this backend tells no FLOPs"
        assert memory, "this backend tells no memory"
        self.gflops = cost["flops"] / 1e9
        self.temporary_mb = memory.temp_size_in_bytes / 1e6

    def seconds(self) -> float:
        start = time.perf_counter()
        self.trainable, self.state, value = self.step(self.trainable, self.state, self.frozen, *self.batch)
        jax.block_until_ready((self.trainable, value))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of which the first is not counted (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON for `scripts/results.py`")
    options = parser.parse_args()

    model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=6)
    ids = jax.random.randint(jax.random.key(0), (options.batch_size, options.length), 1000, 20_000)
    batch = ids, jnp.arange(options.batch_size) % 6
    candidates = {name: Candidate(model, method, batch) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(options.rounds):
        for name, candidate in candidates.items():
            seconds = candidate.seconds()
            if number:
                times[name].append(seconds)

    rows = []
    for name, candidate in candidates.items():
        # Ratios round by round, so that a slow moment of the machine hits both sides.
        ratios = {
            other: statistics.median(mine / theirs for mine, theirs in zip(times[name], times[other], strict=True))
            for other in ("full fine-tuning", "frozen chain")
        }
        rows.append(
            {
                "method": name,
                "ms": 1000 * statistics.median(times[name]),
                "of_full": ratios["full fine-tuning"],
                "of_chain": ratios["frozen chain"],
                "gflops": candidate.gflops,
                "temporary_mb": candidate.temporary_mb,
                "optimizer_mb": candidate.optimizer_bytes / 1e6,
            }
        )
        print("{method:24} {ms:7.1f} ms  {of_full:.2f} of full  {of_chain:.2f} of the frozen chain".format(**rows[-1]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        setting = {"batch_size": options.batch_size, "length": options.length, "rounds": options.rounds - 1}
        options.output.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
