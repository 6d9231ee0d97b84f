"""Merging an adapter into its base, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import lora_jax as lj
from lora_jax import files
from lora_jax.errors import ArgumentError
from lora_jax.methods.inserting_method import InsertingMethod

from .source import load_source


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: lj.models.Progress | None = None,
) -> Path:
    """Folds an adapter into its base and writes the merged model for `transformers`.

    Args:
        adapter: Folder of a run, the `adapter` folder in it, or one that `lj.save_adapter` or PEFT wrote.
        output: New or empty folder.
        base: Folder or name of the base; the one that the adapter names if `None`.
        max_shard_size: See `lj.models.save_pretrained`.
        progress: Callback for the weights read and then written; see `lj.models.load`.

    Returns:
        `output`.

    Raises:
        FileError: `output` holds files.
        ValueError: An adapter that can't be folded in, since it inserts arrays; one whose head sees the mean over the
            tokens, which transformers has no class for; see `load_source` for others.
    """
    output = Path(output)
    files.require_new_folder(output, "output")  # told before the model is loaded
    source = load_source(adapter, base=base, progress=progress)
    if isinstance(source.method, InsertingMethod):
        raise ArgumentError(
            f"{source.folder} is of {type(source.method).__name__}, which puts new arrays into the layers: no weights "
            "of the base's own compute the same, so there is nothing to fold them into. Keep the adapter beside its "
            "base: `lora-jax predict` and `lora_jax.load_adapter` use it as it is."
        )
    if source.model.pooling == "mean":
        raise ArgumentError(
            f"{source.folder} was trained with `pooling` mean: its head sees the mean over the tokens, and no class "
            "of transformers does. It would load the folder, give the head the first token, and answer otherwise. "
            "Keep the adapter beside its base for `lora-jax predict`; `lora-jax convert --to delta` writes the values, "
            'and `lora_jax.models.save_pretrained` a folder for `lora_jax.models.load(..., pooling="mean")`.'
        )
    merged = lj.merge_params(source.params)
    labels = list(source.task_file.task.labels) if source.task_file is not None else None
    options = {"labels": labels or None, "max_shard_size": max_shard_size, "progress": progress}
    with files.new_folder(output, "output") as staging:
        lj.models.save_pretrained(staging, source.model, merged, source=source.base, **options)
    return output
