"""`save_pretrained`: writes a model as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..errors import ArgumentError
from ..files import read_text, replacing, write_json, write_safetensors, write_text
from ..paths import leaves_by_path, listed
from ..weights import is_adapted
from .checkpoint.byte_progress import ByteCount, Progress
from .checkpoint.hub import find_base
from .checkpoint.shards import HostTensor, index, is_weights_file, shard, size_in_bytes, total_size
from .checkpoint.weight_files import INDEX, locate_tensors, read_config, read_tensors
from .families.bundled import family_of
from .model import Model, difference
from .model_config import label_names
from .nn.insertion import split_inserted
from .stacking import is_stacked, layer_path

_CONFIG = "config.json"
_LARGEST_COMPANION = 2**28  # bytes
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Model,
    params: PyTree,
    *,
    source: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Writes `config.json`, `model.safetensors` and the tokenizer's files, with Hugging Face's names.

    With `pooling="first"` the folder is a `BertForSequenceClassification` (or the family's equivalent), and
    `AutoModelForSequenceClassification` gives the same logits. Without a task it is a `BertModel` with the same hidden
    states. A decoder with logits is a `LlamaForCausalLM` (or the family's equivalent), whether its layers are stacked
    or not; a tied head has no tensor of its own. transformers has no class for `pooling="mean"`, so the folder is a
    `BertModel` with additional tensors for the head, which `lora_jax.models.load` reads back.

    Args:
        folder: Output folder, created if it doesn't exist. It can't be the base's own.
        model: The model, as from `load`.
        params: The model's tree of plain arrays; merge adapted weights first (`lora_jax.merge_params`).
        source: Base of the same family. The folder keeps the other entries of its configuration, its tokenizer, and
            its pooler if the transformers class has one that the model doesn't use.
        labels: Names of the classes, in the order of the logits. If `None`, those of the source, or `LABEL_0`, ….
        max_shard_size: Maximum size of one file's tensors, in bytes or as text such as `"5GB"`. A larger model is split
            into `model-00001-of-0000N.safetensors` and so on, with an index.
        progress: Callback that receives the bytes written and the bytes in total: once at the start, then after every
            tensor.

    Returns:
        The folder.

    Raises:
        ValueError: Adapted weights, another model's tree, a wrong number of labels, the base's own folder, a base of
            another family, an invalid size, or trained biases (`load(zero_biases=True)`) that transformers doesn't
            have, each of them named.
        FileError: The base isn't found, or the disk is full. An earlier model in the folder is then unchanged: every
            file is complete on disk before the first one is replaced, and `config.json` comes last. If the process is
            killed in between, other programs find a folder that doesn't load, and `load` finds the new model.

    Leaves are moved to the host one at a time, as they are written.
    """
    limit = size_in_bytes(max_shard_size)
    base, folder = find_base(source), Path(folder)
    if folder.exists() and folder.resolve() == base.resolve():
        raise ArgumentError(f"`folder` must not be the base's own, {base}: choose another to keep the base unchanged.")
    source_config = read_config(base)
    if source_config.get("model_type") != model.config.model_type:
        raise ArgumentError(
            f"`source` must be a {model.config.model_type!r}, like the model, got {base}, a "
            f"{source_config.get('model_type')!r:.50}: pass the base that the model was loaded from."
        )
    leaves, bias_entries = _with_biases_known_there(model, _check_params(model, params))
    files = shard(_tensors(model, leaves) | _unused_pooler(model, base), limit)
    config = _config(model, source_config, leaves, labels) | bias_entries
    companions = [name for name in _COMPANIONS if (base / name).is_file()]
    described = [INDEX] if len(files) > 1 else []

    with replacing(folder, (*companions, *files, *described, _CONFIG), obsolete=is_weights_file) as staging:
        for name in companions:
            write_text(staging / name, read_text(base / name, max_bytes=_LARGEST_COMPANION))
        count = ByteCount(total_size(files), progress)
        for name, tensors in files.items():
            write_safetensors(staging / name, tensors, {"format": "pt"}, written=count.add)
        for name in described:
            write_json(staging / name, index(files))
        write_json(staging / _CONFIG, config)
    return folder


