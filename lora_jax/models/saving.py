"""`save_pretrained`: a model as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..files import read_text, replacing, write_json, write_safetensors, write_text
from ..paths import leaves_by_path, listed
from ..weights import is_adapted
from .checkpoint.hub import find_base
from .checkpoint.reporting import ByteCount, Progress
from .checkpoint.shards import HostTensor, index, is_weights_file, shard, size_in_bytes
from .checkpoint.weight_files import INDEX, locate_tensors, read_config, read_tensors
from .families.registry import family_of
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
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Writes `config.json`, `model.safetensors` and the tokenizer's files, under Hugging Face's names.

    With `pooling="first"` the folder is a `BertForSequenceClassification` (or another family's) and
    `AutoModelForSequenceClassification` gives equal logits. Without a task it is a `BertModel` with equal hidden
    states. A decoder with logits is a `LlamaForCausalLM` (or another family's), whether its layers are stacked or not;
    a tied head has no tensor of its own. transformers has no class with `pooling="mean"`: then the folder is a
    `BertModel` with the head's tensors beside it, which `lora_jax.models.load` reads back.

    Args:
        folder: where to; made if it doesn't exist. Not the base's own.
        model: as from `load`.
        params: the model's tree with plain arrays; merge adapted weights first (`lora_jax.merge_params`).
        source: the base, of the same family: its configuration's other entries and its tokenizer are kept, and so is
            its pooler where the class of transformers has one and the model doesn't use it.
        labels: the classes' names, in the order of the logits; the source's own, or `LABEL_0` …, if `None`.
        max_shard_size: of the tensors in one file, in bytes or such as `"5GB"`. A larger model goes into
            `model-00001-of-0000N.safetensors` and so on, with an index.
        progress: called with the bytes written so far and those to write, first with 0 and then after every tensor.

    Returns:
        The folder.

    Raises:
        ValueError: adapted weights, another model's tree, a wrong number of labels, the base's own folder, a base of
            another family, a size that is none; trained biases (`load(zero_biases=True)`) where transformers has none,
            each named.
        FileError: the base isn't found, or the disk is full. An earlier model in the folder is then as it was: every
            file is complete on disk before the first takes its place, and `config.json` comes last, so that a kill in
            between leaves others a folder that doesn't load; `load` finds the new model.

    Leaves are brought to the host one at a time, when they are written.
    """
    limit = size_in_bytes(max_shard_size)
    base, folder = find_base(source), Path(folder)
    if folder.exists() and folder.resolve() == base.resolve():
        raise ArgumentError(f"`folder` is the base's own, {base}: save to another, so that the base stays as it is.")
    source_config = read_config(base)
    if source_config.get("model_type") != model.config.model_type:
        raise ArgumentError(
            f"`source` {base} is a {source_config.get('model_type')!r:.50}, and the model a "
            f"{model.config.model_type!r}: pass the base that it was loaded from."
        )
    leaves, bias_entries = _with_biases_known_there(model, _check_params(model, params))
    files = shard(_tensors(model, leaves) | _unused_pooler(model, base), limit)
    config = _config(model, source_config, leaves, labels) | bias_entries
    companions = [name for name in _COMPANIONS if (base / name).is_file()]
    described = [INDEX] if len(files) > 1 else []

    with replacing(folder, (*companions, *files, *described, _CONFIG), obsolete=is_weights_file) as staging:
        for name in companions:
            write_text(staging / name, read_text(base / name, max_bytes=_LARGEST_COMPANION))
        count = ByteCount(index(files)["metadata"]["total_size"], progress)
        for name, tensors in files.items():
            write_safetensors(staging / name, tensors, {"format": "pt"}, written=count.add)
        for name in described:
            write_json(staging / name, index(files))
        write_json(staging / _CONFIG, config)
    return folder


def _check_params(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    leaves, expected = leaves_by_path(params), leaves_by_path(model.params)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise ArgumentError(f"`params` holds an adapted weight at {path}: fold it in with `lora_jax.merge_params`.")
    if inserted := split_inserted(leaves, {path: jnp.shape(leaf) for path, leaf in expected.items()})[1]:
        raise ArgumentError(
            f"`params` has {next(iter(inserted))}, which the base hasn't and transformers doesn't know: save it with "
            "`lora_jax.save_adapter`, beside the base."
        )
    if leaves.keys() != expected.keys():
        raise ArgumentError(f"`params` isn't this model's tree: {difference(leaves.keys(), expected.keys())}.")
    for path, leaf in leaves.items():
        if jnp.shape(leaf) != jnp.shape(expected[path]):
            raise ArgumentError(f"`params` at {path} has shape {jnp.shape(leaf)}, not {jnp.shape(expected[path])}.")
    return leaves


def _with_biases_known_there(model: Model, leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """The leaves to write, and the entries of `config.json` that announce the biases which the base lacks.

    Those that are zero still need not be written: transformers computes the same without.
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
        kind = model.config.model_type
        places = ", ".join(module for modules in model.config.bias_entries.values() for module in modules)
        raise ArgumentError(
            f"`params` has trained biases where transformers' {kind} has none: {listed(lost)}. It knows "
            f"{f'those of {places}' if places else 'no others than the base has'}: train those alone, or keep these "
            "with `lora_jax.save_adapter`."
        )
    return {path: leaf for path, leaf in leaves.items() if path not in added - written}, entries


def _tensors(model: Model, leaves: Mapping[str, Any]) -> dict[str, Any]:
    names, prefix = family_of(model.config).names, _prefix(model)
    tensors: dict[str, Any] = {}
    for path, leaf in leaves.items():
        layers = range(leaf.shape[0]) if is_stacked(path) else (None,)
        for layer in layers:
            name = names.tensor(path if layer is None else layer_path(path, layer), prefix=prefix)
            tensors[name] = HostTensor(leaf, layer, names.is_transposed(path))
    return tensors


def _unused_pooler(model: Model, base: Path) -> dict[str, np.ndarray]:
    """Kept as it was: without it transformers would draw a new one."""
    if _is_task_class(model):  # it has no pooler (RoBERTa), or the model uses it (BERT)
        return {}
    tensors = locate_tensors(base)
    names = family_of(model.config).names.modern(tensors)
    held = {held: name for name, held in names.items() if name.startswith("pooler.")}
    return {held[name]: array for name, array in read_tensors(tensors, held)}


def _is_task_class(model: Model) -> bool:
    """Whether the folder is of the class of transformers that has the head, or of the one without."""
    return model.task is not None and model.pooling == "first"


def _prefix(model: Model) -> str:
    return family_of(model.config).names.prefix if _is_task_class(model) else ""


def _config(
    model: Model, source: Mapping[str, Any], leaves: Mapping[str, Any], labels: Sequence[str] | None
) -> dict[str, Any]:
    # `torch_dtype` is the old name of `dtype`; the source's would make transformers cast the weights.
    config = {name: value for name, value in source.items() if name not in ("torch_dtype", "num_labels")}
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
        raise ArgumentError(f"`labels` has {len(names)} names, and the model has {outputs} outputs.")
    if len(set(names)) != outputs:
        raise ArgumentError(f"`labels` has a name twice: {', '.join(names)}.")
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    config["problem_type"] = "regression" if model.task == "regression" else "single_label_classification"
    return config
