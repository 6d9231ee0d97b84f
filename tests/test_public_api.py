"""What `import lora_jax` gives, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax as lj

FUNCTIONS = [
    "adapt",
    "attach",
    "combine",
    "count_params",
    "detach",
    "explain",
    "extract_lora",
    "label_params",
    "leaf_paths",
    "load_adapter",
    "make_optimizer",
    "merge_params",
    "partition",
    "save_adapter",
    "trace_weights",
    "trainable_mask",
    "truncate_lora",
    "with_dropout",
]
METHODS = [cls.__name__ for cls in lj.Method.registry.values() if cls.__module__.startswith("lora_jax.methods.")]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_what_is_public_is_documented_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(lj, name)) or ""
    assert ">>>" in text
    assert "TODO" not in text


def test_public_names_have_types() -> None:
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(lj, name))
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name
    assert (Path(lj.__file__).parent / "py.typed").exists()


def test_methods_are_frozen_and_keyword_only() -> None:
    for name in METHODS:
        method = getattr(lj, name)
        kinds = {p.kind for p in inspect.signature(method).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(AttributeError):
        lj.BitFit().targets = "all"  # type: ignore[misc]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora_jax' has no attribute 'Lora'"):
        lj.Lora  # noqa: B018


def test_importing_it_is_light() -> None:
    """An Equinox user needs no Flax; nothing is read, set or computed on import."""
    code = (
        "import sys, os; before = dict(os.environ); import jax; config = jax.config.values.copy(); import lora_jax;"
        "heavy = {'flax', 'orbax', 'datasets', 'grain', 'torch', 'sklearn', 'yaml', 'tokenizers', 'rich'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert os.environ == before; assert jax.config.values == config;"
        "lora_jax.LoRA(rank=1, alpha=1, targets=('x',))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