def _check_params(model: Model, params: PyTree) -> dict[str, Array]:
    leaves, expected = leaves_by_path(params), leaves_by_path(model.params)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise ArgumentError(f"`params` holds an adapted weight at {path}: merge it with `lora_jax.merge_params`.")
    if inserted := split_inserted(leaves, {path: jnp.shape(leaf) for path, leaf in expected.items()})[1]:
        raise ArgumentError(
            f"`params` has {next(iter(inserted))}, which neither the base nor transformers has: save it as an adapter "
            "with `lora_jax.save_adapter`."
        )
    if leaves.keys() != expected.keys():
        raise ArgumentError(f"`params` isn't this model's tree: {difference(leaves.keys(), expected.keys())}.")
    for path, leaf in leaves.items():
        if jnp.shape(leaf) != jnp.shape(expected[path]):
            raise ArgumentError(
                f"`params` at {path} must have shape {jnp.shape(expected[path])}, got {jnp.shape(leaf)}."
            )
    return leaves


def _with_biases_known_there(model: Model, leaves: dict[str, Array]) -> tuple[dict[str, Array], dict[str, bool]]:
    """The leaves to write, and the entries of `config.json` that enable added biases.

    Added biases that are all zero may be omitted: the model computes the same without them.
    """
    added = {path for path in leaves if model.config.is_added_bias(path)}
    learned = {path for path in added if np.any(leaves[path])}
    written: set[str] = set()
    entries: dict[str, bool] = {}
    for entry, modules in model.config.bias_entries.items():
        group = {path for path in added if path.endswith(tuple(f"/{module}/bias" for module in modules))}
        if group & learned:
            entries[entry] = True
            written |= group
    if lost := sorted(learned - written):
        supported = ", ".join(module for modules in model.config.bias_entries.values() for module in modules)
        raise ArgumentError(
            f"`params` has trained biases that a {model.config.model_type} doesn't have in transformers: "
            f"{listed(lost)}. It supports {f'biases of {supported}' if supported else 'only the biases of the base'}: "
            "train only those, or save the biases as an adapter with `lora_jax.save_adapter`."
        )
    return {path: leaf for path, leaf in leaves.items() if path not in added - written}, entries


def _tensors(model: Model, leaves: Mapping[str, Array]) -> dict[str, HostTensor | np.ndarray]:
    names, prefix = family_of(model.config).names, _prefix(model)
    tensors: dict[str, HostTensor | np.ndarray] = {}
    for path, leaf in leaves.items():
        layers = range(leaf.shape[0]) if is_stacked(path) else (None,)
        for layer in layers:
            name = names.tensor(path if layer is None else layer_path(path, layer), prefix=prefix)
            tensors[name] = HostTensor(leaf, layer, names.is_transposed(path))
    return tensors


def _unused_pooler(model: Model, base: Path) -> dict[str, np.ndarray]:
    """The base's pooler, which transformers would draw anew if it were missing."""
    if _is_task_class(model):  # the class has no pooler (RoBERTa), or the model uses it (BERT)
        return {}
    tensors = locate_tensors(base)
    names = family_of(model.config).names.modern(tensors)
    held = {held: name for name, held in names.items() if name.startswith("pooler.")}
    return {held[name]: array for name, array in read_tensors(tensors, held)}


def _is_task_class(model: Model) -> bool:
    """Whether the folder is for the transformers class with a head, rather than the one without."""
    return model.task is not None and model.pooling == "first"


def _prefix(model: Model) -> str:
    return family_of(model.config).names.prefix if _is_task_class(model) else ""


def _config(
    model: Model, source: Mapping[str, object], leaves: Mapping[str, Array], labels: Sequence[str] | None
) -> dict[str, object]:
    # `torch_dtype` is the old name of `dtype`; the source's value would make transformers cast the weights.
    config = {name: value for name, value in source.items() if name not in ("torch_dtype", "num_labels")}
    with jax.numpy_dtype_promotion("standard"):
        config["dtype"] = jnp.result_type(*leaves.values()).name
    family = family_of(model.config)
    config["architectures"] = [family.architectures[model.task if _is_task_class(model) else None]]
    if model.task == "causal-lm":
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
    if model.task is None or model.task == "causal-lm":
        return config
    outputs = leaves[f"{family.logits}/kernel"].shape[1]
    if labels is None:
        own = label_names(source)
        labels = own if own is not None and len(own) == outputs else None
    names = [f"LABEL_{index}" for index in range(outputs)] if labels is None else [str(label) for label in labels]
    if len(names) != outputs:
        raise ArgumentError(f"`labels` must have {outputs} names, one for each output, got {len(names)}.")
    if len(set(names)) != outputs:
        raise ArgumentError(f"`labels` must have no duplicates, got {', '.join(names)}.")
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    config["problem_type"] = "regression" if model.task == "regression" else "single_label_classification"
    return config
