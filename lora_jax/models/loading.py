"""`load`: a bundled model from a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..files import FileError
from ..paths import leaves_by_path, path_key
from .checkpoint.byte_progress import Progress
from .checkpoint.hub import find_base
from .checkpoint.weight_files import Located, locate_tensors, read_tensors
from .families.bundled import family_of, read_model_config
from .family import HEAD, WORDS, Family, Task
from .leaf_reader import read_leaves
from .model import Model, check_options, difference, skeleton
from .model_config import ModelConfig
from .nn.attention import ATTENTION_FORMS, AttentionForm
from .nn.decoder import DecoderConfig
from .nn.heads import Pooling
from .nn.rematerialization import Remat
from .stacking import is_stacked, layer_path


def load(
    source: str | os.PathLike[str],
    *,
    task: Task = None,
    num_labels: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
    pooling: Pooling = "first",
    remat: Remat | None = None,
    scan_layers: bool = False,
    attention: AttentionForm = "auto",
    zero_biases: bool = False,
    tie_word_embeddings: bool | None = None,
    new_head: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Loads an encoder (BERT, RoBERTa, XLM-RoBERTa, DistilBERT) or a decoder (GPT-2, Llama, Mistral, Qwen2, Qwen3).

    Args:
        source: Hugging Face folder, hub name (`"owner/name"`, `"owner/name@revision"`) or alias, see `find_base`.
        task: `"classification"` or `"regression"` for an encoder with a head, `"causal-lm"` for a decoder's logits,
            `None` for the last hidden states.
        num_labels: Number of logits for classification; that of the checkpoint's own head if `None`.
        dtype: Dtype of the parameters and of the computation; float32 if `None`, whatever the checkpoint's is. bfloat16
            halves the memory. Norms and softmax are still computed in float32, and parameters are cast to bfloat16
            where they are used, so trained leaves may be float32, and should be: bfloat16 rounds small updates away.
        seed: Seed of a head that the checkpoint lacks: weights are normal with standard deviation
            `initializer_range`, biases zero. Each leaf's draw depends on the seed and its path.
        pooling: Input of the head: `"first"` for the first token, in BERT through the pooler (as in transformers'
            `...ForSequenceClassification`), or `"mean"` for the mean over the tokens that aren't padding.
        remat: Rematerialization policy, a name in `jax.checkpoint_policies`, to save memory in training.
            `"nothing_saveable"` keeps only each layer's input and computes the layer twice, `"dots_saveable"` keeps
            the results of all matmuls, `"dots_with_no_batch_dims_saveable"` those of matmuls with weights.
            `"products_saveable"`, which isn't among JAX's, keeps the result of each matmul with a weight once, its
            low-rank path added, and what fused attention gave, so that no matmul is computed twice. `None` keeps
            everything.
        scan_layers: Whether to stack a decoder's layers into one tree, `layers/…` with a leading axis, and run them in
            a `lax.scan`: compiling eighty layers then takes as long as compiling one. `stack_layers` and
            `unstack_layers` convert between the two forms. `lj.LoRA` then needs
            `uses=lj.trace_weights(model.apply, params, input_ids)`.
        attention: Form of the attention. `"xla"` is written out; `"cudnn"` is the fused kernel of NVIDIA GPUs, in
            bfloat16 and float16, and `"splash"` that of TPUs (on several devices, within `jax.set_mesh`). `"auto"` is
            the kernel of the platform that the program is compiled for, if it can compute the case, from 128 tokens on
            (512 in float32), and `"xla"` otherwise. Fused kernels have no forward mode (`jax.jvp`).
        zero_biases: Whether to add a bias of zeros to every linear layer of a Llama, Mistral, Qwen2 or Qwen3 that has
            none, for `lj.BitFit` to train. This leaves the output unchanged. `save_pretrained` reports which of them
            transformers can load once they are trained.
        tie_word_embeddings: Whether a decoder's head is tied to its embeddings; as in the checkpoint if `None`. `False`
            makes the head a leaf of its own, with the embeddings' values if the checkpoint ties them, so that either
            can be adapted without the other, as PEFT does.
        new_head: Whether to draw an encoder's head from `seed` even if the checkpoint has one, because that one is for
            another task or another order of the labels (see `checkpoint_head`).
        progress: Callback that receives the bytes read and the bytes in total: once at the start, then after every
            tensor.

    Returns:
        A `Model`. Its `params` hold no unused leaves: BERT's pooler is there only for a head with `pooling="first"`.
        An encoder's head is below `classifier`, whether it has one layer or two (RoBERTa, DistilBERT). A decoder's is
        `lm_head`, unless it is tied to the embeddings and so no leaf of its own.

    Raises:
        FileError: There is no such model, or its files are malformed or contradict each other: a pickle; missing,
            unexpected or misshapen tensors (each named); sizes that don't match the checkpoint; a head that differs
            from the embeddings although it is declared tied. This is checked before memory is allocated.
        ValueError: An argument is invalid or doesn't apply to this kind of model, or classification lacks
            `num_labels`.

    Tensors are read one at a time, those of a stacked leaf included, so peak memory is the parameters and one leaf.

    A BERT without a pooler gets a new one, with a warning: it is random, so train it
    (`also_train=("pooler", "classifier")`) or use `pooling="mean"` instead.
    """
    _check_arguments(task, num_labels, pooling, remat, attention)
    if new_head and task not in ("classification", "regression"):
        raise ArgumentError(f"`new_head` applies to classification and regression, and `task` is {task!r}: omit it.")
    dtype = _float_dtype(dtype)
    folder = find_base(source)
    config = read_model_config(folder)
    config = config.with_biases() if zero_biases else config
    family = family_of(config)
    check_options(family, task=task, pooling=pooling, scan_layers=scan_layers)
    untied = _is_tied(config) and tie_word_embeddings is False
    config = _tied(config, tie_word_embeddings, task)
    tensors = locate_tensors(folder)
    names = family.names.modern(tensors)
    _check_sizes(config, {name: tensors[held].info.shape for name, held in names.items()}, folder)
    if new_head:
        tops = family.names.tops(family.head)
        names = {name: held for name, held in names.items() if name.split(".")[0] not in tops}
    words = family.names.tensor(WORDS)
    if untied and words in names:
        names.setdefault(family.names.tensor(HEAD), names[words])
    outputs = _count_outputs(family, task, num_labels, tensors, names, folder)
    apply, shapes = skeleton(
        config,
        task=task,
        num_labels=outputs,
        pooling=pooling,
        dtype=dtype,
        remat=remat,
        scan_layers=scan_layers,
        attention=attention,
    )
    expected = leaves_by_path(shapes)
    parts = {path: _parts(path, leaf) for path, leaf in expected.items()}
    single = {name: leaf for part in parts.values() for name, leaf in part.items()}
    in_checkpoint = {path: leaf for path, leaf in single.items() if not config.is_added_bias(path)}
    held = _match(family, in_checkpoint, tensors, names, folder)
    if task == "causal-lm" and HEAD not in expected:
        _check_tied(family, tensors, names, folder)

    sources = {path: [held[part] for part in parts[path]] for path in parts if parts[path].keys() <= held.keys()}
    values = read_leaves(family, expected, sources, tensors, progress)
    for path in expected.keys() - values.keys():
        values[path] = _draw(path, expected[path], config, seed)
    if "pooler/kernel" in expected and "pooler/kernel" not in held:
        warnings.warn(
            f"{folder} has no pooler, so a new one was drawn from `seed`: train it together with the head "
            '(`also_train=("pooler", "classifier")`), or use `pooling="mean"`.',
            stacklevel=2,
        )
    params = jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in expected])
    return Model(
        apply=apply,
        params=params,
        config=config,
        names=family.leaf_modules(single, task),
        task=task,
        pooling=pooling,
        new_head=new_head,
    )


