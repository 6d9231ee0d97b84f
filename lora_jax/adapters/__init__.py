"""Adapters on disk: saving and loading one, making one smaller, telling one base from another."""

from .description import DESCRIPTION as DESCRIPTION
from .description import TENSORS as TENSORS
from .description import AdapterError as AdapterError
from .description import read_description as read_description
from .load import Adapter as Adapter
from .load import AdapterWithState as AdapterWithState
from .load import load_adapter as load_adapter
from .load import require_dtypes as require_dtypes
from .load import verify_adapter as verify_adapter
from .save import save_adapter as save_adapter
from .save import save_with as save_with
from .save import saved_arrays as saved_arrays
