"""Options: their defaults, their YAML, and the message for each that can't be."""

from __future__ import annotations

import time

import pytest

import lora_jax as lj
from lora_jax.inference.complete import GenerationOptions
from lora_jax.study import Comparison
from lora_jax.training.config import OPTIONS, RunConfig, TrainConfig, resolve
from lora_jax.training.config_file import read_yaml, write_yaml
from lora_jax.training.errors import ConfigError
from lora_jax.training.method_options import make_method, method_options


def config(**options) -> RunConfig:
    """The settled config."""
    return resolve(asked(**options))


def asked(**options) -> TrainConfig:
    return TrainConfig.from_dict({"train": "a.tsv", "output": "out", **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "bitfit", "dev": "b.tsv", "metric": "macro_f1"},
        {"method": {"name": "lora", "rank": 4, "targets": ["query", "value"], "rank_overrides": {"query": 2}}},
        {"method": lj.LoRA(rank=2, alpha=2, targets=r".*/query/kernel", dropout=0.1)},
        {"method": {"name": "lora", "init": "pissa", "freeze_a": True}},
        {"method": "dora", "lora_plus_ratio": 16.0},
        {"method": {"name": "dora", "rank": 4, "alpha_overrides": {"query": 2}}},
        {"method": {"name": "ia3", "targets": ["key", "mlp/down"], "feedforward": ["mlp/down"]}},
        {"method": {"name": "vera", "projection_seed": 3}},
        {"method": {"name": "random-mask", "size": 0.01, "kind": "rows"}},
        {"method": {"name": "adapter", "placement": "pfeiffer", "train_norms": True}},
        {"method": {"name": "prefix", "length": 5, "hidden": None}},
        {"method": {"name": "top-layers", "count": 1, "within": "encoder/layers"}},
        {"lr": {"lora_a": 1e-3, "lora_b": 4e-3, "head": 1e-3}, "clip_norm": None, "task": "regression"},
    ],
)
def test_yaml_gives_the_config_back(options, tmp_path):
    before = config(**options)
    write_yaml(tmp_path / "config.yaml", before)
    after = resolve(TrainConfig.from_dict(read_yaml(tmp_path / "config.yaml")))
    assert after == before
    assert before.differences(after) == {}


def test_yaml_numbers_without_a_point(tmp_path):
    (tmp_path / "c.yaml").write_text("train: a.tsv\noutput: out\nlr: 1e-3\nwarmup: 0\n")
    assert resolve(TrainConfig.from_dict(read_yaml(tmp_path / "c.yaml"))).lr == 1e-3


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ("frozen", 5e-3),
        ("bitfit", 3e-3),
        ({"name": "lora", "targets": ["query", "value"]}, 1e-3),
        ("lora", 5e-4),
        ({"name": "lora", "init": "kaiming"}, 1e-3),
        ("dora", 5e-4),
        ({"name": "lora", "init": "pissa"}, 5e-4),
        ("ia3", 1e-2),
        ("vera", 1e-2),
        ("full", 1e-4),
        ("norms", 3e-3),
        ("top-layers", 1e-4),
        ("random-mask", 3e-3),
        ("adapter", 1e-3),
        ("prefix", 3e-4),
        ({"name": "prefix", "hidden": None}, 1e-2),
        ({"name": "random-subspace", "dimension": 10}, 0.1),
        ({"name": "random-subspace", "dimension": 1000}, 0.095),
        ({"name": "random-subspace", "dimension": 10_000}, 0.03),
    ],
)
def test_learning_rate_follows_the_method(method, rate):
    assert config(method=method).lr == rate
    assert config(method=method, lr=0.5).lr == 0.5


def test_a_direct_prefix_keeps_its_proportion_for_language_models():
    rate = config(method={"name": "prefix", "hidden": None}, task="causal-lm", base="somewhere").lr
    assert rate == pytest.approx(1e-2 / 5)


