"""Bundled models in Flax NNX, with their Hugging Face weights, names and tokenizers.

model = lora_jax.models.load("minilm", task="classification", num_labels=8)
logits = model.apply(model.params, input_ids, attention_mask)
"""

from .bert import BertConfig as BertConfig
from .config import ModelConfig as ModelConfig
from .distilbert import DistilBertConfig as DistilBertConfig
from .families import read_model_config as read_model_config
from .family import Task as Task
from .heads import Pooling as Pooling
from .hub import DEFAULT_BASE as DEFAULT_BASE
from .hub import find_base as find_base
from .loading import load as load
from .model import Model as Model
from .model import Skeleton as Skeleton
from .model import skeleton as skeleton
from .roberta import RobertaConfig as RobertaConfig
from .roberta import XlmRobertaConfig as XlmRobertaConfig
from .saving import save_pretrained as save_pretrained
from .tokenizer import load_tokenizer as load_tokenizer
