"""Which method for which task, and what training did.

`compare(Comparison(...))` from Python, `lora-jax compare` from a shell; `analysis` and `lora-jax analyze`.
"""

from __future__ import annotations

from .grid.candidates import Candidate as Candidate
from .grid.candidates import default_candidates as default_candidates
from .grid.candidates import make_candidate as make_candidate
from .grid.candidates import read_grid as read_grid
from .grid.settings import Comparison as Comparison
from .runs.comparison import Outcome as Outcome
from .runs.comparison import compare as compare
from .runs.recommend import Recommendation as Recommendation
from .runs.summary import Summary as Summary
