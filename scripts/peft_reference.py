"""Scores of PyTorch with PEFT by the recipe of `scripts/results.py`, over seeds: how far one seed may be off.

    scripts/peft_reference.py --tasks trec --methods frozen --seeds 0 1 2

Appends a row a run to `runs/peft_reference.jsonl`; a run that is there already is not done again. Needs what
`scripts/test --all` installs.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

from results import AGAIN, METHODS, TASKS

import lora_jax as lj

EPOCHS, BATCH, MAX_LENGTH, DECAY, WARMUP, CLIP = 4, 32, 64, 0.01, 0.06, 1.0
TARGETS = {
    "lora_qv": ["query", "value"],
    "lora_all": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


def read(path: Path, text: str, label: str) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[text] for row in rows], [row[label] for row in rows]


def prepared(model: Any, method: str) -> Any:
    """The model with the method's parameters trainable, and no others."""
    import peft

    if method in TARGETS:
        settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=TARGETS[method])
        return peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        biases = method == "bitfit" and name.endswith("bias")
        parameter.requires_grad = method == "full" or biases or name.startswith("classifier.")
    return model


def run(task: str, method: str, seed: int, data: Path) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(seed)
    about = TASKS[task]
    columns = dict(zip(about.columns[::2], about.columns[1::2], strict=True))
    text, label = columns["--text"], columns.get("--label", "label")
    texts, names = read(data / about.train, text, label)
    test_texts, test_names = read(data / about.test, text, label)
    classes = sorted(set(names))
    folder = lj.models.find_base(lj.models.DEFAULT_BASE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(classes))
    model = prepared(model, method)

    def encode(texts: list[str], names: list[str]) -> Any:
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [{"input_ids": ids, "labels": classes.index(name)} for ids, name in zip(encoded, names, strict=True)]

    rows, test_rows = encode(texts, names), encode(test_texts, test_names)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = float(METHODS[method].options[-1])
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    scores, start = [], time.perf_counter()
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(test_rows, batch_size=64, collate_fn=collate):
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        scores.append(100 * right / len(test_rows))
    return {
        "task": task,
        "method": method,
        "lr": rate,
        "epochs": EPOCHS,
        "trainable": sum(parameter.numel() for parameter in trained),
        "acc": scores,
        "train_s": time.perf_counter() - start,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    AGAIN.parent.mkdir(parents=True, exist_ok=True)
    lines = AGAIN.read_text().splitlines() if AGAIN.exists() else []
    done = {(row["task"], row["method"], row["seed"]) for row in map(json.loads, lines)}
    for seed in options.seeds:
        for task in options.tasks:
            for method in options.methods:
                if (task, method, seed) in done:
                    continue
                row = run(task, method, seed, options.data)
                with AGAIN.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{task} {method} seed {seed}: {row['acc'][-1]:.1f} in {row['train_s']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
