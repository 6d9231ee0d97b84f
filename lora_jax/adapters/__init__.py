"""What a task keeps: saving and loading its adapter, making one smaller, telling one base from another."""

from .store import DESCRIPTION as DESCRIPTION
from .store import TENSORS as TENSORS
from .store import Adapter as Adapter
from .store import AdapterError as AdapterError
from .store import AdapterWithState as AdapterWithState
from .store import load_adapter as load_adapter
from .store import read_description as read_description
from .store import require_held as require_held
from .store import save_adapter as save_adapter
from .store import saved_arrays as saved_arrays
from .store import verify_adapter as verify_adapter
