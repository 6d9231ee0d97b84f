"""The loop: order, resumption, broken runs, time, folders; on runs that cost nothing; and compiled programs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from lora_jax import files
from lora_jax.study import Comparison, compare, make_candidate
from lora_jax.study.report.page import answer, remarks, write_report
from lora_jax.study.report.tables import quality_table
from lora_jax.study.runs import costs
from lora_jax.study.runs.programs import shared_programs
from lora_jax.training.config import TrainConfig
from lora_jax.training.errors import CheckpointError, ConfigError, DataError, NotFiniteError, RunFolderError
from lora_jax.training.run.loop import train

EVERYTHING = [
    ("BitFit", 0.1, 0),
    ("FullFineTune", 0.1, 0),
    ("BitFit", 0.2, 0),
    ("FullFineTune", 0.2, 0),
    ("BitFit", 0.2, 1),
    ("FullFineTune", 0.2, 1),
]


def rows_of(settings: Comparison) -> list[dict]:
    return [json.loads(line) for line in (Path(settings.output) / "results.jsonl").read_text().splitlines()]


def test_the_whole_grid_in_order(small, fake):
    outcome = compare(small)
    assert fake.ran == EVERYTHING
    assert outcome.left == 0
    assert [(s.rate, s.scores["test"], s.seeds) for s in outcome.summaries] == [(0.2, [0.9, 0.9], [0, 1])] * 2


def test_killed_at_any_run_it_goes_on(small, fake):
    for run in EVERYTHING[1:]:
        fake.errors = {run: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            compare(small)
        assert len(rows_of(small)) == len(fake.ran)
    fake.errors = {}
    compare(small)
    assert fake.ran == EVERYTHING  # none twice
    before = rows_of(small)
    compare(small)
    assert rows_of(small) == before


def test_a_broken_run_is_a_row_and_the_next_begins(small, fake):
    fake.errors = {
        EVERYTHING[0]: NotFiniteError("The loss became nan at step 3", step=3),
        EVERYTHING[3]: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    }
    told = []
    outcome = compare(small, on_progress=told.append)
    assert len(fake.ran) == 4
    assert [row["error"] for row in rows_of(small) if row["error"]] == [
        "NotFiniteError: The loss became nan at step 3",
        "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory",
    ]
    assert [s.rate for s in outcome.summaries] == [0.2, 0.1]
    assert outcome.summaries[0].errors == [(0.1, 0, "NotFiniteError: The loss became nan at step 3")]
    # Not again by itself, but on request.
    fake.errors = {}
    compare(small)
    assert len(fake.ran) == 4
    compare(small, retry_failed=True)
    assert {EVERYTHING[0], EVERYTHING[3]} <= set(fake.ran)


def test_what_the_next_run_would_meet_too_ends_it(small, fake):
    fake.errors = {EVERYTHING[2]: CheckpointError("the disk is full")}
    with pytest.raises(CheckpointError):
        compare(small)
    assert len(rows_of(small)) == 2
    fake.errors = {}
    compare(small)
    assert fake.ran == EVERYTHING


@pytest.mark.parametrize(
    ("minutes", "runs"),
    [(0.01, 1), (0.4, 2), (0.5, 3), (0.99, 5), (1.0, 6)],
    ids=["the first always", "half as much again for what is unknown", "as long as it took", "almost all", "all"],
)
def test_a_run_is_started_only_if_it_fits(small, fake, minutes, runs):
    """Each takes 10 s; what hasn't run is taken for 15 s."""
    small = dataclasses.replace(small, minutes=minutes)
    told = []
    outcome = compare(small, on_progress=told.append, clock=fake.clock)
    assert len(fake.ran) == runs
    assert outcome.left + runs >= len(EVERYTHING)
    assert any("runs remain" in getattr(event, "message", "") for event in told) == bool(outcome.left)
    compare(dataclasses.replace(small, minutes=None))
    assert sorted(set(fake.ran)) == sorted(fake.ran)
    assert set(EVERYTHING) == set(fake.ran)