def test_default_method():
    assert config().method == lj.LoRA(rank=8, alpha=16, targets="all-linear", also_train=("classifier",))
    assert make_method("full") == lj.FullFineTune(also_train=("classifier",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, r"'epoch' is no option of a training run; the nearest is 'epochs'"),
        ({"qqq": 3}, r"'qqq' is no option of a training run\. Known are train, dev"),
        ({"train": None}, r"`train` is missing"),
        ({"text": ""}, r"`text` must be a non-empty string, got ''"),
        ({"dev": 3}, r"`dev` must be a non-empty string, got 3"),
        ({"task": "ranking"}, r"`task` must be one of classification, regression, causal-lm, got 'ranking'"),
        ({"pooling": "last"}, r"`pooling` must be one of first, mean, got 'last'"),
        ({"schedule": "step"}, r"`schedule` must be one of linear, cosine, constant, got 'step'"),
        ({"dtype": "int8"}, r"`dtype` must be one of float32, bfloat16, got 'int8'"),
        ({"tensorboard": 1}, r"`tensorboard` must be one of True, False, got 1"),
        ({"epochs": 0}, r"`epochs` must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, r"`epochs` must be an integer of at least 1, got 1\.5"),
        ({"batch_size": True}, r"`batch_size` must be an integer of at least 1, got True"),
        ({"steps": 0}, r"`steps` must be an integer of at least 1, got 0"),
        ({"max_length": 2}, r"`max_length` must be an integer of at least 4, got 2"),
        ({"seed": -1}, r"`seed` must be an integer of at least 0, got -1"),
        ({"seed": 2**63}, r"`seed` must be an integer below 2\*\*63, got 9223372036854775808"),
        ({"seed": 10**30}, r"`seed` must be an integer below 2\*\*63, got 1000000000000000000000000000000"),
        ({"skip_bad_rows": "yes"}, r"`skip_bad_rows` must be one of True, False, got 'yes'"),
        ({"accumulate": 3}, r"`accumulate` must divide `batch_size` 32, got 3"),
        (
            {"remat": "some"},
            r"`remat` must be one of nothing_saveable, dots_saveable, dots_with_no_batch_dims_saveable, got 'some'",
        ),
        ({"lr": "fast"}, r"`lr` must be a number of at least 0, got 'fast'"),
        ({"lr": float("nan")}, r"`lr` must be a number of at least 0, got nan"),
        ({"lr": {"head": -1}}, r"`lr` must be a number of at least 0, got -1 for 'head'"),
        ({"lora_plus_ratio": -1}, r"`lora_plus_ratio` must be a number of at least 0, got -1"),
        ({"lora_plus_ratio": 0}, r"`lora_plus_ratio` must be above 0, got 0: B starts at zero"),
        ({"lora_plus_ratio": 4, "method": "bitfit"}, r"`lora_plus_ratio` .*, and bitfit doesn't train both"),
        (
            {"lora_plus_ratio": 4, "method": {"name": "lora", "freeze_a": True}},
            r"`lora_plus_ratio` .*, and lora with `freeze_a` doesn't train both",
        ),
        (
            {"lora_plus_ratio": 4, "lr": {"lora_a": 1e-3, "lora_b": 1e-3, "head": 1e-3}},
            r"`lora_plus_ratio` multiplies a single `lr`, and there is one per label",
        ),
        ({"dropout": 1.0}, r"`dropout` must be a number of at least 0 and below 1, got 1\.0"),
        ({"warmup": 2}, r"`warmup` must be a number of at least 0 and below 1, got 2"),
        ({"clip_norm": 0}, r"`clip_norm` must be above 0, got 0"),
        ({"method": "lroa"}, r"`method` must be one of adapter, bitfit, .*, got 'lroa'; the nearest is `lora`"),
        ({"method": 3}, r"`method` must be a method with a name, one of adapter, .*, got a int"),
        ({"method": {"name": "bitfit", "rank": 4}}, r"`rank` is no option of bitfit.*also_train, targets"),
        ({"method": {"name": "lora", "ranks": 4}}, r"`ranks` is no option of lora; the nearest is `rank`"),
        ({"method": {"name": "lora", "rank": 0}}, r"`rank` must be a positive integer, got 0"),
        ({"method": {"name": "lora", "rank": -2}}, r"`rank` must be a positive integer, got -2"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_seeds_that_jax_takes():
    assert config(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"`seeds` must be an integer below 2\*\*63, got 9223372036854775808"):
        Comparison(output="out", seeds=(0, 2**63))
    with pytest.raises(ConfigError, match=r"`seed` must be an integer below 2\*\*63, got 9223372036854775808"):
        GenerationOptions(seed=2**63)


def test_functions_have_no_yaml():
    method = lj.LoRA(rank=1, alpha=1, targets=lambda path, leaf: True)
    with pytest.raises(ConfigError, match=r"`targets` is a function, which a file can't hold"):
        method_options(method)


def test_differences_leave_out_how_it_is_shown():
    assert config().differences(config(log_every=1, tensorboard=True)) == {}
    found = config().differences(config(seed=1, method={"name": "lora", "rank": 4}))
    assert found == {"seed": (0, 1), "method.rank": (8, 4)}


BOMB = "bomb: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"c\.yaml doesn't exist"),
        ("train: [", r"c\.yaml can't be read as YAML"),
        ("- train", r"c\.yaml must hold options"),
        ("x: !!python/object/apply:os.system ['true']", r"can't be read as YAML: could not determine a constructor"),
        (BOMB, r"aliases that repeat more than 20,000 values, line 5, column 5"),
        ("train: &a [*a]", r"an alias that contains itself, line 1"),
        ("train: " + "[" * 100_000, r"nested more than 50 levels deep, line 1"),
        ("train: " + "{a: " * 100 + "}" * 100, r"nested more than 50 levels deep, line 1"),
        ("- " * 100_000, r"nested more than 50 levels deep, line 1"),
        ("train: [" + "1," * 30_000 + "]", r"more than 20,000 values, line 1"),
        ("train: 2001-99-99", r"`2001-99-99` is no timestamp \(month must be in 1\.\.12\), line 1, column 8"),
        ("train: !!int abc", r"`abc` is no int \(invalid literal .*, line 1, column 8"),
        ("train: !!float abc", r"`abc` is no float"),
        ("train: !!bool abc", r"`abc` is no bool"),
        ("train: !!timestamp abc", r"`abc` is no timestamp"),
        ("seed: " + "7" * 5_000, r"`7+ … 7+` is no int \(Exceeds the limit"),
        ("seed: 0x" + "f" * 5_000, r"a whole number of 20,000 bits, line 1"),
        ("seed: 1" + ":59" * 3_000, r"a whole number of [\d,]+ bits, line 1"),
        ("1: data.tsv", r"`1` stands where a name is expected: put it in quotes, if it is one, line 1, column 1"),
        ("yes: data.tsv", r"`yes` stands where a name is expected"),
        ("~: data.tsv", r"`~` stands where a name is expected"),
        ("? [a, b]\n: c", r"a list or a mapping stands where a name is expected"),
        ("train: a\nseed: 1\ntrain: b", r"`train` is there twice: leave one out, line 3, column 1"),
        ("method: {name: lora, rank: 4, rank: 8}", r"`rank` is there twice: leave one out, line 1, column 31"),
        ("train: 'a\0b'", r"can't be read as YAML: unacceptable character"),
        ("train: " + "x" * 2**20, r"c\.yaml has 1,048,583 bytes, and a file of at most 1,048,576 is expected"),
    ],
)
def test_bad_yaml(content, message, tmp_path):
    started = time.monotonic()
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "c.yaml")
    assert time.monotonic() - started < 10


