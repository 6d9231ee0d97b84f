"""Formats the quality metric of a comparison: shares and correlations times 100, a loss unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "loss": "loss",
}


class Quality(NamedTuple):
    """A metric with its name and unit.

    Example:
        >>> quality = Quality("accuracy")
        >>> quality.title, quality.spread([0.90, 0.92]), quality.difference(0.013)
        ('accuracy, %', '91.0 ± 1.4', '1.3 points')
    """

    metric: str

    @property
    def name(self) -> str:
        return _TITLES.get(self.metric, self.metric)

    @property
    def title(self) -> str:
        """The name with its unit, for headings and axes."""
        if self.metric == "loss":
            return self.name
        return f"{self.name} × 100" if "correlation" in self.name else f"{self.name}, %"

    @property
    def is_loss(self) -> bool:
        return self.metric == "loss"

    def shown(self, value: float) -> float:
        return value if self.is_loss else 100 * value

    def text(self, value: float) -> str:
        return f"{self.shown(value):.{3 if self.is_loss else 1}f}"

    def spread(self, values: Sequence[float]) -> str:
        """Mean ± sample standard deviation."""
        mean = self.text(float(np.mean(values)))
        return f"{mean} ± {self.text(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean

    def difference(self, value: float) -> str:
        return f"{value:.3f}" if self.is_loss else f"{100 * value:.1f} points"
