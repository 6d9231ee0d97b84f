"""lora_jax: LoRA, BitFit and their family for any JAX function, as pure functions over parameter pytrees.

The law that everything here keeps: `adapt(f)(params, *args) == f(merge_params(params), *args)`. The right side says
what is computed; the left side computes it cheaply, with no gradient of a frozen weight and no merged copy of the
tree.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .adapt import MaterializeWarning as MaterializeWarning
from .adapt import Use as Use
from .adapt import adapt as adapt
from .adapt import explain as explain
from .adapt import trace_weights as trace_weights
from .adapters import Adapter as Adapter
from .adapters import AdapterError as AdapterError
from .adapters import AdapterWithState as AdapterWithState
from .adapters import load_adapter as load_adapter
from .adapters import save_adapter as save_adapter
from .adapters.extract import extract_lora as extract_lora
from .adapters.truncate import truncate_lora as truncate_lora
from .attach import attach as attach
from .attach import detach as detach
from .dropout import with_dropout as with_dropout
from .errors import LoraJaxError as LoraJaxError
from .masks import ParamCount as ParamCount
from .masks import Partition as Partition
from .masks import combine as combine
from .masks import count_params as count_params
from .masks import label_params as label_params
from .masks import partition as partition
from .masks import trainable_mask as trainable_mask
from .merging import merge_params as merge_params
from .methods import IA3 as IA3
from .methods import BitFit as BitFit
from .methods import BottleneckAdapter as BottleneckAdapter
from .methods import DoRA as DoRA
from .methods import DoRAWeight as DoRAWeight
from .methods import Frozen as Frozen
from .methods import FullFineTune as FullFineTune
from .methods import IA3Weight as IA3Weight
from .methods import LoRA as LoRA
from .methods import LoRAWeight as LoRAWeight
from .methods import Method as Method
from .methods import NormTuning as NormTuning
from .methods import PrefixTuning as PrefixTuning
from .methods import RandomMask as RandomMask
from .methods import RandomSubspace as RandomSubspace
from .methods import TopLayers as TopLayers
from .methods import VeRA as VeRA
from .methods import VeRAWeight as VeRAWeight
from .optimizer import make_optimizer as make_optimizer
from .paths import leaf_paths as leaf_paths
from .selection import SelectionError as SelectionError
from .state import StateWarning as StateWarning

if TYPE_CHECKING:
    from . import interop as interop
    from . import losses as losses
    from . import models as models
    from . import training as training

__version__ = "0.1.0"

# Imported on first use: `models` and `training` need Flax and more, which the core does without.
_OPTIONAL = ("interop", "losses", "models", "training")


def __getattr__(name: str) -> Any:
    if name in _OPTIONAL:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
