"""Fifty LoRA steps here follow PEFT's, from the same start, on the same batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.data import path as data_path

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, RATE, DECAY, RANK, ALPHA = 50, 1e-3, 0.01, 8, 16


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [line.split("\t") for line in data_path("train").read_text(encoding="utf-8").splitlines()[1:9]]
    tokenizer = lj.models.load_tokenizer(lj.models.DEFAULT_BASE)
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([row[0] for row in rows])
    names = sorted({row[1] for row in rows})
    labels = np.array([names.index(row[1]) for row in rows])
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded]), labels


def peft_model(modules: list[str]):
    config = transformers.AutoConfig.from_pretrained(
        lj.models.find_base(lj.models.DEFAULT_BASE),
        num_labels=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(
        lj.models.find_base(lj.models.DEFAULT_BASE), config=config
    )
    settings = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=modules,
        init_lora_weights="gaussian",
    )
    return peft.get_peft_model(model, settings)


def peft_losses(model) -> list[float]:
    ids, mask, labels = (torch.tensor(array) for array in batch())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(start: dict[str, np.ndarray], names, params, apply, method) -> list[float]:
    """The same steps from PEFT's start values."""

    def started(path: str, leaf):
        module = names[path]
        if isinstance(leaf, lj.LoRAWeight):
            a = start[f"base_model.model.{module}.lora_A.default.weight"]
            b = start[f"base_model.model.{module}.lora_B.default.weight"]
            return lj.LoRAWeight(leaf.base, jnp.asarray(a), jnp.asarray(b.T), scale=leaf.scale, axes=leaf.axes)
        if path.startswith("classifier/"):
            value = start[
                f"base_model.model.classifier.modules_to_save.default.{'weight' if 'kernel' in path else 'bias'}"
            ]
            return jnp.asarray(value.T)
        return leaf

    paths = lj.leaf_paths(params)
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda node: isinstance(node, lj.LoRAWeight))
    params = jax.tree.unflatten(treedef, [started(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    tx = lj.make_optimizer(optax.adamw(RATE, weight_decay=DECAY), lj.label_params(params, method))
    ids, mask, labels = batch()

    def loss(trainable, frozen):
        logits = lj.adapt(apply, on_materialize="error")(lj.combine(trainable, frozen), ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnames=("trainable", "state"))
    def step(trainable, state, frozen):
        value, grads = jax.value_and_grad(loss)(trainable, frozen)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(STEPS):
        trainable, state, value = step(trainable, state, frozen)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("query", "value"), ["query", "value"]),
        ("all-linear", ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
    ],
    ids=["query and value", "all linear"],
)
def test_fifty_steps_follow_pefts(targets, modules):
    reference = peft_model(modules)
    start = {name: value.detach().numpy().copy() for name, value in reference.state_dict().items()}
    model = lj.models.load(lj.models.DEFAULT_BASE, task="classification", num_labels=8)
    method = lj.LoRA(rank=RANK, alpha=ALPHA, targets=targets, also_train=("classifier",))
    params = lj.attach(model.params, method, key=jax.random.key(0))

    theirs = peft_losses(reference)
    ours = our_losses(start, model.names, params, model.apply, method)

    assert theirs[-1] < 0.2 * theirs[0], "the comparison needs losses that move"
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
