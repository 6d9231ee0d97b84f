"""Two epochs from a file to a metric: `lora-jax train` against a PEFT loop, each in a process of its own.

LoRA with r = 8 on all linear layers of MiniLM, batch 32, texts cut at 64 tokens, AdamW, linear schedule, dropout 0.1.
The PEFT loop pads each batch to its longest text and groups texts by length, as transformers' `group_by_length` does.
One process runs after the other; both keep the memory that they free.

*Waiting* is the share of the second epoch in which the training loop waits for a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from report import ROOT, Report

from lora_jax.data import path as data_path

# As `lora_jax.host_memory.keep_freed_memory`, for a process that does not call it.
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
EPOCHS, BATCH, MAX_LENGTH, RATE = 2, 32, 64, 1e-3


def lora_jax_run(train: str, test: str, text: str, label: str) -> dict[str, Any]:
    start = time.perf_counter()
    from lora_jax.training import TrainConfig
    from lora_jax.training import train as run
    from lora_jax.training.run.events import StepDone

    ends: dict[int, float] = {}

    def listen(event: Any) -> None:
        if isinstance(event, StepDone):
            ends[event.step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            train=train,
            test=test,
            text=text,
            label=label,
            output=f"{folder}/run",
            method={"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
            lr=RATE,
            epochs=EPOCHS,
            batch_size=BATCH,
            max_length=MAX_LENGTH,
            dropout=0.1,
        )
        result = run(config, on_progress=listen)
    whole = time.perf_counter() - start
    last = max(ends)
    second = ends[last] - ends[last // 2]
    return {
        "whole": whole,
        "first": ends[last // 2] - start,
        "second": second,
        "padding": result.padding_share,
        "waiting": result.waiting_share,
        "accuracy": result.metrics["test"]["accuracy"],
    }


def peft_run(train: str, test: str, text: str, label: str) -> dict[str, Any]:
    start = time.perf_counter()
    import csv

    import numpy as np
    import peft
    import torch
    import transformers
    from transformers.trainer_pt_utils import LengthGroupedSampler

    import lora_jax as lj

    def read(path: str) -> tuple[list[str], list[str]]:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row[text] for row in rows], [row[label] for row in rows]

    texts, names = read(train)
    test_texts, test_names = read(test)
    classes = sorted(set(names))
    folder = lj.models.find_base(lj.models.DEFAULT_BASE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(classes))
    modules = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=modules)
    model = peft.get_peft_model(model, settings)

    def encode(texts: list[str], names: list[str]) -> Any:
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [{"input_ids": ids, "labels": classes.index(name)} for ids, name in zip(encoded, names, strict=True)]

    rows, test_rows = encode(texts, names), encode(test_texts, test_names)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    ends, tokens, slots = [], 0, 0
    model.train()
    for epoch in range(EPOCHS):
        sampler = LengthGroupedSampler(
            BATCH,
            lengths=[len(row["input_ids"]) for row in rows],
            generator=torch.Generator().manual_seed(epoch),
        )
        loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, sampler=sampler, collate_fn=collate)
        for batch in loader:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            tokens, slots = tokens + int(batch["attention_mask"].sum()), slots + batch["attention_mask"].numel()
        ends.append(time.perf_counter())
    model.eval()
    right = []
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(test_rows, batch_size=64, collate_fn=collate):
            right.append((model(**batch).logits.argmax(-1) == batch["labels"]).numpy())
    return {
        "whole": time.perf_counter() - start,
        "first": ends[0] - start,
        "second": ends[1] - ends[0],
        "padding": 1 - tokens / slots,
        "waiting": None,
        "accuracy": float(np.concatenate(right).mean()),
    }


RUNS = {"lora_jax": lora_jax_run, "PEFT, PyTorch": peft_run}
DATA = {
    "TREC": ("trec/train.tsv", "trec/test.tsv", "question", "coarse"),
    "SST-2 sentences": ("sst2_sentences/train.tsv", "sst2_sentences/dev.tsv", "sentence", "label"),
}


def in_a_process(name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, *arguments]
    done = subprocess.run(command, env=os.environ | KEEP_FREED_MEMORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--run" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--run", nargs=5)
        name, *arguments = parser.parse_args().run
        print(json.dumps(RUNS[name](*arguments)))
        return
    report = Report("end_to_end", __doc__)
    folder = ROOT.parent / "shared" / "data"
    rows = []
    for title, (train, test, text, label) in DATA.items():
        files = (str(folder / train), str(folder / test), text, label)
        if report.quick:
            files = (str(data_path("dev")), str(data_path("test")), "text", "label")
        results = {name: in_a_process(name, files) for name in RUNS}
        theirs = results["PEFT, PyTorch"]
        with open(files[0], encoding="utf-8") as file:
            count = sum(1 for _ in file) - 1
        for name, result in results.items():
            rows.append(
                {
                    "data": title,
                    "loop": name,
                    "first epoch with start-up, s": result["first"],
                    "second epoch, s": result["second"],
                    "second / PEFT": result["second"] / theirs["second"],
                    "rows/s": count / result["second"],
                    "file to metric, s": result["whole"],
                    "padding, %": 100 * result["padding"],
                    "waiting, %": None if result["waiting"] is None else 100 * result["waiting"],
                    "accuracy, %": 100 * result["accuracy"],
                }
            )
            report.show(rows[-1])
        report.write(rows)


if __name__ == "__main__":
    main()
