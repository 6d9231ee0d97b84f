"""The rule that chooses, on scores made by hand."""

from __future__ import annotations

import pytest

from lora_jax.study.grid.candidates import make_candidate
from lora_jax.study.runs.recommend import choose
from lora_jax.study.runs.summary import Summary
from lora_jax.training.baseline import Baseline


def summary(label: str, trainable: int, *scores: float) -> Summary:
    return Summary(
        candidate=make_candidate({"name": "lora", "rank": trainable}, label=label, rates=[0.1, 0.2]),
        trainable=trainable,
        percent=trainable / 100,
        rate=0.1 if scores else None,
        tried={0.1: scores[0] if scores else None},
        scores={"dev": list(scores)},
        seeds=list(range(len(scores))),
        errors=[],
        adapter_bytes=None,
        step_ms=None,
        steps=None,
        step_memory=None,
        latency_ms={},
        tokens=None,
    )


def test_the_smallest_within_one_standard_error():
    # The best has mean 0.90 and a standard error of 0.02 / √4 = 0.01.
    best = summary("best", 50, 0.88, 0.92, 0.88, 0.92)
    error = best.standard_error("dev")
    assert error == pytest.approx(0.0231 / 2, abs=1e-4)
    near, far = summary("near", 10, 0.89), summary("far", 1, 0.88)
    found = choose([far, near, best], metric="accuracy", dev_rows=1000)
    assert found is not None
    assert (found.summary, found.best, found.margin, found.within) == (near, best, error, 2)
    assert found.reason == (
        "of the 2 candidates within 1.2 points of the best on dev (best: accuracy 90.0 ± 2.3, 4 seeds), it trains the "
        "fewest parameters: 10 parameters (0.1 %), at 89.0."
    )


def test_one_seed_has_a_stated_margin():
    found = choose([summary("near", 10, 0.891), summary("best", 50, 0.9)], metric="matthews", dev_rows=10)
    assert found is not None
    assert (found.summary.candidate.label, found.margin) == ("near", 0.01)
    found = choose([summary("far", 10, 0.889), summary("best", 50, 0.9)], metric="matthews", dev_rows=10)
    assert found is not None
    assert "it is the best on dev (Matthews correlation 90.0, one seed), none of the others" in found.reason


def test_the_margin_is_never_less_than_one_dev_row():
    # All seeds agree, so that the standard error is 0; but 0.875 and 0.85 of 40 rows are one row apart.
    rivals = [summary("small", 10, 0.85, 0.85), summary("best", 50, 0.875, 0.875)]
    found = choose(rivals, metric="accuracy", dev_rows=40)
    assert found is not None
    assert found.summary.candidate.label == "small"
    found = choose(rivals, metric="accuracy", dev_rows=400)
    assert found is not None
    assert found.summary.candidate.label == "best"


def test_of_equal_means_the_smaller_and_a_loss_counts_downward():
    found = choose([summary("a", 50, 0.3, 0.3), summary("b", 10, 0.9, 0.9)], metric="loss", dev_rows=40)
    assert found is not None
    assert found.summary.candidate.label == "a"
    found = choose([summary("a", 50, 0.9), summary("b", 10, 0.9)], metric="accuracy", dev_rows=40)
    assert found is not None
    assert found.summary.candidate.label == found.best.candidate.label == "b"


@pytest.mark.parametrize(
    ("scores", "known", "reason"),
    [
        (
            (0.9, 0.8),
            0.9,
            "the best on dev, big (accuracy 90.0), is no better than always answering 'no' (90.0): they are tied.",
        ),
        ((0.9, 0.8), 0.95, "the best on dev, big (accuracy 90.0), is no better than always answering 'no' (95.0)."),
        (
            (0.9, 0.8),
            0.895,
            "the best on dev, big (accuracy 90.0), is better than always answering 'no' (89.5), but not by more than "
            "1.0 points.",
        ),
        ((0.9, 0.8), 0.88, None),
    ],
    ids=["tied", "worse", "within the margin", "better"],
)
def test_what_one_answer_to_all_gives_as_well_is_not_recommended(scores, known, reason):
    rivals = [summary("big", 50, scores[0]), summary("small", 10, scores[1])]
    found = choose(rivals, metric="accuracy", dev_rows=1000, baseline=Baseline("'no'", {"accuracy": known}))
    assert found is not None
    assert found.is_withheld == (reason is not None)
    assert found.best.candidate.label == "big"
    if reason is not None:
        assert found.reason == reason


def test_a_loss_is_better_below_and_a_correlation_above_nothing():
    low, high = (Baseline("the mean, 3", {"loss": loss}) for loss in (0.2, 0.4))
    for baseline, withheld in ((low, True), (high, False)):
        found = choose([summary("a", 10, 0.3)], metric="loss", dev_rows=1000, baseline=baseline)
        assert found is not None
        assert found.is_withheld == withheld
    for score, withheld in ((-0.2, True), (0.0, True), (0.3, False)):
        none = Baseline("the mean, 3", {"pearson": 0.0})
        found = choose([summary("a", 10, score)], metric="pearson", dev_rows=1000, baseline=none)
        assert found is not None
        assert found.is_withheld == withheld


def test_equal_scores_are_called_tied():
    found = choose([summary("a", 50, 0.9), summary("b", 10, 0.9)], metric="accuracy", dev_rows=1000)
    assert found is not None
    assert found.reason.startswith("it is tied with a as the best on dev (accuracy 90.0, one seed)")


def test_nothing_to_choose_from():
    assert choose([summary("a", 10)], metric="accuracy", dev_rows=10) is None
