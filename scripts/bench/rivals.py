"""The same LoRA training step in other libraries: same weights, factors, batch, dtype and optimizer.

All linear layers of MiniLM with r = 8, 32 texts of 64 tokens, float32, AdamW, no dropout. Before anything is timed,
every candidate must give the same loss for the same factors, and the same loss after one step.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import linen_bert
import numpy as np
import optax
from report import Report
from timing import interleave

import lora_jax as lj
from lora_jax.weights import is_adapted

RANK, ALPHA, RATE = 8, 16, 1e-4
TARGETS = ("query", "key", "value", "attention/output", "mlp/up", "mlp/down")


class Shared:
    """What every candidate starts from: the base, factors that are not zero, and a batch."""

    def __init__(self, batch: int, length: int) -> None:
        self.model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=6)
        self.method = lj.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear", also_train=("classifier",))
        params = lj.attach(self.model.params, self.method, key=jax.random.key(0))
        rng = np.random.default_rng(0)

        def filled(leaf: Any) -> Any:
            if not isinstance(leaf, lj.LoRAWeight):
                return leaf
            b = jnp.asarray(0.02 * rng.standard_normal(leaf.b.shape, np.float32))
            return lj.LoRAWeight(leaf.base, leaf.a / 8, b, scale=leaf.scale, axes=leaf.axes)

        self.params = jax.tree.map(filled, params, is_leaf=is_adapted)
        self.ids = jax.random.randint(jax.random.key(0), (batch, length), 1000, 20_000)
        self.labels = jnp.arange(batch) % 6
        self.nodes = {
            path: node
            for path, node in zip(
                lj.leaf_paths(self.params), jax.tree.leaves(self.params, is_leaf=is_adapted), strict=True
            )
            if isinstance(node, lj.LoRAWeight)
        }


class JaxCandidate:
    """A step over any function of a trainable and a frozen tree."""

    def __init__(self, shared: Shared, apply: Callable[..., Any], trainable: Any, frozen: Any) -> None:
        tx = optax.adamw(RATE, weight_decay=0.01)

        def loss(trainable: Any, frozen: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            logits = apply(trainable, frozen, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @functools.partial(jax.jit, donate_argnames=("trainable", "state"))
        def step(
            trainable: Any, state: Any, frozen: Any, ids: jax.Array, labels: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(trainable, frozen, ids, labels)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        # Its own copy: steps donate their arguments.
        self.trainable = jax.tree.map(jnp.copy, trainable)
        self.state, self.frozen, self.batch = tx.init(self.trainable), frozen, (shared.ids, shared.labels)
        self.step = step.lower(self.trainable, self.state, self.frozen, *self.batch).compile()

    def __call__(self) -> Any:
        self.trainable, self.state, value = self.step(self.trainable, self.state, self.frozen, *self.batch)
        self.loss = value
        return self.trainable, value

    @property
    def temporary_bytes(self) -> int | None:
        memory = self.step.memory_analysis()
        return memory.temp_size_in_bytes if memory else None


def lora_jax_on(shared: Shared, apply: Callable[..., Any]) -> JaxCandidate:
    trainable, frozen = lj.partition(shared.params, lj.trainable_mask(shared.params, shared.method))
    adapted = lj.adapt(apply, on_materialize="error")
    return JaxCandidate(shared, lambda t, f, ids: adapted(lj.combine(t, f), ids), trainable, frozen)


def lora_jax_bundled(shared: Shared) -> JaxCandidate:
    return lora_jax_on(shared, lambda params, ids: shared.model.apply(params, ids))


def lora_jax_linen(shared: Shared) -> JaxCandidate:
    module = linen_bert.Bert(shared.model.config, 6)
    return lora_jax_on(shared, lambda params, ids: module.apply({"params": params}, ids))


def merged_each_step(shared: Shared) -> JaxCandidate:
    """Plain autodiff through `merge_params`: the gradient of every merged weight is formed."""
    trainable, frozen = lj.partition(shared.params, lj.trainable_mask(shared.params, shared.method))
    apply = shared.model.apply
    return JaxCandidate(shared, lambda t, f, ids: apply(lj.merge_params(lj.combine(t, f)), ids), trainable, frozen)


def textbook(shared: Shared) -> JaxCandidate:
    """Autodiff of `x @ W + scale * (x @ A) @ B` on `(batch, time, d)` activations, written into the Linen model."""
    from flax import linen as nn

    module = linen_bert.Bert(shared.model.config, 6)
    trainable, frozen = lj.partition(shared.params, lj.trainable_mask(shared.params, shared.method))

    def apply(t: Any, f: Any, ids: jax.Array) -> Any:
        whole = lj.combine(t, f)
        leaves = dict(zip(lj.leaf_paths(whole), jax.tree.leaves(whole, is_leaf=is_adapted), strict=True))

        def dense(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            node = leaves.get(f"{path}/kernel")
            if context.method_name != "__call__" or not isinstance(node, lj.LoRAWeight):
                return next_call(*args, **kwargs)
            (x,) = args
            return x @ node.base + node.scale * (x @ node.a.T) @ node.b + leaves[f"{path}/bias"]

        with nn.intercept_methods(dense):
            return module.apply({"params": lj.detach(whole)}, ids)

    return JaxCandidate(shared, apply, trainable, frozen)


def qwix(shared: Shared) -> JaxCandidate:
    """qwix's LoRA on the Linen model."""
    import qwix as library
    from flax import traverse_util

    # A rule matches the module's path, in full.
    rule = library.LoraRule(module_path=r"encoder/layers/.*", rank=RANK, alpha=ALPHA)
    module = linen_bert.Bert(shared.model.config, 6)
    adapted: Any = library.apply_lora_to_model(module, library.LoraProvider([rule]))
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), shared.ids)["params"]
    flat = {}
    base = traverse_util.flatten_dict(lj.detach(shared.params), sep="/")
    for path in traverse_util.flatten_dict(shapes, sep="/"):
        if path.endswith("_lora_a"):
            flat[path] = shared.nodes[path.removesuffix("_lora_a")].a.T
        elif path.endswith("_lora_b"):
            flat[path] = shared.nodes[path.removesuffix("_lora_b")].b
        else:
            flat[path] = base[path]
    trained = {path: leaf for path, leaf in flat.items() if "_lora_" in path or path.startswith("classifier/")}
    factors = sum("_lora_a" in path for path in trained)
    assert factors == len(shared.nodes), f"{factors} of {len(shared.nodes)} weights got factors"
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}

    def apply(t: Any, f: Any, ids: jax.Array) -> jax.Array:
        return adapted.apply({"params": traverse_util.unflatten_dict(t | f, sep="/")}, ids)

    return JaxCandidate(shared, apply, trained, frozen)


