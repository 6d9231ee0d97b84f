"""The command's own steps follow PEFT's: pairs of texts, regression, its schedule, its clipping, its batches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.data import path as data_path
from lora_jax.training.config import TrainConfig
from lora_jax.training.data.batching import plan_epoch
from lora_jax.training.run.loop import step_of
from lora_jax.training.run.setup import prepare_run

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    # PEFT still asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, BATCH, RATE, WARMUP = 24, 8, 2e-3, 0.25


def write_pairs(path: Path) -> Path:
    """Messages beside their followers, and five times the share of words that they have in common."""
    texts = [line.split("\t")[0] for line in data_path("train").read_text(encoding="utf-8").splitlines()[1:]]
    lines = ["first\tsecond\tscore"]
    for first, second in itertools.pairwise(texts[: STEPS * BATCH + 1]):
        one, other = set(first.lower().split()), set(second.lower().split())
        lines.append(f"{first}\t{second}\t{5 * len(one & other) / len(one | other):.3f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def their_model(trainable: Any) -> Any:
    """PEFT's, from our start."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        lj.models.find_base(lj.models.DEFAULT_BASE),
        num_labels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for layer, name in itertools.product(range(6), ("query", "value")):
            attention = model.base_model.model.bert.encoder.layer[layer].attention.self
            ours = trainable["encoder"]["layers"][str(layer)]["attention"][name]["kernel"]
            getattr(attention, name).lora_A["default"].weight.copy_(torch.tensor(np.array(ours.a)))
        head = model.base_model.model.classifier.modules_to_save["default"]
        head.weight.copy_(torch.tensor(np.array(trainable["classifier"]["kernel"]).T))
        head.bias.zero_()
    return model.train()


def test_steps_on_pairs_follow_pefts(tmp_path: Path):
    config = TrainConfig(
        train=str(write_pairs(tmp_path / "pairs.tsv")),
        text="first",
        text_pair="second",
        label="score",
        task="regression",
        method={"name": "lora", "rank": 8, "alpha": 16.0, "targets": ["query", "value"], "init": "kaiming"},
        lr=RATE,
        warmup=WARMUP,
        clip_norm=0.3,
        steps=STEPS,
        batch_size=BATCH,
        max_length=64,
        dropout=0.0,
        output=str(tmp_path / "run"),
    )
    run = prepare_run(config, lambda event: None)
    rows, step, state = run.splits["train"], step_of(run), run.state
    model = their_model(state.trainable)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=run.config.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(WARMUP * STEPS), STEPS)

    ours, theirs = [], []
    for plan in plan_epoch(rows.lengths, run.buckets, batch_size=BATCH, seed=config.seed, epoch=0):
        batch: Any = rows.batch(plan, BATCH)
        inputs = {name: torch.tensor(np.asarray(value)).long() for name, value in batch.inputs.items()}
        loss = model(**inputs, labels=torch.tensor(np.asarray(batch.targets))).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        schedule.step()
        theirs.append((loss.item(), norm.item()))
        state, output = step(state, run.frozen, batch, run.key)
        ours.append((float(output.loss), float(output.grad_norm)))

    assert len(ours) == STEPS
    assert min(norm for _, norm in theirs) < config.clip_norm < max(norm for _, norm in theirs)
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