def _check_arguments(task: object, num_labels: object, pooling: object, remat: object, attention: object) -> None:
    if task is not None and task not in ("classification", "regression", "causal-lm"):
        raise ArgumentError(f'`task` must be "classification", "regression", "causal-lm" or None, got {task!r}.')
    if pooling not in get_args(Pooling):
        raise ArgumentError(f'`pooling` must be "first" or "mean", got {pooling!r}.')
    if remat is not None and remat not in get_args(Remat):
        raise ArgumentError(f"`remat` must be one of {', '.join(get_args(Remat))} or None, got {remat!r}.")
    if attention not in ATTENTION_FORMS:
        raise ArgumentError(f"`attention` must be one of {', '.join(ATTENTION_FORMS)}, got {attention!r}.")
    if num_labels is None:
        return
    if task == "classification" and (type(num_labels) is not int or num_labels < 2):
        raise ArgumentError(
            f'`num_labels` must be an integer of at least 2, got {num_labels!r}; use `task="regression"` for one value.'
        )
    if task == "regression" and num_labels != 1:
        raise ArgumentError(f"`num_labels` must be 1 or omitted for regression, got {num_labels!r}.")
    if task is None:
        raise ArgumentError('`num_labels` needs a `task`: pass `task="classification"`.')
    if task == "causal-lm":
        raise ArgumentError(f'`num_labels` must be omitted for "causal-lm", got {num_labels!r}.')


def _float_dtype(dtype: jax.typing.DTypeLike | None) -> np.dtype:
    result = np.dtype(jnp.float32) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating) or jax.dtypes.canonicalize_dtype(result) != result:
        raise ArgumentError(f"`dtype` must be float32, bfloat16, float16, or float64 if JAX enables it, got {result}.")
    return result


