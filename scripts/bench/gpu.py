"""The bundled Llama on one GPU: tokens a second, share of the card's peak, memory; beside PEFT and transformers.

LoRA with r = 16 on all linear layers of Llama 3's shapes (1B and 8B, vocabulary 128,256, random weights in bfloat16),
AdamW on float32 factors, the step that `lora-jax train` runs. Every row is a process of its own, which has the card for
itself; its time is the median of the steps after a warm-up, each waited for. *Utilization* counts `4 · N` operations a
token, `N` all parameters of the base, over the card's dense bfloat16 peak: what NVIDIA's published figures count.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from report import QUICK_RESULTS, RESULTS, Report, shown

# Dense bfloat16 peaks in TFLOP/s, from the makers' data sheets, by a part of the device's name.
PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L4": 121.0}
RANK = 16
WARM_UP, STEPS = 3, 12
NOTHING = "nothing_saveable"

# Sizes of Llama 3.2 1B and Llama 3 8B, under their names in `config.json`.
SIZES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "toy": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        size: a name in `SIZES`.
        batch, length: sequences of a step, tokens of each.
        library: `"lora_jax"`, `"PEFT eager"` or `"PEFT compiled"`.
        remat: what of a layer is kept for the backward pass: a `Remat`, or `"all"`. PyTorch knows `"all"` and nothing.
        settings: of the row alone, see `jax_step` and `torch_step`.
        flags: for the compiler, as `XLA_FLAGS` has them.
    """

    size: str
    batch: int
    length: int
    library: str = "lora_jax"
    remat: str = NOTHING
    settings: Mapping[str, Any] = {}
    flags: str = ""

    @property
    def name(self) -> str:
        own = "".join(f", {key} {value}" for key, value in self.settings.items())
        flags = f", {self.flags}" if self.flags else ""
        return f"{self.size}, {self.batch} × {self.length:,}, {self.library}, keeps {self.remat}{own}{flags}"


CASES: list[Case] = [
    Case("8B", 2, 4096),
    Case("8B", 2, 4096, "PEFT eager"),
    Case("8B", 1, 2048),
    Case("8B", 1, 2048, "PEFT eager"),
    Case("1B", 2, 4096),
    Case("1B", 2, 4096, "PEFT eager"),
    Case("1B", 1, 2048),
    Case("1B", 1, 2048, "PEFT eager"),
    Case("1B", 1, 2048, remat="all"),
    Case("1B", 1, 2048, "PEFT eager", remat="all"),
]
TOY = [Case("toy", 2, 32), Case("toy", 2, 32, remat="all", settings={"scan": False})]


class Candidate(NamedTuple):
    """Something to be timed.

    Attributes:
        step: does one, and waits for it.
        peak: the most bytes of the device's memory taken so far.
        device: its name.
        parameters: of the base.
        compiled: what the compiler says of the step's memory, by name.
    """

    step: Callable[[], float]
    peak: Callable[[], int | None]
    device: str
    parameters: int
    compiled: dict[str, int]


