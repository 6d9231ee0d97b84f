"""The methods: one file each."""

from .base import Method as Method
from .bitfit import BitFit as BitFit
from .bottleneck import BottleneckAdapter as BottleneckAdapter
from .dora import DoRA as DoRA
from .dora import DoRAWeight as DoRAWeight
from .frozen import Frozen as Frozen
from .full import FullFineTune as FullFineTune
from .ia3 import IA3 as IA3
from .ia3 import IA3Weight as IA3Weight
from .lora.method import LoRA as LoRA
from .lora.weight import LoRAWeight as LoRAWeight
from .norm_tuning import NormTuning as NormTuning
from .prefix_tuning import PrefixTuning as PrefixTuning
from .random_mask import RandomMask as RandomMask
from .random_subspace import RandomSubspace as RandomSubspace
from .top_layers import TopLayers as TopLayers
from .vera import VeRA as VeRA
from .vera import VeRAWeight as VeRAWeight