def test_only_adapters_of_chosen_rates_are_kept(small, fake):
    compare(small)
    runs = Path(small.output) / "runs"
    kept = {path.name.partition("-lr")[2] for path in runs.iterdir()}
    assert kept == {"0.2-seed0", "0.2-seed1"}
    assert not list(runs.glob("*/checkpoints"))
    assert len(list(runs.glob("*/adapter"))) == 4


def test_candidates_and_seeds_may_be_added_later(small, fake):
    compare(small)
    more = dataclasses.replace(
        small, candidates=(*(small.candidates or ()), make_candidate("frozen", rates=[0.1])), seeds=(0, 1, 2)
    )
    outcome = compare(more)
    added = [("Frozen", 0.1, 0), ("Frozen", 0.1, 1)]
    assert fake.ran[6:] == [*added, ("BitFit", 0.2, 2), ("FullFineTune", 0.2, 2), ("Frozen", 0.1, 2)]
    assert [len(s.seeds) for s in outcome.summaries] == [3, 3, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"candidates": (make_candidate({"name": "lora", "targets": ["qurey"]}),)},
            ConfigError,
            r"Candidate 'LoRA r=8, qurey': .*query",
        ),
        (
            {"candidates": (make_candidate("full"), make_candidate("full"))},
            ConfigError,
            "Two candidates are called 'full",
        ),
        (
            {"candidates": (make_candidate("full", label="a"), make_candidate("full", label="b"))},
            ConfigError,
            "'b' is the same as 'a'",
        ),
        ({"train_rows": 61}, ConfigError, "`train_rows` must be .*, got 61"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_run(small, fake, change, error, message):
    with pytest.raises(error, match=message):
        compare(dataclasses.replace(small, **change))
    assert not fake.ran
    assert not Path(small.output).exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epocs": 3}, ConfigError, "'epocs' is no option of a training run; the nearest is 'epochs'"),
        ({"metric": "f1"}, ConfigError, "`metric` is 'f1'"),
        ({"train": "none.tsv"}, DataError, "none.tsv doesn't exist"),
        ({"base": "nowhere/at-all"}, ValueError, "nowhere/at-all"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_run(small, fake, options, error, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=message):
        compare(dataclasses.replace(small, options={**small.options, **options}))
    assert not fake.ran
    assert not Path(small.output).exists()


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_metric_that_is_undefined_compares_nothing(split, small, fake, tmp_path):
    (tmp_path / "one.tsv").write_text("text\tlabel\ngood\tpos\ngreat\tpos\n")
    options = {**small.options, split: str(tmp_path / "one.tsv"), "metric": "matthews"}
    with pytest.raises(
        ConfigError, match=rf"`{split}`: matthews is undefined because all examples have the same target"
    ):
        compare(dataclasses.replace(small, options=options))
    assert not fake.ran


def test_rows_that_are_left_out_are_no_part_of_it(small, fake, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(Path(small.options["train"]).read_bytes() + b"\n\xff\tpos\t1\none field\n")
    mine = dataclasses.replace(small, options={**small.options, "train": str(path)})
    with pytest.raises(DataError, match=r"train.tsv has 2 bad rows"):
        compare(mine)
    told = []
    outcome = compare(
        dataclasses.replace(mine, options={**mine.options, "skip_bad_rows": True}), on_progress=told.append
    )
    assert len(outcome.prepared.splits.examples["train"]) == 60
    assert "train: 2 of 62 rows skipped" in getattr(told[0], "message", "")
    assert any("rain: 2 of 62 rows skipped" in remark for remark in remarks(outcome))


@pytest.mark.parametrize("option", ["skip_bad_rows", "escape_special_tokens"])
def test_a_comparison_from_before_an_option_existed_is_resumed(option, small, fake):
    """The option counts as its default."""
    compare(small)
    path = Path(small.output) / "comparison.json"
    description = json.loads(path.read_text())
    del description["options"][option], description["checksum"]
    path.write_text(json.dumps(description))
    assert compare(small).left == 0
    assert fake.ran == EVERYTHING
    with pytest.raises(RunFolderError, match=rf"`options.{option}` is False there and True here"):
        compare(dataclasses.replace(small, options={**small.options, option: True}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"method": "lora"}}, "`method` can't be given to a comparison"),
        ({"seeds": ()}, r"`seeds` must be .*, got \(\)"),
        ({"seeds": (1, 1)}, "`seeds` must differ"),
        ({"minutes": 0.0}, "`minutes` must be a positive number, got 0.0"),
        ({"preset": "paper"}, "`preset` must be one of paper-lora-targets, .*, got 'paper'"),
        ({"candidates": ()}, "`candidates` must not be empty"),
    ],
)
def test_settings_are_checked_when_they_are_made(change, message):
    with pytest.raises(ConfigError, match=message):
        Comparison(output="out", **change)


