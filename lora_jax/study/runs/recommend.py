"""Recommends a method: the smallest of those that can't be distinguished from the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.training.baseline import Baseline
from lora_jax.training.metrics import better

from ..grid.settings import Prepared
from .quality import Quality
from .summary import Summary

ONE_SEED_MARGIN = 0.01

RULE = (
    "Rule: among the candidates whose mean dev score is within one standard error (over seeds) of the best, the one "
    f"that trains the fewest parameters. With one seed, the margin is {ONE_SEED_MARGIN:g}; for accuracy, it is at "
    "least one dev example. This is the one-standard-error rule of model selection (Hastie, Tibshirani and Friedman, "
    "The Elements of Statistical Learning, section 7.10), with seeds in place of folds. Giving every example the same "
    "answer, the most frequent label or the mean, counts as a candidate that trains nothing: if it is within the "
    "margin, no method is recommended."
)


class Recommendation(NamedTuple):
    """A recommended candidate.

    Attributes:
        summary: Summary of the candidate.
        reason: The reason in one sentence, with figures.
        best: Summary of the candidate with the best mean dev score.
        margin: Largest accepted difference from the best.
        within: Number of candidates within the margin.
        is_withheld: Whether none is recommended, because a constant answer is within the margin, too.
    """

    summary: Summary
    reason: str
    best: Summary
    margin: float
    within: int
    is_withheld: bool = False


def recommend(summaries: Sequence[Summary], prepared: Prepared) -> Recommendation | None:
    """Chooses by `RULE`; `None` if no run has succeeded."""
    dev_rows = len(prepared.splits.examples["dev"])
    return choose(summaries, metric=prepared.metric, dev_rows=dev_rows, baseline=prepared.baseline("dev"))


def choose(
    summaries: Sequence[Summary], *, metric: str, dev_rows: int, baseline: Baseline | None = None
) -> Recommendation | None:
    """Chooses by `RULE`.

    Args:
        summaries: Summaries of the candidates.
        metric: Metric of the scores.
        dev_rows: Number of dev examples.
        baseline: Dev scores of a constant answer.
    """
    means = [(s, better(metric, mean)) for s in summaries if (mean := s.mean("dev")) is not None]
    if not means:
        return None
    best, top = max(means, key=lambda pair: (pair[1], -pair[0].trainable))
    error = best.standard_error("dev")
    margin = ONE_SEED_MARGIN if error is None else error
    if metric == "accuracy":
        margin = max(margin, 1 / dev_rows)
    near = [summary for summary, mean in means if mean >= top - margin - 1e-9]
    chosen = min(near, key=lambda summary: summary.trainable)
    quality = Quality(metric)
    if baseline is not None and not baseline.is_beaten(metric, best.mean("dev"), by=margin):
        reason = _no_better(best, margin, baseline, quality)
        return Recommendation(chosen, reason, best, margin, len(near), is_withheld=True)
    tied = [s.candidate.label for s, mean in means if s is not chosen and abs(mean - top) < 1e-9]
    return Recommendation(chosen, _reason(chosen, best, margin, len(near), tied, quality), best, margin, len(near))


def _no_better(best: Summary, margin: float, baseline: Baseline, quality: Quality) -> str:
    metric, score = quality.metric, best.mean("dev")
    found = f"the best on dev, {best.candidate.label} ({quality.name} {quality.spread(best.scores['dev'])})"
    always = f"always answering {baseline.answer} ({quality.text(baseline.metrics[metric])})"
    if baseline.is_beaten(metric, score):
        return f"{found}, is better than {always}, but not by more than {quality.difference(margin)}."
    return f"{found}, is no better than {always}" + (": they are tied." if baseline.is_tied(metric, score) else ".")


def _reason(chosen: Summary, best: Summary, margin: float, within: int, tied: Sequence[str], quality: Quality) -> str:
    size = f"{chosen.trainable:,} parameters ({chosen.percent:.3g} %)"
    mean, top = (quality.spread(summary.scores["dev"]) for summary in (chosen, best))
    seeds = f"{len(best.seeds)} seeds" if len(best.seeds) > 1 else "one seed"
    if chosen is best:
        near = quality.difference(margin)
        rivals = f"of the {within} candidates within {near} of it, it trains the fewest parameters"
        if within == 1:
            rivals = f"none of the others is within {near} of it"
        first = f"tied with {', '.join(tied)} as the best on dev" if tied else "the best on dev"
        return f"it is {first} ({quality.name} {mean}, {seeds}), {rivals}: {size}."
    return (
        f"of the {within} candidates within {quality.difference(margin)} of the best on dev "
        f"({best.candidate.label}: {quality.name} {top}, {seeds}), it trains the fewest parameters: {size}, at {mean}."
    )
