"""Which method for which task, and what training did.

`compare(Comparison(...))` from Python, `lora-jax compare` from a shell; `analysis` and `lora-jax analyze`.
"""

from __future__ import annotations

from .candidates import Candidate as Candidate
from .candidates import default_candidates as default_candidates
from .candidates import make_candidate as make_candidate
from .candidates import read_grid as read_grid
from .comparison import Outcome as Outcome
from .comparison import compare as compare
from .recommend import Recommendation as Recommendation
from .settings import Comparison as Comparison
from .summary import Summary as Summary