def _check_sizes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Checks sizes before anything is built from them, since a configuration may claim more than fits into memory."""
    family = family_of(config)
    for tensor, sizes in family.sizes.items():
        wanted = tuple(getattr(config, size) for size in sizes)
        if tensor in shapes and shapes[tensor] != wanted:
            said = " and ".join(f"`{size}` {number:,}" for size, number in zip(sizes, wanted, strict=True))
            raise FileError(
                f"{folder}: config.json has {said}, but the tensor '{tensor}' has shape {shapes[tensor]}. They belong "
                "to different models."
            )
    layers, said = family.names.layer_count(shapes), getattr(config, family.layers)
    if layers != said:
        raise FileError(
            f"{folder}: config.json has `{family.layers}` {said:,}, but the checkpoint has {layers:,} layers: tensors "
            "are missing, or they belong to different models."
        )


def _count_outputs(
    family: Family,
    task: Task,
    num_labels: int | None,
    tensors: Mapping[str, Located],
    names: Mapping[str, str],
    folder: Path,
) -> int:
    if task is None or task == "causal-lm":
        return 1
    held = names.get(family.names.tensor(f"{family.logits}/kernel"))
    outputs = tensors[held].info.shape[0] if held is not None and tensors[held].info.shape else None
    wanted = 1 if task == "regression" else num_labels
    if wanted is None:
        if outputs is None:
            raise ArgumentError(f"`num_labels` is required: {folder} has no head.")
        return outputs
    if outputs is not None and wanted != outputs:
        raise FileError(
            f"{folder} has a head with {outputs} outputs, not {wanted}: omit `num_labels` to use it, or pass "
            "`new_head=True` to replace it."
        )
    return wanted


def _match(
    family: Family,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, Located],
    names: Mapping[str, str],
    folder: Path,
) -> dict[str, str]:
    """`{leaf path: tensor in the checkpoint}`, after checking every name, dtype and shape."""
    paths = {family.names.tensor(path): path for path in expected}
    heads = {head: family.names.tops(head) for head in family.heads}
    in_heads = {name for name in names if any(name.split(".")[0] in tops for tops in heads.values())}
    absent = {head for head, tops in heads.items() if not any(name.split(".")[0] in tops for name in in_heads)}
    absent = absent if family.draws_heads else set()
    wanted = {name for name, path in paths.items() if path.split("/")[0] not in absent}
    found = {name for name in names if name in paths or name not in in_heads}
    if found != wanted:
        raise FileError(f"{folder}: the checkpoint doesn't fit its config.json: {difference(found, wanted)}.")
    for name in sorted(wanted):
        info, shape = tensors[names[name]].info, expected[paths[name]].shape
        shape = shape[::-1] if family.names.is_transposed(paths[name]) else shape
        if info.shape != shape:
            raise FileError(f"{folder}: the tensor '{names[name]}' must have shape {shape}, got {info.shape}.")
        if not jnp.issubdtype(info.dtype, jnp.floating):
            raise FileError(f"{folder}: the tensor '{names[name]}' must have a float dtype, got {info.dtype}.")
    return {paths[name]: names[name] for name in wanted}


def _parts(path: str, leaf: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves with a tensor of their own: this one, or one for each layer of a stacked leaf."""
    if not is_stacked(path):
        return {path: leaf}
    layers, *shape = leaf.shape
    return {layer_path(path, layer): jax.ShapeDtypeStruct(tuple(shape), leaf.dtype) for layer in range(layers)}


def _is_tied(config: ModelConfig) -> bool:
    return isinstance(config, DecoderConfig) and config.tie_word_embeddings


def _tied(config: ModelConfig, tie: bool | None, task: Task) -> ModelConfig:
    if tie is None:
        return config
    if type(tie) is not bool:
        raise ArgumentError(f"`tie_word_embeddings` must be true, false or None, got {tie!r}.")
    if task != "causal-lm":
        raise ArgumentError(
            '`tie_word_embeddings` applies to a decoder with logits: pass `task="causal-lm"`, or omit it.'
        )
    return dataclasses.replace(config, tie_word_embeddings=tie)


def _check_tied(family: Family, tensors: dict[str, Located], names: Mapping[str, str], folder: Path) -> None:
    """Checks that a head that the checkpoint holds although it is tied equals the embeddings."""
    head = names.get(family.names.tensor(f"{family.logits}/kernel"))
    word = names[family.names.tensor(WORDS)]
    if head is None or head == word:
        return
    arrays = dict(read_tensors(tensors, [word, head]))
    if not np.array_equal(arrays[word], arrays[head]):
        raise FileError(
            f"{folder}: config.json ties the head to the embeddings, but '{head}' differs from '{word}': pass "
            "`tie_word_embeddings=False` to use the checkpoint's head."
        )


def _draw(path: str, leaf: jax.ShapeDtypeStruct, config: ModelConfig, seed: int) -> jax.Array:
    if path.endswith("/bias"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    draw = jax.random.normal(path_key(jax.random.key(seed), path), leaf.shape)
    return (draw * config.initializer_range).astype(leaf.dtype)
