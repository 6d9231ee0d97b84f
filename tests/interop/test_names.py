"""Names, keys of pattern tables, and layouts: the parts that PEFT's files are read with."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.interop.layout import leaf_layout
from lora_jax.interop.peft.adapter_config import is_saved
from lora_jax.interop.peft.keys import FactorKey, LeafKey, factor_key, leaf_key, parse_key
from lora_jax.interop.peft.patterns import PatternError, Patterns, literal

MODULES = ["a", "b.a", "c.b.a", "b_a", "ba", "x.1.a", "x.11.a", "x1.a", "a.b", "layer.0.q-proj"]
KEYS = ["a", "b.a", "^a", "^b.a", "b.a$", r"b\.a", r"^b\.a$", "x.1.a", ".", "..a", r"q\-proj", "layer.0.q.proj", "1.a"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_means_what_it_means_to_peft(key: str) -> None:
    for module in MODULES:
        theirs = re.match(rf"(.*\.)?({key})$", module) is not None
        assert (Patterns([key]).first(module) == key) == theirs, module


@pytest.mark.parametrize(
    "key", ["a*", "a+", "a?", "(a)", "[a]", "a|b", "a{2}", r"\d", r"\w+", "a$b", "a^", "\\", "", "^", "$"]
)
def test_a_key_that_is_more_than_a_name_is_not_run(key: str) -> None:
    with pytest.raises(PatternError, match="is a regular expression"):
        Patterns([key]).first("a")


def test_the_first_key_wins() -> None:
    assert Patterns(["b.a", "a", "(a)+"]).first("b.a") == "b.a"
    assert Patterns(["b.a", "a", "(a)+"]).first("a") == "a"
    with pytest.raises(PatternError, match=r"'\(a\)\+' is a regular expression"):
        Patterns(["b.a", "(a)+"]).first("a")


@pytest.mark.parametrize("module", MODULES)
def test_a_literal_key_means_one_module(module: str) -> None:
    key = literal(module)
    assert [other for other in MODULES if Patterns([key]).first(other)] == [module]
    assert [other for other in MODULES if re.match(rf"(.*\.)?({key})$", other)] == [module]


def test_saved_modules_are_those_that_peft_wraps() -> None:
    """PEFT wraps every module whose name ends with an entry, and so what is in it."""
    modules = [
        "classifier",
        "pre_classifier",
        "classifier.dense",
        "bert.pooler.dense",
        "bert.pooler",
        "class",
        "a.score.b",
    ]
    for entries in ({"classifier"}, {"pooler"}, {"dense"}, {"score", "ier"}, {"bert.pooler.dense"}):
        for module in modules:
            segments = module.split(".")
            above = [".".join(segments[:end]) for end in range(1, len(segments) + 1)]
            theirs = any(name.endswith(entry) for name in above for entry in entries)
            assert is_saved(entries, module) == theirs, (entries, module)


def test_keys_there_and_back() -> None:
    for embedding in (False, True):
        for role in ("a", "b"):
            key = factor_key("x.0.lora_a", role, embedding=embedding)
            assert parse_key(key, "") == FactorKey("x.0.lora_a", role, embedding)
    assert parse_key(leaf_key("x", "bias", wrapped=True), "") == LeafKey("x", "bias", "base_layer")
    assert parse_key(leaf_key("x", "weight"), "") == LeafKey("x", "weight", "")


@pytest.mark.parametrize(
    ("path", "shape", "labels", "there"),
    [
        ("q/kernel", (4, 6), None, (6, 4)),
        ("q/kernel", (4, 2, 3), "ioo", (6, 4)),
        ("o/kernel", (2, 3, 4), "iio", (4, 6)),
        ("q/weight", (6, 4), "oi", (6, 4)),
        ("q/kernel", (2, 4, 3), "oio", (6, 4)),
        ("q/bias", (2, 3), None, (6,)),
        ("norm/scale", (6,), None, (6,)),
        ("e/embedding", (11, 4), None, (11, 4)),
        ("temperature", (), None, ()),
    ],
)
def test_layouts_are_inverted_exactly(
    path: str, shape: tuple[int, ...], labels: str | None, there: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    uses = None if labels is None else {path: lj.Use("dot_general", labels)}
    layout = leaf_layout(path, jnp.asarray(array), uses)
    assert layout.export(array).shape == there
    np.testing.assert_array_equal(layout.restore(layout.export(array)), array)


def test_a_split_kernel_is_the_joined_one() -> None:
    joined = np.arange(24.0).reshape(4, 6)
    layout = leaf_layout("q/kernel", joined.reshape(4, 2, 3), {"q/kernel": lj.Use("dot_general", "ioo")})
    np.testing.assert_array_equal(layout.export(joined.reshape(4, 2, 3)), joined.T)
