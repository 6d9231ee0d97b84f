"""The two names of every BERT parameter: its leaf path here, and its tensor in a Hugging Face checkpoint.

A linear layer's `weight` there is `(out, in)`, our `kernel` is its transpose `(in, out)`; everything else is the same
array under another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Module paths here and there, with `{}` for the number of a layer.
_MODULES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layers/{}/attention/query": "encoder.layer.{}.attention.self.query",
    "encoder/layers/{}/attention/key": "encoder.layer.{}.attention.self.key",
    "encoder/layers/{}/attention/value": "encoder.layer.{}.attention.self.value",
    "encoder/layers/{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "encoder/layers/{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
    "encoder/layers/{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "encoder/layers/{}/mlp/down": "encoder.layer.{}.output.dense",
    "encoder/layers/{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
}
_NUMBER = re.compile(r"(?<=[/.])\d+(?=[/.])")

# The task classes of transformers keep the encoder in an attribute of this name, and the head beside it.
PREFIX = "bert."

# Norms in checkpoints converted from TensorFlow.
_OLD_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}

# In checkpoints, yet no parameters of the encoder: a buffer of old versions, and the heads of pretraining.
_UNUSED = re.compile(r"embeddings\.(position_ids|token_type_ids)|cls\..*")


def module_name(path: str, *, prefix: str = "") -> str:
    """The Hugging Face module of the leaf at `path`.

    Args:
        path: a leaf path of a bundled BERT.
        prefix: of the encoder's and the pooler's modules: `"bert."` in the task classes, nothing in `BertModel`.

    Example:
        >>> module_name("encoder/layers/0/attention/query/kernel", prefix=PREFIX)
        'bert.encoder.layer.0.attention.self.query'
        >>> module_name("classifier/bias", prefix=PREFIX)
        'classifier'
    """
    module = path.rpartition("/")[0]
    number = _NUMBER.search(module)
    name = _MODULES[_NUMBER.sub("{}", module)].format(number.group() if number else "")
    return name if module == "classifier" else prefix + name


def tensor_name(path: str, *, prefix: str = "") -> str:
    """The Hugging Face tensor of the leaf at `path`.

    Example:
        >>> tensor_name("encoder/layers/3/mlp/norm/scale")
        'encoder.layer.3.output.LayerNorm.weight'
    """
    return f"{module_name(path, prefix=prefix)}.{'bias' if path.endswith('/bias') else 'weight'}"


def is_transposed(path: str) -> bool:
    """Whether the leaf at `path` is the transpose of its Hugging Face tensor."""
    return path.endswith("/kernel")


def module_names(paths: Iterable[str], *, prefix: str) -> dict[str, str]:
    """`{leaf path: Hugging Face module}`, what `lora_jax.interop` asks of any model."""
    return {path: module_name(path, prefix=prefix) for path in paths}


def modern_names(tensors: Iterable[str]) -> dict[str, str]:
    """`{name as in BertModel: name in the checkpoint}`, for the tensors that mean something.

    Takes the `bert.` prefix off, `gamma` and `beta` for what is now `weight` and `bias`, and leaves out buffers and
    pretraining heads. Where two tensors would get one name, the later is found under its own.

    Example:
        >>> modern_names(["bert.embeddings.LayerNorm.gamma", "bert.embeddings.position_ids"])
        {'embeddings.LayerNorm.weight': 'bert.embeddings.LayerNorm.gamma'}
    """
    names: dict[str, str] = {}
    for tensor in tensors:
        name = tensor.removeprefix(PREFIX)
        for old, new in _OLD_SUFFIXES.items():
            if name.endswith(f"LayerNorm{old}"):
                name = name.removesuffix(old) + new
        if not _UNUSED.fullmatch(name):
            names[tensor if name in names else name] = tensor
    return names


def layer_count(names: Mapping[str, object] | Iterable[str]) -> int:
    """One more than the highest number of a layer in Hugging Face tensor names."""
    numbers = (re.match(r"encoder\.layer\.(\d{1,9})\.", name) for name in names)
    return max((int(number.group(1)) + 1 for number in numbers if number), default=0)
