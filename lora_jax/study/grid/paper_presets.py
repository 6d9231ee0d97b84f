"""The ablations of the papers at equal budget, as comparisons: their candidates, axes, and published figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.training.method_options import METHODS

from .candidates import Candidate, make_candidate

_LORA = "Hu and others, 2021, arXiv 2106.09685"
_BITFIT = "Ben Zaken and others, 2022, arXiv 2106.10199"


class Axis(NamedTuple):
    """What the candidates' `x` is; figures draw it logarithmically."""

    name: str


class Published(NamedTuple):
    """Figures of a paper, to stand beside one's own.

    Attributes:
        source: the paper and its table.
        setting: model and data, which are others than one's own.
        columns: what was measured.
        values: by candidate's label, one for each column.
    """

    source: str
    setting: str
    columns: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]


class Preset(NamedTuple):
    """A comparison that answers one question.

    Attributes:
        title, question: for the report.
        candidates: made for so many training rows.
        axis: of the candidates' `x`, if they have one.
        published: the paper's figures.
        order: pairs of labels, of which a paper found the first to be better.
        order_source: that paper.
    """

    title: str
    question: str
    candidates: Callable[[int], tuple[Candidate, ...]]
    axis: Axis | None = None
    published: Published | None = None
    order: tuple[tuple[str, str], ...] = ()
    order_source: str = ""


# Names of the bundled models' modules by the paper's.
_MODULES = {"q": "query", "k": "key", "v": "value", "o": "attention/output"}


def _lora(letters: str, rank: int, **options: Any) -> Candidate:
    # One alpha whatever the rank, as in the paper, section 4.1.
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


# Table 5: one budget, spent on one kind of matrix at a high rank or on several at a lower one.
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
    return (*terms, *masks, *_known([{"name": "frozen"}, {"name": "full"}]))


def _methods(rows: int) -> tuple[Candidate, ...]:
    relatives = [{"name": name} for name in ("dora", "ia3", "vera")]
    return (
        *_known([{"name": "frozen"}, {"name": "bitfit"}]),
        _lora("qv", 8),
        *_known(relatives),
        make_candidate({"name": "adapter", "size": 8}, label="Houlsby adapters, m=8"),
        make_candidate({"name": "adapter", "size": 16, "placement": "pfeiffer"}, label="Pfeiffer adapters, m=16"),
        make_candidate({"name": "prefix"}, label="prefix, m=16"),
        *_known([{"name": "norms"}, {"name": "top-layers"}, {"name": "full"}]),
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
    return (*subspaces, *_known([{"name": "frozen"}, {"name": "full"}]))


# From a few dozen rows on, by factors of about three.
_SIZES = (32, 100, 316, 1000, 3160, 10_000, 31_600)


def _low_data(rows: int) -> tuple[Candidate, ...]:
    sizes = [size for size in _SIZES if 3 * size <= 2 * rows]
    return tuple(
        make_candidate(
            options,
            label=f"{make_candidate(options).label}, {size or rows:,} rows",
            series=make_candidate(options).label,
            mark=f"{size or rows:,}",
            x=float(size or rows),
            train_rows=size,
        )
        for options in ({"name": "frozen"}, {"name": "bitfit"}, {"name": "lora"}, {"name": "full"})
        for size in (*sizes, None)
    )


def _known(methods: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    return [make_candidate(options) for options in methods if options["name"] in METHODS]


PRESETS: dict[str, Preset] = {
    "paper-lora-targets": Preset(
        title="Which weights should LoRA adapt, at one budget?",
        question="The same number of parameters, spent on one kind of attention matrix at a high rank or on several at "
        "a lower one.",
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
        question="BitFit on all biases, on the two kinds that the paper found to change most, and on each kind alone.",
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
        title="What do few rows do to each method?",
        question="Slices of the training rows, drawn by seed so that each label keeps its share. All take the same "
        "number of steps, and dev chooses the checkpoint.",
        candidates=_low_data,
        axis=Axis("training rows"),
    ),
}
