"""Exchange with the Hugging Face world: PEFT adapter folders both ways, and delta files for what has none.

Knows no model: it takes the names of its modules, `{leaf path: Hugging Face module}`, a bundled model's
(`model.names`) or a table of your own.

    params, method = lora_jax.interop.import_peft("adapter", base_params, names=model.names)
    lora_jax.interop.export_peft("exported", params, method, names=model.names)
"""

from .delta import apply_delta as apply_delta
from .delta import export_delta as export_delta
from .module_names import ModuleNames as ModuleNames
from .peft.adapter_config import read_peft_config as read_peft_config
from .peft.read import check_peft as check_peft
from .peft.read import import_peft as import_peft
from .peft.write import export_peft as export_peft
from .vllm import vllm_problems as vllm_problems
