"""What every benchmark writes: rows as JSON with the machine, the versions and the commit beside them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from timing import Ratio

from lora_jax.host_memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
QUICK_RESULTS = ROOT / "runs" / "bench-quick"
PACKAGES = ("jax", "flax", "optax", "lora_jax", "torch", "transformers", "peft", "qwix")


class Report:
    """One benchmark's options, its rows and their file.

    Args:
        name: of the benchmark and its file.
        about: what the benchmark measures, for the page.
    """

    def __init__(self, name: str, about: str | None):
        self.name, self.about = name, (about or "").strip()
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="toy sizes and one round: does it run?")
        parser.add_argument(
            "--output", type=Path, help="folder of the JSON (default: docs/benchmarks, or runs/bench-quick)"
        )
        self.options = parser.parse_args()
        keep_freed_memory()  # as `lora-jax` does; for every candidate in the process

    @property
    def quick(self) -> bool:
        return self.options.quick

    def rounds(self, number: int) -> int:
        return 1 if self.quick else number

    def show(self, row: dict[str, Any]) -> None:
        print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)

    def write(self, rows: list[dict[str, Any]], **about: Any) -> None:
        folder = self.options.output or (QUICK_RESULTS if self.quick else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, "about": self.about, "quick": self.quick, **machine(), **about, "rows": rows}
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=_plain) + "\n")


def shown(value: Any) -> str:
    if isinstance(value, Ratio):
        return str(value)
    if isinstance(value, list) and len(value) == 3:  # a ratio that was JSON
        return str(Ratio(*value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def machine() -> dict[str, Any]:
    """Where and on what a benchmark ran."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "system": platform.system(),
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str:
    """The code's: what the benchmarks before this one wrote into the documents doesn't make it dirty."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)
