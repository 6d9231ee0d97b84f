"""`lora-jax demo`: everything in a few minutes, on the messages shipped with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax.errors import ArgumentError

from .options import add_base_flag

if TYPE_CHECKING:
    from lora_jax.training import RunResult

NAME = "demo"
USAGE = ""
HELP = "fine-tune, compare, merge and classify on the shipped messages"
DESCRIPTION = """\
On the shipped messages, labelled by what their writer does: fine-tunes with LoRA, shows the frozen base, BitFit and
full fine-tuning beside it, merges the adapter into its base, and classifies three sentences."""
EPILOG = """\
example:
  lora-jax demo --output runs/demo"""

METHODS = ("lora", "frozen", "bitfit", "full")
SENTENCES = (
    "Could you move our call to Thursday afternoon?",
    "The new office chairs are wonderful, my back has never felt better.",
    "I'm so sorry, I sent the wrong invoice to the client.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="Folder of the runs. Default: runs/demo."
    )
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="Epochs of each method. Default: 5.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Seed. Default: 0.")
    add_base_flag(parser)


def run(args: argparse.Namespace) -> None:
    from lora_jax import data
    from lora_jax.training import TrainConfig, train
    from lora_jax.training.config import DEFAULT_BASE
    from lora_jax.training.run.progress import LiveProgress

    output = Path(args.output)
    results: dict[str, RunResult] = {}
    for method in METHODS:
        print(f"\n{method}: fine-tuning on the shipped messages", flush=True)
        config = TrainConfig(
            train=str(data.path("train")),
            dev=str(data.path("dev")),
            test=str(data.path("test")),
            base=getattr(args, "base", DEFAULT_BASE),
            method=method,
            epochs=args.epochs,
            seed=args.seed,
            batch_size=16,
            lr=1e-3 if method == "lora" else None,  # twice the default: there are few steps
            output=str(output / method),
        )
        with LiveProgress() as progress:
            results[method] = train(config, on_progress=progress)
    _show_comparison(results)
    _merge_and_classify(results["lora"], output / "merged")


def _show_comparison(results: dict[str, RunResult]) -> None:
    from lora_jax.training.run.progress import format_bytes

    from .output import print_table

    rows = [
        (
            method,
            f"{100 * (result.metrics['test']['accuracy'] or 0):.1f} %",
            f"{100 * (result.metrics['test']['macro_f1'] or 0):.1f} %",
            f"{result.trainable:,}",
            f"{result.percent:.3g} %",
            f"{result.train_seconds:.0f}",
            format_bytes(result.adapter_bytes),
        )
        for method in ("frozen", "bitfit", "lora", "full")
        for result in [results[method]]
    ]
    if (baseline := results["lora"].baselines.get("test")) is not None:
        accuracy, macro_f1 = (f"{100 * baseline.metrics[name]:.1f} %" for name in ("accuracy", "macro_f1"))
        rows.insert(0, (f"always {baseline.answer}", accuracy, macro_f1, "0", "0 %", "0", "0 B"))
    columns = ("method", "test accuracy", "macro-F1", "trained parameters", "of all", "seconds", "adapter")
    print()
    print_table(columns, rows, title="On the test messages (a demonstration: 96 messages are no evidence of quality)")


def _merge_and_classify(result: RunResult, folder: Path) -> None:
    """Merges the adapter, and holds the merged model's predictions against the adapted one's."""
    import numpy as np

    import lora_jax as lj
    from lora_jax import data
    from lora_jax.inference.classify import Predictor, load_predictor
    from lora_jax.tools.merge import merge_adapter
    from lora_jax.training.data.sources import read_examples
    from lora_jax.training.run.progress import format_bytes

    from .output import print_facts

    if not (folder / "config.json").exists():
        merge_adapter(result.adapter, folder)
    adapted = load_predictor(result.adapter)
    model = lj.models.load(folder, task="classification")
    merged = Predictor(
        model.apply,
        model.params,
        task=adapted.task,
        tokenizer=lj.models.load_tokenizer(folder),
        max_length=adapted.max_length,
    )
    texts = read_examples(str(data.path("test")), text="text").texts
    ours, theirs = adapted.outputs(texts), merged.outputs(texts)
    agree = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    print_facts(
        {
            "adapter": f"{result.adapter} ({format_bytes(result.adapter_bytes)})",
            "merged": f"{folder} ({format_bytes((folder / 'model.safetensors').stat().st_size)})",
            "agreement": f"{agree} of {len(texts)} test predictions, logits to {np.abs(ours - theirs).max():.1e}",
        }
    )
    if agree < len(texts):
        raise ArgumentError(f"The merged model disagrees with the adapted one on {len(texts) - agree} test messages.")
    print()
    for sentence, prediction in zip(SENTENCES, merged.predict(SENTENCES), strict=True):
        print(f"{prediction.label:>10}  {100 * (prediction.probability or 0):3.0f} %  {sentence}")