def test_a_folder_of_another_comparison_is_refused(small, fake, tmp_path):
    compare(small)
    other = dataclasses.replace(small, options={**small.options, "epochs": 3})
    with pytest.raises(RunFolderError, match=r"holds another comparison: `options.epochs` is 2 there and 3 here"):
        compare(other)
    with pytest.raises(RunFolderError, match="`data_seed` is 0 there and 4 here"):
        compare(dataclasses.replace(small, data_seed=4))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "letter.txt").write_text("dear")
    with pytest.raises(RunFolderError, match=r"holds other files \(letter.txt\)"):
        compare(dataclasses.replace(small, output=str(tmp_path / "held")))


def test_changed_data_is_another_comparison(small, fake, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(Path(small.options["train"]).read_text())
    mine = dataclasses.replace(small, options={**small.options, "train": str(path)})
    compare(mine)
    path.write_text(path.read_text().replace("good", "bad"))
    with pytest.raises(RunFolderError, match=r"`content\.train` is"):
        compare(mine)


def test_slices_take_as_many_steps_as_the_whole(small, fake):
    sliced = make_candidate("full", label="few rows", rates=[0.1], train_rows=20)
    compare(dataclasses.replace(small, candidates=(make_candidate("full", rates=[0.1]), sliced), seeds=(0,)))
    whole, few = (row["config"] for row in rows_of(small))
    assert (few["steps"], few["eval_every"]) == (whole["steps"], whole["eval_every"]) == (8, 4)
    assert few["train"].endswith("train-20.jsonl")
    assert len(Path(few["train"]).read_text().splitlines()) == 20


def test_rates_and_seeds_share_one_program(shared, tmp_path):
    """The second run compiles nothing that it doesn't find."""
    counts: dict[str, int] = {}

    def count(event: str, **_) -> None:
        counts[event] = counts.get(event, 0) + 1

    jax.monitoring.register_event_listener(count)
    try:
        for rate, seed in ((1e-3, 0), (2e-3, 1)):
            counts.clear()
            output = str(tmp_path / f"run-{seed}")
            train(TrainConfig(**shared, method="bitfit", lr=rate, seed=seed, output=output))
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert counts["/jax/compilation_cache/cache_hits"] > 0
    assert "/jax/compilation_cache/cache_misses" not in counts


def test_programs_are_kept_in_the_folder_and_settings_restored(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with shared_programs(tmp_path / "programs"):
            jax.jit(lambda x: x * 3 + 1)(2.0)
        assert list((tmp_path / "programs").iterdir())
        assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        with shared_programs(tmp_path / "unused"):
            pass
        assert not (tmp_path / "unused").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()


def test_scores_no_better_than_one_answer_are_not_recommended(small, fake):
    """Half of the dev rows are `neg`."""
    fake.scores = {0.1: 0.5, 0.2: 0.4}
    outcome = compare(small)
    assert outcome.recommendation is not None
    assert outcome.recommendation.is_withheld
    assert answer(outcome) == (
        "No recommendation",
        "the best on dev, BitFit (accuracy 50.0 ± 0.0), is no better than always answering 'neg' (50.0): they are "
        "tied.",
    )
    quality = quality_table(outcome)
    # Above what is no better than it.
    assert [row[0] for row in quality.rows] == ["always 'neg'", *(s.candidate.label for s in outcome.summaries)]
    assert quality.rows[0][1:3] == ("50.0", "50.0")
    page = write_report(outcome).read_text()
    assert "<strong>No recommendation. </strong>" in page
    assert "Recommended:" not in page
    assert "**No recommendation.** The best on dev" in (Path(small.output) / "report.md").read_text()
    lines = (Path(small.output) / "tables" / "summary.csv").read_text().splitlines()
    assert lines[0].endswith("dev_baseline,test_baseline")
    assert all(line.endswith(",0.5,0.5") for line in lines[1:])


def test_scores_that_are_better_are_recommended(small, fake):
    outcome = compare(small)
    assert outcome.recommendation is not None
    assert not outcome.recommendation.is_withheld
    assert quality_table(outcome).rows[-1][0] == "always 'neg'"


def test_what_looks_wrong_in_the_labels_is_told_at_once_and_in_the_report(small, fake, tmp_path):
    lines = (Path(small.options["train"]).read_text() + "good love\tPos\t1\n").splitlines()
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    told = []
    odd = dataclasses.replace(small, options={**small.options, "train": str(tmp_path / "train.tsv")})
    outcome = compare(odd, on_progress=told.append)
    assert "'Pos' and 'pos'" in getattr(told[0], "message", "")
    assert any("'Pos' and 'pos'" in remark for remark in remarks(outcome))


def test_rows_of_before_have_no_baseline(small, fake):
    compare(small)
    path = Path(small.output) / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("checksum") and row.pop("baselines") == {} for row in rows)  # the runs here are none
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(small).left == 0


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_base_in_its_folder_is_another_comparison(file, small, fake, tmp_path):
    shutil.copytree(small.options["base"], tmp_path / "base")
    mine = dataclasses.replace(small, options={**small.options, "base": str(tmp_path / "base")}, seeds=(0,))
    compare(mine)
    path = tmp_path / "base" / file
    if file == "model.safetensors":
        held = files.read_safetensors(path)
        held["embeddings.word_embeddings.weight"] = held["embeddings.word_embeddings.weight"] * 2
        files.write_safetensors(path, held)
    else:
        path.write_text(path.read_text().replace('"film"', '"movie"').replace("1e-12", "1e-6"))
    part = {"model.safetensors": "weights", "config.json": "configuration", "tokenizer.json": "tokenizer"}[file]
    with pytest.raises(RunFolderError, match=rf"holds another comparison: `base.{part}` is '\w+' there and '\w+' here"):
        compare(mine)
    # One of an earlier version doesn't say its base.
    description = json.loads((Path(mine.output) / "comparison.json").read_text())
    del description["base"], description["checksum"]
    (Path(mine.output) / "comparison.json").write_text(json.dumps(description))
    with pytest.raises(RunFolderError, match=r"the row bitfit\S* belongs to another comparison: its `base` differs"):
        compare(mine)


def test_rows_of_other_data_are_refused(small, fake):
    compare(small)
    path = Path(small.output) / "results.jsonl"
    first, *others = (json.loads(line) for line in path.read_text().splitlines())
    first["content"]["dev"] = "0"
    path.write_text("".join(json.dumps(files.with_checksum(row)) + "\n" for row in (first, *others)))
    with pytest.raises(RunFolderError, match=r"belongs to another comparison: its `content` differs"):
        compare(small)


def test_a_description_that_was_changed(small, fake):
    compare(small)
    path = Path(small.output) / "comparison.json"
    path.write_text(path.read_text().replace('"held_out": null', '"held_out": 0.5'))
    with pytest.raises(files.FileError, match=r"comparison.json isn't what its `checksum` was written for"):
        compare(small)


def test_one_comparison_at_a_time_in_a_folder(small, fake):
    told = []

    def listen(event):
        if not told:
            told.append(event)
            with pytest.raises(RunFolderError, match=r"study is in use by process \d+"):
                compare(small)

    compare(small, on_progress=listen)
    assert told
    assert fake.ran == EVERYTHING


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"a": 1}', '{"checksum": "x"}'])
def test_costs_that_are_not_as_they_were_measured(content, outcome, settings, tmp_path):
    """They are measured anew."""
    path = tmp_path / "costs.json"
    path.write_text((Path(settings.output) / "costs.json").read_text())
    assert costs._read(path)
    path.write_text(content)
    assert costs._read(path) == {}
    path.write_text((Path(settings.output) / "costs.json").read_text().replace('"tokens": ', '"tokens": 1'))
    assert costs._read(path) == {}
