"""BLEU and ROUGE-L of generated texts, by sacrebleu and rouge-score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.training.data.documents import Pair
from lora_jax.training.errors import TrainingError


class Referenced(NamedTuple):
    """A prompt and its reference completions."""

    prompt: str
    references: list[str]


def with_references(pairs: Sequence[Pair]) -> list[Referenced]:
    """Joins pairs that share a prompt into one with several references, in the order of first appearance."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        found.setdefault(pair.prompt, []).append(pair.completion)
    return [Referenced(prompt, references) for prompt, references in found.items()]


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` of the corpus and the mean `rouge_l` of the texts, from 0 to 100.

    BLEU (Papineni and others, 2002) is `exp(min(0, 1 - r/c)) · (p₁ p₂ p₃ p₄)^(1/4)` over the whole corpus, with
    sacrebleu's `13a` tokens and as many references for each text as it has. ROUGE-L (Lin, 2004) is rouge-score's F1 of
    the longest common subsequence, without stems, the best of a text's references.

    Args:
        texts: Generated texts.
        references: One or more references for each text.

    Raises:
        TrainingError: The package sacrebleu or rouge-score isn't installed.

    Example:
        >>> text_metrics(["the cat sat on the mat"], [["a cat sat on the mat", "the cat sat down"]])["rouge_l"]
        83.33333333333334

    **Deviations.** The scripts of the E2E challenge tokenize differently, and their ROUGE-L weighs recall more
    (β = 1.2), so the figures are close to theirs but not equal.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise TrainingError(f"{error.name} isn't installed: pip install 'lora_jax[text-metrics]'.") from error
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge = [
        scorer.score_multi(list(own), text)["rougeL"].fmeasure for text, own in zip(texts, references, strict=True)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(texts), streams).score),
        "rouge_l": 100 * sum(rouge) / len(rouge),
    }