class PeftCandidate:
    """PEFT's LoRA on transformers' BERT, in PyTorch."""

    temporary_bytes = None

    def __init__(self, shared: Shared, *, compiled: bool) -> None:
        import peft
        import torch
        import transformers

        folder = lj.models.find_base(lj.models.DEFAULT_BASE)
        config = transformers.AutoConfig.from_pretrained(
            folder, num_labels=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertForSequenceClassification.from_pretrained(folder, config=config)
        modules = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        settings = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=modules)
        model = peft.get_peft_model(model, settings)
        weights = {name: torch.tensor(value) for name, value in self._weights(shared).items()}
        missing = weights.keys() - model.state_dict().keys()
        assert not missing, f"PEFT has no {sorted(missing)[:3]}"
        model.load_state_dict(weights, strict=False)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
        self.model = torch.compile(model) if compiled else model
        self.ids, self.labels = torch.tensor(np.array(shared.ids)), torch.tensor(np.array(shared.labels)).long()

    @staticmethod
    def _weights(shared: Shared) -> dict[str, np.ndarray]:
        names, weights = shared.model.names, {}
        for path, node in shared.nodes.items():
            weights[f"base_model.model.{names[path]}.lora_A.default.weight"] = np.array(node.a)
            weights[f"base_model.model.{names[path]}.lora_B.default.weight"] = np.array(node.b).T
        head = shared.params["classifier"]
        prefix = "base_model.model.classifier.modules_to_save.default"
        return weights | {f"{prefix}.weight": np.array(head["kernel"]).T, f"{prefix}.bias": np.array(head["bias"])}

    def __call__(self) -> Any:
        loss = self.model(input_ids=self.ids, labels=self.labels).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()


CANDIDATES: dict[str, Callable[[Shared], Any]] = {
    "lora_jax": lora_jax_bundled,
    "lora_jax on the Linen model": lora_jax_linen,
    "qwix on the Linen model": qwix,
    "textbook form, autodiff": textbook,
    "merged weight each step, autodiff": merged_each_step,
    "PEFT, PyTorch eager": functools.partial(PeftCandidate, compiled=False),
    "PEFT, torch.compile": functools.partial(PeftCandidate, compiled=True),
}


def main() -> None:
    report = Report("rivals", __doc__)
    shared = Shared(*((4, 16) if report.quick else (32, 64)))
    candidates, failures, rows = {}, {}, []
    for name, build in CANDIDATES.items():
        if report.quick and "compile" in name:  # a minute of it
            continue
        try:
            candidate = build(shared)
            losses = []
            for _ in range(2):
                candidate()
                losses.append(float(candidate.loss))
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{name}: {failures[name]}", flush=True)
            continue
        candidates[name] = candidate
        reference = next(iter(candidates.values())).losses if len(candidates) > 1 else losses
        candidate.losses = losses
        np.testing.assert_allclose(losses, reference, rtol=1e-4, err_msg=f"{name} computes something else")
        print(f"{name}: losses {losses}", flush=True)
    gc.collect()
    times = interleave(candidates, rounds=report.rounds(9), warm_up=1)
    for name, candidate in candidates.items():
        rows.append(
            {
                "candidate": name,
                "step, ms": 1000 * times.median(name),
                "lora_jax / this": times.ratio("lora_jax", name),
                "lora_jax on the Linen model / this": times.ratio("lora_jax on the Linen model", name),
                "temporary MB": None if candidate.temporary_bytes is None else candidate.temporary_bytes / 1e6,
            }
        )
        report.show(rows[-1])
    report.write(rows, failures=failures, peak="temporary memory of PyTorch is not known before it runs")


if __name__ == "__main__":
    main()
