"""Ten LoRA steps of a language model here, packed, follow PEFT's on transformers' loss, one text a row."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.paths import leaves_by_path
from lora_jax.training import TrainConfig
from lora_jax.training.data.token_sequences import TokenBatch
from lora_jax.training.run.setup import Run, prepare_run
from lora_jax.training.run.step import make_step
from tests.tiny_language import write_language_base, write_pairs

torch = pytest.importorskip("torch", reason="needs PyTorch: `scripts/test --all` installs it")
peft = pytest.importorskip("peft", reason="needs PEFT: `scripts/test --all` installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: `scripts/test --all` installs it")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
STEPS, RATE, DECAY, CLIP = 10, 3e-2, 0.01, 1.0


def unpacked(batch: TokenBatch) -> tuple[Any, Any, Any]:
    """The texts of a batch in rows of their own: ids, mask, and labels with -100 where nothing is asked."""
    texts = []
    for ids, segments, weights in zip(batch.input_ids, batch.segments, batch.weights, strict=True):
        asked = np.concatenate([[0], weights[:-1]]) > 0  # here a label stands at its own token, there one before
        for number in range(1, segments.max() + 1):
            if asked[segments == number].any():
                texts.append((ids[segments == number], asked[segments == number]))
    shape = (len(texts), max(len(ids) for ids, _ in texts))
    ids, mask, labels = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, -100)
    for row, (tokens, asked) in enumerate(texts):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = np.where(asked, tokens, -100)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def peft_losses(base: str, run: Run, batches: list[TokenBatch]) -> list[float]:
    model = transformers.GPT2LMHeadModel.from_pretrained(base, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0
        ),
    )
    start = {}
    for path, leaf in leaves_by_path(run.state.trainable).items():
        if isinstance(leaf, lj.LoRAWeight):
            layer = path.split("/")[1]
            stem = f"base_model.model.transformer.h.{layer}.attn.c_attn"
            start[f"{stem}.lora_A.default.weight"] = torch.tensor(np.asarray(leaf.a))
            start[f"{stem}.lora_B.default.weight"] = torch.tensor(np.asarray(leaf.b).T.copy())
    assert not model.load_state_dict(start, strict=False).unexpected_keys
    assert len(start) == sum(parameter.requires_grad for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    model.train()
    losses = []
    for batch in batches:
        ids, mask, labels = unpacked(batch)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_ten_steps_follow_transformers(tmp_path):
    base = write_language_base(tmp_path / "base", n_layer=2)
    config = TrainConfig(
        task="causal-lm",
        base=base,
        train=write_pairs(tmp_path / "train.jsonl", 60),
        prompt="question",
        completion="answer",
        method={"name": "lora", "rank": 4, "alpha": 8, "targets": ["query_key_value"], "init": "kaiming"},
        max_length=32,
        batch_size=4,
        steps=STEPS,
        lr=RATE,
        weight_decay=DECAY,
        clip_norm=CLIP,
        warmup=0.2,
        dropout=0.0,
        output=str(tmp_path / "out"),
    )
    run = prepare_run(config, lambda event: None)
    batches = [cast(TokenBatch, run.batches.batch(step)) for step in range(STEPS)]
    assert any(batch.segments.max() > 1 for batch in batches), "the rows are packed"
    theirs = peft_losses(base, run, batches)

    step = make_step(run.apply, run.task, run.tx, clip_norm=CLIP, model_dropout=False)
    state, ours = run.state, []
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            state, output = step(state, run.frozen, batch, run.key)
            ours.append(float(output.loss))

    assert theirs[-1] < 0.7 * theirs[0], "the comparison needs losses that move"
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
