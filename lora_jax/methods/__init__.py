"""The methods: one file each."""

from .base import Method as Method
from .bitfit import BitFit as BitFit
from .frozen import Frozen as Frozen
from .full import FullFineTune as FullFineTune
from .lora import LoRA as LoRA
from .lora import LoRAWeight as LoRAWeight
from .norm_tuning import NormTuning as NormTuning
from .random_mask import RandomMask as RandomMask
from .random_subspace import RandomSubspace as RandomSubspace
from .top_layers import TopLayers as TopLayers