def jax_step(case: Case) -> Candidate:
    """`lora-jax train`'s step.

    Settings: `scan`, whether the layers are scanned (true if left out); `texts`, of a row (one if left out);
    `attention`, see `lj.models.load`.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import lora_jax as lj
    from lora_jax.models import LlamaConfig
    from lora_jax.models.model import skeleton
    from lora_jax.training.data.token_sequences import SingleTextBatch, TokenBatch
    from lora_jax.training.run.step import TrainState, make_step
    from lora_jax.training.task import CausalLM

    scan = case.settings.get("scan", True)
    config = LlamaConfig(**SIZES[case.size])
    options: Any = {"remat": None if case.remat == "all" else case.remat, "scan_layers": scan}
    options["attention"] = case.settings.get("attention", "auto")
    model = skeleton(config, task="causal-lm", dtype=jnp.dtype(jnp.bfloat16), **options)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), hash(name) % 2**31)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    os.environ.setdefault("PYTHONHASHSEED", "0")
    # One leaf after the other: random bits of a stack of layers take more memory than the stack.
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.jit(lambda: draw(path, leaf))(), model.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    shape = (case.batch, case.length)
    ids = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    method = lj.LoRA(rank=RANK, alpha=RANK, targets="all-linear")
    uses = lj.trace_weights(model.apply, model.params, jax.ShapeDtypeStruct(shape, ids.dtype)) if scan else None
    params = lj.attach(params, method, key=jax.random.key(2), uses=uses)
    trainable, frozen = lj.partition(params, lj.trainable_mask(params, method))
    del params
    tx = lj.make_optimizer(optax.adamw(1e-4), lj.label_params(lj.combine(trainable, frozen), method))
    state = TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32))
    texts = case.settings.get("texts", 1)
    batch = (TokenBatch if texts > 1 else SingleTextBatch)(
        input_ids=cast(Any, ids),
        segments=cast(Any, jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32) * texts // case.length, shape)),
        targets=cast(Any, jnp.roll(ids, -1, axis=1)),
        weights=cast(Any, jnp.ones(shape, jnp.float32)),
    )
    run = make_step(lj.adapt(model.apply), CausalLM(), tx, clip_norm=1.0)
    key = jax.random.key(3)
    lowered = run.lower(state, frozen, batch, key)
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    held = [state]

    def step() -> float:
        held[0], output = compiled(held[0], frozen, batch, key)
        return float(output.loss)

    device = jax.devices()[0]
    return Candidate(
        step,
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
        device.device_kind,
        count,
        {"temporary": analysis.temp_size_in_bytes, "arguments": analysis.argument_size_in_bytes} if analysis else {},
    )


def torch_step(case: Case) -> Candidate:
    """PEFT on transformers' Llama with PyTorch's scaled-dot-product attention.

    Settings: `chunk`, tokens whose logits are there at once, formed again in the backward pass; transformers' own loss
    if left out.
    """
    import peft
    import torch
    import torch.utils.checkpoint
    import transformers

    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    config = transformers.LlamaConfig(**SIZES[case.size], use_cache=False)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    count = model.num_parameters()
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    if case.remat != "all":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    ids = torch.randint(0, config.vocab_size, (case.batch, case.length))
    compile_ = torch.compile if case.library == "PEFT compiled" else lambda module: module
    chunk = case.settings.get("chunk")
    if chunk is None:
        whole = compile_(model)

        def loss_of() -> Any:
            return whole(input_ids=ids, labels=ids).loss
    else:
        inner = model.get_base_model()
        backbone, head = compile_(inner.model), inner.lm_head.weight
        targets = torch.roll(ids, -1, 1).reshape(-1)

        def part(hidden: Any, wanted: Any) -> Any:
            return torch.nn.functional.cross_entropy((hidden @ head.T).float(), wanted, reduction="sum")

        part_ = compile_(part)

        def loss_of() -> Any:
            hidden = backbone(input_ids=ids).last_hidden_state.reshape(ids.numel(), -1)
            parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
            sums = [torch.utils.checkpoint.checkpoint(part_, *pair, use_reentrant=False) for pair in parts]
            return torch.stack(sums).sum() / ids.numel()

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Candidate(
        step,
        lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
        torch.cuda.get_device_name() if on_gpu else "cpu",
        count,
        {},
    )


def one(case: Case, steps: int, profile: Path | None) -> dict[str, Any]:
    """A row's figures, in the process that is its own."""
    start = time.perf_counter()
    candidate = (jax_step if case.library == "lora_jax" else torch_step)(case)
    losses = [candidate.step() for _ in range(WARM_UP)]
    ready = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(candidate.step())
        seconds.append(time.perf_counter() - start)
    result = {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "ready": ready,
        "peak": candidate.peak(),
        "device": candidate.device,
        "parameters": candidate.parameters,
        "compiled": candidate.compiled,
        "losses": [losses[0], losses[-1]],
    }
    if profile is not None and case.library == "lora_jax":
        try:
            result["kernels"] = kernels(candidate.step, profile)
        except Exception as error:  # the figures are there already
            result["kernels"] = {"failed": str(error)[:200]}
    return result


def kernels(step: Callable[[], float], folder: Path, most: int = 40) -> dict[str, Any]:
    """Milliseconds a step of the GPU's kernels, by name, the longest first."""
    import jax

    with jax.profiler.trace(str(folder)):
        step()
    (found,) = sorted(folder.rglob("*.xplane.pb"))[-1:]
    data = jax.profiler.ProfileData.from_file(str(found))
    totals: dict[str, list[float]] = {}
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                entry = totals.setdefault(event.name[:160], [0.0, 0])
                entry[0] += event.duration_ns / 1e6
                entry[1] += 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])
    return {
        "total": sum(entry[0] for entry in totals.values()),
        "longest": [[name, round(ms, 3), number] for name, (ms, number) in longest[:most]],
    }


