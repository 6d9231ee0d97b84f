"""Bundled models in Flax NNX, with their Hugging Face weights, names and tokenizers.

model = lora_jax.models.load("minilm", task="classification", num_labels=8)
logits = model.apply(model.params, input_ids, attention_mask)
"""

from .checkpoint.byte_progress import Progress as Progress
from .checkpoint.hub import DEFAULT_BASE as DEFAULT_BASE
from .checkpoint.hub import find_base as find_base
from .checkpoint.tokenizer import SpecialTokens as SpecialTokens
from .checkpoint.tokenizer import load_tokenizer as load_tokenizer
from .checkpoint.tokenizer import read_special_tokens as read_special_tokens
from .checkpoint_task import CheckpointHead as CheckpointHead
from .checkpoint_task import absent_leaves as absent_leaves
from .checkpoint_task import checkpoint_head as checkpoint_head
from .checkpoint_task import checkpoint_task as checkpoint_task
from .checkpoint_task import has_other_head as has_other_head
from .families.bert import BertConfig as BertConfig
from .families.bundled import read_model_config as read_model_config
from .families.distilbert import DistilBertConfig as DistilBertConfig
from .families.gpt2 import Gpt2Config as Gpt2Config
from .families.llama import LlamaConfig as LlamaConfig
from .families.llama import MistralConfig as MistralConfig
from .families.llama import Qwen2Config as Qwen2Config
from .families.llama import Qwen3Config as Qwen3Config
from .families.roberta import RobertaConfig as RobertaConfig
from .families.roberta import XlmRobertaConfig as XlmRobertaConfig
from .family import Task as Task
from .generate import Generated as Generated
from .generate import generate as generate
from .loading import load as load
from .model import Model as Model
from .model import Skeleton as Skeleton
from .model import skeleton as skeleton
from .model_config import ModelConfig as ModelConfig
from .nn.cache import Cache as Cache
from .nn.heads import Pooling as Pooling
from .nn.rope import Rope as Rope
from .saving import save_pretrained as save_pretrained
from .stacking import stack_layers as stack_layers
from .stacking import unstack_layers as unstack_layers
