"""The transform that lets an unmodified function compute with adapted weights."""

from ..types import Use as Use
from .transform import adapt as adapt
from .uses import Explanation as Explanation
from .uses import explain as explain
from .uses import trace_weights as trace_weights
from .walk import Encounter as Encounter
from .walk import MaterializeError as MaterializeError
from .walk import MaterializeWarning as MaterializeWarning
