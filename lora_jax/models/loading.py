"""`load`: a bundled model from a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..files import FileError
from ..paths import leaves_by_path, path_key
from .checkpoint.hub import find_base
from .checkpoint.reporting import Progress
from .checkpoint.weight_files import Located, locate_tensors, read_tensors
from .families.registry import family_of, read_model_config
from .family import HEAD, WORDS, Family, Task
from .model import Model, check_options, difference, skeleton
from .model_config import ModelConfig
from .nn.attention import ATTENTION_FORMS, AttentionForm
from .nn.decoder import DecoderConfig
from .nn.heads import Pooling
from .nn.rematerialization import Remat
from .reading import read_leaves
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
        source: a Hugging Face folder, a hub name (`"owner/name"`, `"owner/name@revision"`) or an alias; see
            `find_base`.
        task: `"classification"` or `"regression"` for a head on an encoder, `"causal-lm"` for a decoder's logits,
            `None` for the last hidden states.
        num_labels: logits of a classification; those of the checkpoint's own head if `None`.
        dtype: of the parameters and of the computation; float32 if `None`, whatever the checkpoint holds. With
            bfloat16 half the memory is taken, norms and softmax stay in float32, and parameters are cast to bfloat16
            where they are used: so leaves to be trained may (and, for small updates not to be rounded away, should)
            be made float32.
        seed: of a head that the checkpoint lacks: normal with deviation `initializer_range`, biases zero, drawn from
            the leaf's path.
        pooling: what the head sees: `"first"`, the first token, in BERT through the pooler (as in transformers'
            `...ForSequenceClassification`); or `"mean"`, the mean over the tokens that aren't padding.
        remat: rematerialization, for less memory in training: what of a layer is kept for the backward pass, by its
            name in `jax.checkpoint_policies`. `"nothing_saveable"` keeps its input alone and computes the layer twice,
            `"products_saveable"` keeps what each weight's matmul gave together with its low-rank path, so that no
            product is computed twice, `"dots_saveable"` keeps what all matmuls gave, `"dots_with_no_batch_dims_saveable"` that of weights' matmuls.
            `None` keeps all.
        scan_layers: stacks a decoder's layers into one tree, `layers/…` with a leading axis, and runs them in a
            `lax.scan`: compiling takes as long for eighty layers as for one. `stack_layers` and `unstack_layers` turn
            one form into the other. `lj.LoRA` then needs `uses=lj.trace_weights(model.apply, params, input_ids)`.
        attention: The form of the attention. `"xla"` is written out; `"cudnn"` is the fused kernel of NVIDIA GPUs, in
            bfloat16 and float16, and `"splash"` that of TPUs (with several devices, under `jax.set_mesh`). `"auto"` is
            the kernel of the platform that the program is compiled for, where there is one that can compute the case,
            from 128 tokens on (512 in float32); else `"xla"`. Fused kernels have no forward mode (`jax.jvp`).
        zero_biases: gives every linear layer of a Llama, Mistral, Qwen2 or Qwen3 that has no bias one of zeros, for
            `lj.BitFit` to train; nothing computed changes by it. `save_pretrained` says which of them, once trained,
            transformers has a place for.
        tie_word_embeddings: whether a decoder's head is its embeddings; as the checkpoint has it if `None`. `False`
            makes it a leaf of its own, with the same values where the checkpoint ties them: so that one of the two can
            be adapted without the other, as PEFT does.
        new_head: Whether an encoder's head is drawn from `seed` even where the checkpoint has one, which is then left
            aside: of another task, or with another order of its labels (see `checkpoint_head`).
        progress: called with the bytes read so far and those to read, first with 0 and then after every tensor.

    Returns:
        A `Model`. Its `params` hold no leaf without use: BERT's pooler is there for a head with `pooling="first"`
        only. The head is below `classifier`, be it of one layer or (RoBERTa, DistilBERT) of two. A decoder's is
        `lm_head`, or, where it is tied to the embeddings, no leaf of its own.

    Raises:
        FileError: no such model, or files that are malformed or contradict each other: a pickle, missing, unexpected
            or misshapen tensors (each named), sizes that the checkpoint doesn't have, a head that is said to be tied to
            the embeddings and isn't. No memory is taken before.
        ValueError: an argument outside its choices or that the kind of model doesn't have, or a classification without
            `num_labels`.

    Tensors are read one at a time, those of a stacked leaf one after the other: beside the parameters, memory is taken
    for one leaf.

    A BERT without a pooler gets a new one, with a warning: it starts random, so it must be trained
    (`also_train=("pooler", "classifier")`), or replaced by `pooling="mean"`.
    """
    _check_arguments(task, num_labels, pooling, remat, attention)
    if new_head and task not in ("classification", "regression"):
        raise ArgumentError(
            f"`new_head` is for a classification or a regression, and `task` is {task!r}: leave it out."
        )
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

    made_of = {path: [held[part] for part in parts[path]] for path in parts if parts[path].keys() <= held.keys()}
    values = read_leaves(family, expected, made_of, tensors, progress)
    for path in expected.keys() - values.keys():
        values[path] = _draw(path, expected[path], config, seed)
    if "pooler/kernel" in expected and "pooler/kernel" not in held:
        warnings.warn(
            f"{folder} has no pooler, so a new one was drawn from `seed`: train it with the head "
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
        raise ArgumentError(f'`task` must be "classification", "regression", "causal-lm" or None, not {task!r}.')
    if pooling not in get_args(Pooling):
        raise ArgumentError(f'`pooling` must be "first" or "mean", not {pooling!r}.')
    if remat is not None and remat not in get_args(Remat):
        raise ArgumentError(f"`remat` must be one of {', '.join(get_args(Remat))} or None, not {remat!r}.")
    if attention not in ATTENTION_FORMS:
        raise ArgumentError(f"`attention` must be one of {', '.join(ATTENTION_FORMS)}, not {attention!r}.")
    if num_labels is None:
        return
    if task == "classification" and (type(num_labels) is not int or num_labels < 2):
        raise ArgumentError(f"`num_labels` must be 2 or more, not {num_labels!r}; a single value is a regression.")
    if task == "regression" and num_labels != 1:
        raise ArgumentError(f"`num_labels` must be 1 (or left out) for a regression, not {num_labels!r}.")
    if task is None:
        raise ArgumentError('`num_labels` needs a `task`: pass `task="classification"`.')
    if task == "causal-lm":
        raise ArgumentError(f'`num_labels` is {num_labels!r}, and a "causal-lm" has its vocabulary: leave it out.')


def _float_dtype(dtype: jax.typing.DTypeLike | None) -> np.dtype:
    result = np.dtype(jnp.float32) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating) or jax.dtypes.canonicalize_dtype(result) != result:
        raise ArgumentError(f"`dtype` must be float32, bfloat16, float16 (or float64 where JAX has it), not {result}.")
    return result


