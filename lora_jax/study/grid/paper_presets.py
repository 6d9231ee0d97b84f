"""Comparisons that repeat the papers' ablations at equal budget: candidates, axes and published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .candidates import Candidate, make_candidate

_LORA = "Hu and others, 2021, arXiv 2106.09685"
_BITFIT = "Ben Zaken and others, 2022, arXiv 2106.10199"


class Axis(NamedTuple):
    """The quantity of the candidates' `x`, which figures draw logarithmically."""

    name: str


class Published(NamedTuple):
    """A paper's figures, shown beside the comparison's own.

    Attributes:
        source: The paper and its table.
        setting: The paper's model and data, which differ from the comparison's.
        columns: What was measured.
        values: The figures by the candidate's label, one for each column.
    """

    source: str
    setting: str
    columns: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]


class Preset(NamedTuple):
    """A comparison that answers one question.

    Attributes:
        title, question: Heading and text of the report.
        candidates: Function from the number of training examples to the candidates.
        axis: Axis of the candidates' `x`, if they have one.
        published: The paper's figures.
        order: Pairs of labels of which a paper found the first to be better.
        order_source: The paper that found this order.
    """

    title: str
    question: str
    candidates: Callable[[int], tuple[Candidate, ...]]
    axis: Axis | None = None
    published: Published | None = None
    order: tuple[tuple[str, str], ...] = ()
    order_source: str = ""


# The paper's names of matrices, and the bundled models' modules.
_MODULES = {"q": "query", "k": "key", "v": "value", "o": "attention/output"}


def _lora(letters: str, rank: int, **options: Any) -> Candidate:
    # The same alpha for every rank, as in section 4.1 of the paper.
    targets = [_MODULES[letter] for letter in letters]
    kinds = ",".join(letters)
    series = f"LoRA, {kinds}"
    return make_candidate(
        {"name": "lora", "rank": rank, "alpha": 16.0, "targets": targets},
        label=f"LoRA, {kinds}, r={rank}",
        series=series,
        mark=f"r={rank}",
        **options,
    )


# Table 5: the same budget for one kind of matrix at a high rank, or for several at a lower one.
_TARGETS = (("q", 8), ("k", 8), ("v", 8), ("o", 8), ("qk", 4), ("qv", 4), ("qkvo", 2))
_TABLE_5 = {
    "WikiSQL": (70.4, 70.0, 73.0, 73.2, 71.4, 73.7, 73.7),
    "MNLI": (91.0, 90.8, 91.0, 91.3, 91.3, 91.3, 91.7),
}
# Table 6.
_RANKS = (1, 2, 4, 8, 64)
_TABLE_6 = {
    ("WikiSQL", "q"): (68.8, 69.6, 70.5, 70.4, 70.0),
    ("WikiSQL", "qv"): (73.4, 73.3, 73.7, 73.8, 73.5),
    ("WikiSQL", "qkvo"): (74.1, 73.7, 74.0, 74.0, 73.9),
    ("MNLI", "q"): (90.7, 90.9, 91.1, 90.7, 90.7),
    ("MNLI", "qv"): (91.3, 91.4, 91.3, 91.6, 91.4),
    ("MNLI", "qkvo"): (91.2, 91.7, 91.7, 91.5, 91.4),
}


def _lora_targets(rows: int) -> tuple[Candidate, ...]:
    return tuple(_lora(letters, rank) for letters, rank in _TARGETS)


def _lora_rank(rows: int) -> tuple[Candidate, ...]:
    return tuple(_lora(letters, rank, x=float(rank)) for letters in ("q", "qv", "qkvo") for rank in _RANKS)


_TERMS = {
    "all biases": "all",
    "query and MLP-up biases": ["attention/query", "mlp/up"],
    "MLP-up biases": ["mlp/up"],
    "query biases": ["attention/query"],
    "key biases": ["attention/key"],
    "value biases": ["attention/value"],
    "attention-output biases": ["attention/output"],
    "MLP-down biases": ["mlp/down"],
}


def _bitfit_terms(rows: int) -> tuple[Candidate, ...]:
    terms = [
        make_candidate({"name": "bitfit", "targets": targets}, label=label, series="BitFit")
        for label, targets in _TERMS.items()
    ]
    masks = [
        make_candidate({"name": "random-mask", "kind": kind}, label=label, series="random mask")
        for kind, label in (("uniform", "as many random numbers"), ("rows", "as many, in random rows"))
    ]
    return (*terms, *masks, make_candidate("frozen"), make_candidate("full"))