def ceiling() -> dict[str, Any]:
    """The card's own rates: bfloat16 matrix products in TFLOP/s, random numbers, and a copy in TB/s."""
    import jax
    import jax.numpy as jnp

    rates: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    shapes = {
        "8192 × 8192 × 8192": (8192, 8192, 8192),
        "8B's up, 8192 tokens": (8192, 4096, 14_336),
        "8B's query, 8192 tokens": (8192, 4096, 4096),
        "1B's up, 8192 tokens": (8192, 2048, 8192),
        "8B's head, 256 tokens": (256, 4096, 128_256),
        "8B's head, 1024 tokens": (1024, 4096, 128_256),
        "8B's head, 4096 tokens": (4096, 4096, 128_256),
        "8B's up, low rank, 8192 tokens": (8192, 4096, 16),
        "8B's up, from low rank, 8192 tokens": (8192, 16, 14_336),
    }
    small = jax.devices()[0].platform == "cpu"
    for name, sizes in shapes.items():
        m, k, n = (max(size // 64, 1) for size in sizes) if small else sizes
        x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(1), (k, n), jnp.bfloat16)
        seconds = _timed(jax.jit(jnp.matmul), x, w)
        rates[name] = 2 * m * k * n / seconds / 1e12
        rates[f"{name}, ms"] = 1000 * seconds
    large = jnp.ones((2**20 if small else 2**30,), jnp.float32)
    seconds = _timed(jax.jit(lambda array: array + 1), large)
    rates["copy, TB/s"] = 2 * large.nbytes / seconds / 1e12
    return rates


def _timed(function: Callable[..., Any], *arguments: Any, calls: int = 20, rounds: int = 5) -> float:
    import jax

    for _ in range(3):
        jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)][-1])
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def run_alone(arguments: list[str], *, flags: str, limit: float, log: Path) -> tuple[dict[str, Any] | None, str]:
    """What a process of its own prints last, as JSON; or why there is nothing."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "PYTHONHASHSEED": "0"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, f"not finished in {limit:.0f} s"
    if process.returncode:
        lines = log.read_text().strip().splitlines() or ["no message"]
        telling = [line for line in lines if re.search(r"Error|RESOURCE_EXHAUSTED|out of memory", line)]
        return None, f"failed: {(telling or lines)[-1][:200]}"
    return json.loads(output.splitlines()[-1]), ""


def row_of(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    tokens = case.batch * case.length / result["seconds"]
    operations = 4 * result["parameters"] * tokens / 1e12
    card = next((peak for name, peak in PEAKS.items() if name in result["device"]), None)
    gigabyte = 1e9
    return {
        "tokens/s": tokens,
        "step, ms": 1000 * result["seconds"],
        "fastest, slowest": [1000 * seconds for seconds in result["spread"]],
        "utilization, %": None if card is None else 100 * operations / card,
        "peak memory, GB": None if result["peak"] is None else result["peak"] / gigabyte,
        "temporary, GB": result["compiled"].get("temporary", 0) / gigabyte or None,
        "start to first steps, s": result["ready"],
        "first and last loss": result["losses"],
        "device": result["device"],
        **({"kernels": result["kernels"]} if "kernels" in result else {}),
    }


PUBLISHED = [
    ("Llama-3-8B LoRA, 2 × 4,096 tokens", "NeMo AutoModel, one H100", "12,473 tokens/s, 40.6 %"),
    ("Qwen2.5-7B LoRA, 2 × 4,096 tokens", "NeMo AutoModel, one H100", "14,110 tokens/s, 42.8 %"),
]


FOUND = """\
## Where the time goes

Of the 568 ms that the kernels of an 8B step take (2 × 4,096 tokens, `products_saveable`), the large matmuls take 319,
fused attention 70, copies of a scanned layer's weights and writes of what is kept 42, the thin products of the
factors 38, and the rest is elementwise. A packed row's segments reach cuDNN as one array of (time, time) for all
heads, which doubles the attention.

## How far these rows go

