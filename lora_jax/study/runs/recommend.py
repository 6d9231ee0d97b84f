"""Which method to take: the smallest of those that can't be told from the best."""

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
    "Of the candidates whose mean on dev is within one standard error of the best candidate's mean (over its seeds; "
    f"with one seed, within {ONE_SEED_MARGIN:g}; in accuracy never less than one dev row), the one that trains the "
    "fewest parameters. It is the one-standard-error rule of model selection (Hastie, Tibshirani and Friedman, The "
    "Elements of Statistical Learning, section 7.10), with seeds in place of folds. One answer to every row, the most "
    "frequent label or the mean, counts as a candidate that trains nothing: where it is that near to the best, none is "
    "recommended."
)


class Recommendation(NamedTuple):
    """The choice.

    Attributes:
        summary: of the recommended candidate.
        reason: in one sentence, with figures.
        best: the candidate with the best mean on dev.
        margin: that was allowed.
        within: how many candidates are within it.
        is_withheld: Whether none is recommended after all, as one answer to every row is within the margin, too.
    """

    summary: Summary
    reason: str
    best: Summary
    margin: float
    within: int
    is_withheld: bool = False


def recommend(summaries: Sequence[Summary], prepared: Prepared) -> Recommendation | None:
    """Chooses by `RULE`; `None` where no run has succeeded."""
    dev_rows = len(prepared.splits.examples["dev"])
    return choose(summaries, metric=prepared.metric, dev_rows=dev_rows, baseline=prepared.baseline("dev"))


def choose(
    summaries: Sequence[Summary], *, metric: str, dev_rows: int, baseline: Baseline | None = None
) -> Recommendation | None:
    """As `recommend`.

    Args:
        summaries: of the candidates.
        metric: that the scores are of.
        dev_rows: how many rows the dev scores are over.
        baseline: On dev.
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