def _methods(rows: int) -> tuple[Candidate, ...]:
    return (
        make_candidate("frozen"),
        make_candidate("bitfit"),
        _lora("qv", 8),
        *(make_candidate(name) for name in ("dora", "ia3", "vera")),
        make_candidate({"name": "adapter", "size": 8}, label="Houlsby adapters, m=8"),
        make_candidate({"name": "adapter", "size": 16, "placement": "pfeiffer"}, label="Pfeiffer adapters, m=16"),
        make_candidate({"name": "prefix"}, label="prefix, m=16"),
        *(make_candidate(name) for name in ("norms", "top-layers", "full")),
    )


_DIMENSIONS = (10, 30, 100, 300, 1000, 3000, 10_000)


def _intrinsic_dimension(rows: int) -> tuple[Candidate, ...]:
    subspaces = [
        make_candidate(
            {"name": "random-subspace", "dimension": dimension},
            series="random subspace",
            mark=f"d={dimension:,}",
            x=float(dimension),
        )
        for dimension in _DIMENSIONS
    ]
    return (*subspaces, make_candidate("frozen"), make_candidate("full"))


# From a few dozen examples on, by factors of about three.
_SIZES = (32, 100, 316, 1000, 3160, 10_000, 31_600)


def _low_data(rows: int) -> tuple[Candidate, ...]:
    sizes = [size for size in _SIZES if 3 * size <= 2 * rows]
    return tuple(
        make_candidate(
            name,
            label=f"{make_candidate(name).label}, {size or rows:,} rows",
            series=make_candidate(name).label,
            mark=f"{size or rows:,}",
            x=float(size or rows),
            train_rows=size,
        )
        for name in ("frozen", "bitfit", "lora", "full")
        for size in (*sizes, None)
    )


PRESETS: dict[str, Preset] = {
    "paper-lora-targets": Preset(
        title="Which weights should LoRA adapt, at one budget?",
        question="The same number of parameters, for one kind of attention matrix at a high rank or for several at a "
        "lower one.",
        candidates=_lora_targets,
        published=Published(
            source=f"{_LORA}, table 5",
            setting="GPT-3 175B, 18M trained parameters, accuracy in %",
            columns=tuple(_TABLE_5),
            values={
                _lora(letters, rank).label: tuple(column[place] for column in _TABLE_5.values())
                for place, (letters, rank) in enumerate(_TARGETS)
            },
        ),
    ),
    "paper-lora-rank": Preset(
        title="How much rank does LoRA need?",
        question="The same matrices at ranks from 1 to 64.",
        candidates=_lora_rank,
        axis=Axis("rank r"),
        published=Published(
            source=f"{_LORA}, table 6",
            setting="GPT-3 175B, accuracy in %",
            columns=("WikiSQL", "MNLI"),
            values={
                _lora(letters, rank).label: (_TABLE_6["WikiSQL", letters][place], _TABLE_6["MNLI", letters][place])
                for letters in ("q", "qv", "qkvo")
                for place, rank in enumerate(_RANKS)
            },
        ),
    ),
    "paper-bitfit-terms": Preset(
        title="Which biases matter?",
        question="BitFit on all biases, on the two kinds that changed most in the paper, and on each kind alone.",
        candidates=_bitfit_terms,
        order=(
            ("all biases", "query and MLP-up biases"),
            ("query and MLP-up biases", "MLP-up biases"),
            ("MLP-up biases", "query biases"),
            ("query biases", "head only"),
            ("all biases", "as many random numbers"),
            ("all biases", "as many, in random rows"),
        ),
        order_source=_BITFIT,
    ),
    "paper-methods": Preset(
        title="Do the methods reach full fine-tuning?",
        question="The head, biases, low-rank factors and their relatives, adapters, a prefix, norms, the last layers, "
        "and everything.",
        candidates=_methods,
        published=Published(
            source=f"{_LORA}, table 2",
            setting="RoBERTa base on GLUE's dev sets",
            columns=("MNLI", "SST-2", "average of 8 tasks"),
            values={
                "full fine-tuning": (87.6, 94.8, 86.4),
                "BitFit": (84.7, 93.7, 85.2),
                "LoRA, q,v, r=8": (87.5, 95.1, 87.2),
            },
        ),
    ),
    "intrinsic-dimension": Preset(
        title="How many dimensions does the task need?",
        question="Training within a random subspace, beside the head alone and everything (dashed). The dimension at "
        "which 90 % of full fine-tuning's quality is reached is called the task's intrinsic dimension: "
        "Aghajanyan and others, 2021, arXiv 2012.13255.",
        candidates=_intrinsic_dimension,
        axis=Axis("dimension of the subspace"),
    ),
    "low-data": Preset(
        title="How does each method do with few training rows?",
        question="Subsets of the training rows, drawn by seed so that each label keeps its share. All runs take the "
        "same number of steps, and dev chooses the checkpoint.",
        candidates=_low_data,
        axis=Axis("training rows"),
    ),
}
