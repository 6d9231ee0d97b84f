"""Decoders of 1B and 8B parameters on one GPU: tokens a second, share of the card's peak, memory.

Random weights in bfloat16, 2,048 tokens a sequence, LoRA with r = 16 on all linear layers, AdamW on float32 factors.
PEFT runs transformers' Llama of the same sizes with PyTorch's scaled-dot-product attention. Every row is a process of
its own, which has the card for itself. *Utilization* counts `4 · N` operations a token (`6 · N` in full fine-tuning),
`N` the parameters without the embedding, over the card's dense bfloat16 peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from report import Report

# Dense bfloat16 peaks in TFLOP/s, from the makers' data sheets, by a part of the device's name.
PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L4": 121.0}

SIZES: dict[str, dict[str, int]] = {
    "1B": {"width": 2048, "layers": 20, "heads": 16, "inner": 5632, "vocabulary": 32_000, "length": 2048},
    "8B": {"width": 4096, "layers": 32, "heads": 32, "inner": 14_336, "vocabulary": 32_000, "length": 2048},
    "toy": {"width": 64, "layers": 2, "heads": 2, "inner": 128, "vocabulary": 96, "length": 32},
}
RANK = 16
NOTHING = "nothing_saveable"

# Size, method, who, rematerialization, sequences of a batch.
CASES: list[tuple[str, str, str, str, int]] = [
    ("1B", "LoRA", "lora_jax", "none", 4),
    ("1B", "full", "lora_jax", "none", 4),
    ("1B", "LoRA", "PEFT eager", "none", 4),
    ("1B", "LoRA", "PEFT compiled", "none", 4),
    ("1B", "LoRA", "lora_jax", NOTHING, 8),
    ("1B", "LoRA", "PEFT eager", NOTHING, 8),
    ("8B", "LoRA", "lora_jax", "none", 1),
    ("8B", "LoRA", "PEFT eager", "none", 1),
    ("8B", "LoRA", "PEFT compiled", "none", 1),
    ("8B", "LoRA", "lora_jax", NOTHING, 4),
    ("8B", "LoRA", "PEFT eager", NOTHING, 4),
]
TOY = [("toy", "LoRA", "lora_jax", "none", 2), ("toy", "full", "lora_jax", NOTHING, 2)]


def parameters(width: int, layers: int, inner: int, vocabulary: int, **_: int) -> int:
    """Of everything that multiplies: the layers and the output."""
    return layers * (4 * width**2 + 3 * width * inner) + width * vocabulary


def jax_step(size: dict[str, int], method: str, remat: str, batch: int) -> tuple[Any, Any, str]:
    """A step, the peak of the device's memory, and the device."""
    import jax
    import jax.numpy as jnp
    import workloads

    import lora_jax as lj

    workload = workloads.decoder(**size, batch=batch, dtype=jnp.bfloat16, remat=None if remat == "none" else remat)
    chosen = (
        lj.LoRA(rank=RANK, alpha=RANK, targets="all-linear") if method == "LoRA" else lj.FullFineTune(also_train=())
    )
    candidate = workloads.Candidate(workload, chosen)
    del workload
    device = jax.devices()[0]

    def peak() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    return lambda: jax.block_until_ready(candidate()), peak, device.device_kind


def torch_step(size: dict[str, int], compiled: bool, remat: str, batch: int) -> tuple[Any, Any, str]:
    import peft
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    config = transformers.LlamaConfig(
        hidden_size=size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        intermediate_size=size["inner"],
        vocab_size=size["vocabulary"],
        max_position_embeddings=size["length"],
        use_cache=False,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    if remat != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model = torch.compile(model) if compiled else model
    ids = torch.randint(0, size["vocabulary"], (batch, size["length"]))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if on_gpu else None

    return step, peak, torch.cuda.get_device_name() if on_gpu else "cpu"


def one(size: str, method: str, who: str, remat: str, batch: int, steps: int) -> dict[str, Any]:
    sizes = SIZES[size]
    if who == "lora_jax":
        step, peak, device = jax_step(sizes, method, remat, batch)
    else:
        step, peak, device = torch_step(sizes, who == "PEFT compiled", remat, batch)
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return {"seconds": (time.perf_counter() - start) / steps, "peak": peak(), "device": device}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        size, method, who, remat, batch, steps = sys.argv[2:]
        print(json.dumps(one(size, method, who, remat, int(batch), int(steps))))
        return
    report = Report("gpu", __doc__)
    rows = []
    for case in TOY if report.quick else CASES:
        size, method, who, remat, batch = case
        command = [sys.executable, __file__, "--one", *map(str, case), "2" if report.quick else "10"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        row: dict[str, Any] = {
            "size": size,
            "method": method,
            "library": who,
            "kept of a layer": "all" if remat == "none" else remat,
            "batch": batch,
        }
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append(row | {"note": f"failed: {reason[:150]}"})
            report.show(rows[-1])
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        tokens = batch * SIZES[size]["length"] / result["seconds"]
        operations = tokens * parameters(**SIZES[size]) * (6 if method == "full" else 4)
        card = next((peak for name, peak in PEAKS.items() if name in result["device"]), None)
        rows.append(
            row
            | {
                "step, ms": 1000 * result["seconds"],
                "tokens/s": tokens,
                "TFLOP/s by 4N": operations / 1e12,
                "utilization, %": None if card is None else 100 * operations / 1e12 / card,
                "peak memory, GB": None if result["peak"] is None else result["peak"] / 1e9,
                "device": result["device"],
            }
        )
        report.show(rows[-1])
        report.write(rows)
    report.write(rows)


if __name__ == "__main__":
    main()