def test_aliases_and_merged_mappings_are_read_as_they_are_meant(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "usual: &usual {name: lora, rank: 4}\nmethod:\n  <<: *usual\n  rank: 8\nother: *usual\n'1': 2\n"
    )
    usual = {"name": "lora", "rank": 4}
    assert read_yaml(tmp_path / "c.yaml") == {"usual": usual, "method": usual | {"rank": 8}, "other": usual, "1": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x" * 100_000: 1}, r"'x+ … x+' is no option of a training run"),
        ({"method": ["lora"]}, r"`method` is a list|`method` can't|`method`"),
        ({"method": {"name": ["lora"]}}, r"`method` must be one of adapter, .*, got \['lora'\]"),
        ({"method": {"name": "lora", "rank": 0}}, r"`method` lora: `rank` must be"),
        ({"method": {"name": "lora", "alpha": float("nan")}}, r"`method` lora: `alpha` must be a positive number"),
        ({"task": "x" * 100_000}, r"`task` must be one of .*, got 'x+"),
    ],
)
def test_options_from_a_file_are_refused_in_a_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_dict({"train": "a.tsv", "output": "out", **options})
    assert len(str(caught.value)) < 1_500


def test_what_was_asked_stays_as_it_was_given():
    given = {"train": "a", "output": "b", "method": "bitfit", "warmup": 0, "lr": {"bias": 1, "head": 2}}
    before = TrainConfig(**given)
    settled = resolve(before)
    assert {name: getattr(before, name) for name in given} == given
    assert (before.max_length, settled.max_length) == (None, 128)
    assert settled.method == lj.BitFit(targets="all", also_train=("classifier",))
    assert settled.lr == {"bias": 1.0, "head": 2.0}
    assert resolve(settled) is settled
    assert resolve(TrainConfig.from_dict(settled.to_dict())) == settled


def test_every_option_is_described_at_its_field():
    for option in OPTIONS.values():
        text = option.describe()
        assert text[0].isupper()
        assert text.endswith(".")
        assert f"{option.name}: {text}" in (TrainConfig.__doc__ or "")
    assert OPTIONS["lr"].about.shown == "the method's, 5e-4 for lora and 1e-4 for full"
    assert (config().lr, config(method="full").lr) == (5e-4, 1e-4)