Each is a process of its own. The first row of the fused code is the fastest of the settings listed there; repeated
twice, on later code, it gave 45.7 % and 45.5 %. PEFT kept nothing of a layer in every row, so its like is our row that
keeps nothing (11,415 tokens/s): 2.0 times PEFT eager, and 1.5 times PEFT compiled with a loss in chunks. With
`products_saveable` it is 2.4 and 1.9 times, for twice the memory. PEFT ran without autocast: its factors are float32,
and so are the products with them, which costs it time that bfloat16 autocast would save. Not run: PEFT keeping
everything, layers without a scan, 1B without rematerialization, and a TPU.
"""


def page() -> str:
    """`docs/gpu.md`, from what the runs left."""
    lines = ["# On a GPU", "", *(__doc__ or "").split("\n\n", 1)[1].strip().splitlines(), ""]
    for name in ("before", "after", "peft", "gpu"):
        path = RESULTS / "gpu" / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
        lines += [f"## {content['about'].splitlines()[0].rstrip('.')}", ""]
        lines += [f"{content['machine']['device']}, commit {content['commit']}, {content['date']}; {versions}.", ""]
        if content.get("ceiling"):
            rate, copy = content["ceiling"]["8192 × 8192 × 8192"], content["ceiling"]["copy, TB/s"]
            lines += [f"The card's own rates: {rate:.0f} TFLOP/s in a bfloat16 matmul, {copy:.2f} TB/s in a copy.", ""]
        columns = ["tokens/s", "step, ms", "utilization, %", "peak memory, GB", "start to first steps, s"]
        heads = ["model", "batch", "library", "kept of a layer", "settings", *columns, "note"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in content["rows"]:
            cells = [row["size"], f"{row['batch']} × {row['length']:,}", row["library"], row["kept of a layer"]]
            cells += [f"`{row['settings']}`" if row["settings"] else ""]
            cells += [shown(row.get(column)) for column in columns] + [row.get("note", "")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Published", "", "| run | by | figure |", "|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in PUBLISHED]
    lines += ["", *FOUND.splitlines(), ""]
    lines += ["Written by `scripts/bench/gpu.py --page` from `docs/benchmarks/gpu`; without `--page` it measures.", ""]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        case = Case(**json.loads(sys.argv[2]))
        print(json.dumps(one(case, int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)))
        return
    if len(sys.argv) > 1 and sys.argv[1] == "--ceiling":
        print(json.dumps(ceiling()))
        return
    if sys.argv[1:] == ["--page"]:
        (RESULTS.parent / "gpu.md").write_text(page())
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # the card is for the rows' processes
    report = Report("gpu", __doc__)
    folder = report.options.output or (QUICK_RESULTS if report.quick else RESULTS / "gpu")
    report.options.output = folder
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    limit = float(os.environ.get("GPU_ROW_SECONDS", "200"))
    end = time.monotonic() + float(os.environ.get("GPU_SECONDS", "36000"))
    rates, why = None, ""
    if not os.environ.get("GPU_NO_CEILING"):
        rates, why = run_alone(["--ceiling"], flags="", limit=limit, log=logs / "ceiling.log")
    print(rates or why, flush=True)
    rows: list[dict[str, Any]] = []
    cases = TOY if report.quick else CASES
    if chosen := os.environ.get("GPU_CASES"):
        cases = [Case(**entry) for entry in json.loads(Path(chosen).read_text())]
    for number, case in enumerate(cases):
        row: dict[str, Any] = {
            "size": case.size,
            "batch": case.batch,
            "length": case.length,
            "library": case.library,
            "kept of a layer": case.remat,
            "settings": ", ".join([*(f"{key} {value}" for key, value in case.settings.items()), case.flags]).strip(
                ", "
            ),
        }
        remaining = min(limit, end - time.monotonic())
        if remaining < 20:
            result, why = None, "not run: no time was left"
        else:
            asked = ["--one", json.dumps(case._asdict()), str(2 if report.quick else STEPS)]
            profile = [str(logs / f"profile-{number}")] if os.environ.get("GPU_PROFILE") else []
            result, why = run_alone(asked + profile, flags=case.flags, limit=remaining, log=logs / f"{number}.log")
        rows.append(row | ({"note": why} if result is None else row_of(case, result)))
        report.show({key: value for key, value in rows[-1].items() if key != "kernels"})
        report.write(rows, ceiling=rates)


if __name__ == "__main__":
    main()