def _check_sizes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Before anything is built from them: a configuration may claim sizes that no memory has."""
    family = family_of(config)
    for tensor, sizes in family.sizes.items():
        wanted = tuple(getattr(config, size) for size in sizes)
        if tensor in shapes and shapes[tensor] != wanted:
            said = " and ".join(f"`{size}` {number:,}" for size, number in zip(sizes, wanted, strict=True))
            raise FileError(
                f"{folder}: config.json says {said}, and the tensor '{tensor}' has shape {shapes[tensor]}. They belong "
                "to different models."
            )
    layers, said = family.names.layer_count(shapes), getattr(config, family.layers)
    if layers != said:
        raise FileError(
            f"{folder}: config.json says `{family.layers}` {said:,}, and the checkpoint has {layers:,} layers: tensors "
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
    if wanted is None and outputs is None:
        raise ArgumentError(f"`num_labels` is needed: {folder} has no head of its own.")
    if wanted is not None and outputs is not None and wanted != outputs:
        raise FileError(
            f"{folder} has a head of {outputs} outputs, and {wanted} are asked for: leave `num_labels` out to use it, "
            "or pass `new_head=True` to draw another in its place."
        )
    return wanted if wanted is not None else outputs  # pyright: ignore[reportReturnType]


def _match(
    family: Family,
    expected: Mapping[str, Any],
    tensors: Mapping[str, Located],
    names: Mapping[str, str],
    folder: Path,
) -> dict[str, str]:
    """`{leaf path: tensor in the checkpoint}`, having compared every name, dtype and shape."""
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
            raise FileError(f"{folder}: the tensor '{names[name]}' has shape {info.shape}, and {shape} is expected.")
        if not jnp.issubdtype(info.dtype, jnp.floating):
            raise FileError(f"{folder}: the tensor '{names[name]}' has dtype {info.dtype}, and a float is expected.")
    return {paths[name]: names[name] for name in wanted}


def _parts(path: str, leaf: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that have tensors of their own: this one, or the layers of a stacked one."""
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
        raise ArgumentError(f"`tie_word_embeddings` must be true, false or None, not {tie!r}.")
    if task != "causal-lm":
        raise ArgumentError(
            '`tie_word_embeddings` is for a decoder with its head: pass `task="causal-lm"`, or leave it out.'
        )
    return dataclasses.replace(config, tie_word_embeddings=tie)


def _check_tied(family: Family, tensors: dict[str, Located], names: Mapping[str, str], folder: Path) -> None:
    """A checkpoint may hold the head that it ties to the embeddings; then it must be the same."""
    head = names.get(family.names.tensor(f"{family.logits}/kernel"))
    word = names[family.names.tensor(WORDS)]
    if head is None or head == word:
        return
    arrays = dict(read_tensors(tensors, [word, head]))
    if not np.array_equal(arrays[word], arrays[head]):
        raise FileError(
            f"{folder}: the head is tied to the embeddings, and '{head}' differs from '{word}'. To use it, pass "
            "`tie_word_embeddings=False`."
        )


def _draw(path: str, leaf: jax.ShapeDtypeStruct, config: ModelConfig, seed: int) -> jax.Array:
    if path.endswith("/bias"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    draw = jax.random.normal(path_key(jax.random.key(seed), path), leaf.shape)
    return (draw * config.initializer_range).astype(leaf.dtype)
